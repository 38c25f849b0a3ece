"""The predicted step: the account of single launches by hand, and no landing that makes a prediction worse unseen."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import triton

from benchmarks import costs, model
from benchmarks.gpu_parts import summary
from benchmarks.gpu_parts.summary import with_predictions
from benchmarks.replaced import replaced
from sampled_sae.kernels import chunk_filter, column_scores, segment_sum

ROOT = Path(__file__).resolve().parent.parent
ROWS = json.loads(model.FILE.read_text())["rows"]
H100 = costs.DEVICES["H100"]


@pytest.mark.slow
def test_no_prediction_became_worse():
    """By more than 5%; where it is meant, `python -m benchmarks.model` writes the file anew."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.model", "--check"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_the_file_has_every_row_and_its_table():
    assert len(ROWS) == len({model.key(row) for row in ROWS}) == 3 * 3 * 2 * 2 * 4
    assert model.FILE.with_suffix(".md").read_text() == model.table(ROWS)
    assert model.table(ROWS).startswith("# Predicted, not measured")


@pytest.mark.parametrize("row", ROWS, ids=model.key)
def test_a_row_adds_up(row):
    assert row["of_product"] == pytest.approx(sum(row["shares"].values()), abs=0.005)
    floor = 2 * row["B"] * row["d"] * row["F"] / costs.DEVICES[row["device"]].tflops[row["dtype"]] / 1e9
    assert row["ms"] == pytest.approx(row["of_product"] * floor, rel=1e-3)
    assert row["TFLOP"] * 1.001e12 >= 2 * row["B"] * row["d"] * row["F"]


def test_work_takes_the_longest_of_its_parts():
    tera = 10**12
    assert costs.Work("x", bytes=3 * tera).seconds(H100) == pytest.approx(1)
    assert costs.Work("x", cached=11 * tera).seconds(H100) == pytest.approx(2)
    assert costs.Work("mm", 3 * tera, 0, 1596 * tera, "bfloat16").seconds(H100) == pytest.approx(2)
    issued = costs.Work("x", instructions=lambda arch: 4 * 132 * 1_750_000_000)
    assert issued.seconds(H100) == pytest.approx(1)
    assert costs.Work("x").seconds(H100) == pytest.approx(2e-6)
    product = costs.Work("x", 0, 0, 399 * tera, "bfloat16", issued.instructions, rate=0.5)
    assert product.seconds(H100) == pytest.approx(1)
    assert dataclasses.replace(product, alone=True).seconds(H100) == pytest.approx(2)


def test_tiles_are_fed_and_rounds_filled():
    """Shared memory of an H100 by hand: 10 cycles for a column of 128 x 128, of which the matrix units take 8."""
    assert costs.fed({"BM": 128, "BN": 128}) == 0.8
    assert costs.fed({"BM": 128, "BN": 256}) == 1
    assert costs.busy({"F": 1000, "B": 257, "rounds": 3}, {"BM": 128, "BN": 256}, 7) == 16 / 21


def test_a_product_by_descriptors_is_counted_as_one_by_pointers():
    """Its operands' bytes, its FLOPs and every tile's instructions."""
    x, W = (torch.empty(n, 768, dtype=torch.bfloat16, device="meta") for n in (8192, 65536))
    found = []
    known = {"architecture": lambda device: "sm_90", "multiprocessors": lambda device: 132}
    with replaced(launch=lambda *args, **more: found.append(costs.work_of_launch(*args, **more)), **known):
        column_scores.column_statistics(x, W, None, "l2")
    work, fold = found
    assert (work.name, work.flops, work.alone) == ("described_partials_kernel", 2 * 8192 * 65536 * 768, True)
    assert work.bytes == fold.bytes - 4 * 65536 + 2 * 768 * (8192 + 65536)
    assert work.rate == pytest.approx(costs.DESCRIBED * 16384 / (132 * 125))
    behind = costs.committed("sm_90")["column_scores: descriptors bf16 l2"]["behind products"]
    assert work.instructions("sm_90") == 132 * 125 * 8 * behind > 0


def test_instructions_are_those_of_the_tables():
    rows = {arch: costs.committed(arch) for arch in ("sm_80", "sm_90")}
    assert set(costs.CODE.values()) <= {*rows["sm_80"], costs.CODE["described_partials_kernel"]}
    assert set(costs.CODE.values()) <= {*rows["sm_90"]}
    assert min(row["instructions"] for row in rows["sm_90"].values()) > 50


def test_operations_of_pytorch_are_counted():
    a, b = torch.empty(8, 4, device="meta"), torch.empty(4, device="meta")
    with model.Trace() as trace:
        (a.t().expand(4, 8) + 1).mul_(b[:, None].expand(4, 8))
        a.index_select(0, torch.empty(3, dtype=torch.int64, device="meta"))
        torch.sort(b)
        torch.mm(a.bfloat16(), torch.empty(4, 16, dtype=torch.bfloat16, device="meta"))
        b.contiguous(), b.float(), a.new_zeros(2)
    found = [(work.name, work.bytes) for work in trace.works]
    add, multiply = ("PyTorch passes", 2 * 128), ("PyTorch passes", 2 * 128 + 16)
    cast = ("PyTorch passes", 128 + 64)
    gather, sort = ("gather", 2 * 48 + 24), ("sort", costs.SORT_PASSES * 2 * (16 + 32))
    product, zeros = ("products of cuBLAS", 64 + 128 + 256), ("PyTorch passes", 8)
    assert found == [add, multiply, gather, sort, cast, product, zeros]
    assert trace.works[-2].flops == 2 * 8 * 4 * 16
    assert trace.works[-2].dtype == "bfloat16"


def test_memory_that_is_alive_is_counted():
    x = torch.empty(1000, device="meta")
    with model.Trace() as trace:
        y = x + 1
        assert trace.alive == 4000
        view = y.view(10, 100)[:5].mul_(2).t()
        z = (y * 2, x.new_empty(500).detach())[1]
        assert (trace.alive, trace.peak) == (6000, 10_000)
        del y
        assert trace.alive == 6000
        del view
        assert trace.alive == 2000
    del z
    assert trace.alive == 0
    trace.begin()
    assert trace.peak == 0


def test_memory_of_a_step_with_a_pool_is_a_few_tensors_of_the_activations():
    """Of [B, d] in float32, which the reconstruction and its gradient are."""
    for row in ROWS:
        if row["l"] is not None and row["dtype"] == "bfloat16" and row["device"] != "A100":
            assert row["memory"] <= 4 * row["d"] / row["F"], model.key(row)


def launched(kernel, grid, *args, **constexprs):
    config = triton.Config({"BE": 8, "BD": 256, "PIECE": 256, "STEPS": 4}, num_warps=1)
    return costs.work_of_launch(kernel, config, grid, args, **constexprs)


def test_what_fits_l2_comes_from_there_when_it_is_read_again():
    def new(*shape, dtype=torch.float32):
        return torch.empty(*shape, dtype=dtype, device="meta")

    for features, cached in ((1 << 15, True), (1 << 17, False)):
        source, weights, out = new(features, 512, dtype=torch.bfloat16), new(1000), new(10, 512)
        names = {"weights": weights, "source": source, "out": out}
        args = [names.get(name) for name in segment_sum.segments_kernel.arg_names]
        work = launched(segment_sum.segments_kernel, (10, 2), *args, D=512)
        gathered, rest = 1000 * 512 * 2, 4000 + 20480
        # a stripe of 256 columns is read by all programs before the next
        assert (work.cached == gathered) == cached
        assert work.bytes == rest + (features * 1024 if cached else gathered)
    for tokens, cached in ((1024, True), (16384, False)):
        names = {"z": new(tokens, 1024), "B": tokens}
        args = [names.get(name) for name in chunk_filter.append_above_kernel.arg_names]
        work = launched(chunk_filter.append_above_kernel, (1,), *args)
        assert (work.bytes, work.cached) == ((0, 4096 * tokens) if cached else (4096 * tokens, 0))


def test_a_measured_step_stands_beside_its_prediction():
    size = {"workload": "wide", "B": model.B, "d": 768, "F": model.F, "k": model.K, "ratio": 2.0}
    names = ("l=4, RowAdam dense", "l=4, RowAdam dense, graph", "l=None (BatchTopK), RowAdam dense")
    rows = [{**size, "candidate": name} for name in names] + [{**size, "candidate": names[0], "d": 100}]
    found = with_predictions(rows, "NVIDIA H100 80GB HBM3")
    assert ["predicted" in row for row in found] == [True, False, True, False]
    assert f"2.00 ({found[0]['predicted']:.2f} predicted)" in "\n".join(summary.summary("steps", found[:2]))
    assert with_predictions(rows, "AMD EPYC") == rows
