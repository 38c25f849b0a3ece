"""Everything for one visit to a GPU: correctness first, then the ceilings, the kernels and whole training steps.

    python benchmarks/gpu.py OUTDIR                 all parts, in under 9 minutes
    python benchmarks/gpu.py OUTDIR --only steps
    python benchmarks/gpu.py OUTDIR --rehearse      tiny sizes in Triton's interpreter, to see that nothing is broken

Each part writes OUTDIR/<part>.json as soon as it is done; one that fails is reported, and the others go on. A short
table comes last. Times are medians with the 20th and 80th percentile over rounds that go through all candidates in
turn, so that they see the same clock and the same neighbours.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
if "--rehearse" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"

import torch
import triton

from benchmarks.workloads import GPU_STEPS, REHEARSAL, Workload, activations
from sampled_sae import RowAdam, SampledSAE, SampledSAEConfig
from sampled_sae.config import pool_size

ROOT = Path(__file__).resolve().parent.parent
REHEARSE = "--rehearse" in sys.argv
DEVICE = "cpu" if REHEARSE else "cuda"
WORKLOADS = REHEARSAL if REHEARSE else GPU_STEPS
ROUNDS = 1 if REHEARSE else 15
RULES: dict[str, dict[str, Any]] = {
    "l=1": {"l": 1.0},
    "l=4": {"l": 4.0},
    "l=16": {"l": 16.0},
    "l=None (BatchTopK)": {"l": None},
    "token (TopK)": {"l": None, "select": "token"},
}
# torch's fused Adam on dense gradients, or RowAdam in this mode
OPTIMIZERS = {"Adam": None, "RowAdam dense": "dense", "RowAdam decayed": "decayed"}
Row = dict[str, Any]


def timed(functions: dict[str, Callable[[], Any]], rounds: int = ROUNDS) -> dict[str, Row]:
    """Milliseconds of each function; rounds go over all of them in turn, after one round that warms up."""
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for i in range(rounds + 1):
        for name, function in functions.items():
            took = one_run(function)
            if i:
                samples[name].append(took)
    return {name: spread(values) for name, values in samples.items()}


def one_run(function: Callable[[], Any]) -> float:
    if DEVICE == "cpu":
        start = time.perf_counter()
        function()
        return 1e3 * (time.perf_counter() - start)
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    first.record()
    function()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last)


def spread(values: list[float]) -> Row:
    ordered = sorted(values)
    at = [ordered[min(len(ordered) - 1, int(share * len(ordered)))] for share in (0.2, 0.8)]
    return {"ms": statistics.median(ordered), "p20": at[0], "p80": at[1]}


def correctness() -> list[Row]:
    """`pytest -m gpu`, on this machine's device; in a rehearsal only that it collects."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-m",
        "gpu",
        "-q",
        "-x",
        "--no-header",
        "-p",
        "no:cacheprovider",
        "tests",
    ]
    done = subprocess.run(
        [*command, "--collect-only"] if REHEARSE else command, cwd=ROOT, capture_output=True, text=True
    )
    tail = done.stdout.strip().splitlines()[-1:] or [done.stderr[-500:]]
    if done.returncode:
        raise RuntimeError(f"pytest -m gpu: {tail[0]}\n{done.stdout[-6000:]}")
    return [{"name": "pytest -m gpu", "result": re.sub(r"\x1b\[\d*m|=", "", tail[0]).strip()}]


def ceilings() -> list[Row]:
    """Copy bandwidth, and the encoder product of each workload by cuBLAS in bf16 and fp32."""
    elements = 1 << (12 if REHEARSE else 28)
    source, target = (torch.empty(elements, device=DEVICE) for _ in range(2))
    rows = []
    for name, row in timed({"copy": lambda: target.copy_(source)}).items():
        rows.append({"name": name, **row, "GB/s": 8e-6 * elements / row["ms"]})
    for w in WORKLOADS:
        for dtype in (torch.bfloat16, torch.float32):
            x, W = operands(w, dtype)
            for name, row in timed({"product": product_of(x, W)}).items():
                flops = 2 * w.B * w.d * w.F
                rows.append({"name": f"{name} {dtype}", "workload": w.name, **row, "TFLOP/s": 1e-9 * flops / row["ms"]})
    return rows


def operands(w: Workload, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """x [B, d] and W [F, d]."""
    generator = torch.Generator(DEVICE).manual_seed(1)
    W = torch.randn(w.F, w.d, generator=generator, device=DEVICE) / w.d**0.5
    return activations(w, 0).to(DEVICE, dtype), W.to(dtype)


def product_of(x: torch.Tensor, W: torch.Tensor) -> Callable[[], Any]:
    """The encoder product into memory that exists: the floor of every step."""
    out = torch.empty(x.shape[0], W.shape[0], dtype=x.dtype, device=x.device)
    return lambda: torch.mm(x, W.t(), out=out)


def kernels() -> list[Row]:
    """Each kernel in bf16 at l = 4 and for the whole dictionary, as a multiple of the encoder product."""
    rows = []
    for w in WORKLOADS:
        for name, row in timed(kernel_calls(w)).items():
            rows.append({"name": name, "workload": w.name, **row})
        floor = next(r["ms"] for r in rows if r["workload"] == w.name and r["name"] == "encoder product")
        for row in rows:
            if row["workload"] == w.name:
                row["of product"] = row["ms"] / floor
        release()
    return rows


def kernel_calls(w: Workload) -> dict[str, Callable[[], Any]]:
    from sampled_sae.kernels.batch_topk import keep_largest_, largest_indices
    from sampled_sae.kernels.column_scores import column_statistics
    from sampled_sae.kernels.gather_decode import entry_dots, gather_sum
    from sampled_sae.kernels.segment_sum import feature_order, segment_sum
    from sampled_sae.kernels.token_topk import keep_rows_
    from sampled_sae.triton_impl.layer import by_feature
    from sampled_sae.triton_impl.products import product
    from sampled_sae.triton_impl.scores import chunked_statistics
    from sampled_sae.triton_impl.stream import stream_batch, stream_token

    x, W = operands(w, torch.bfloat16)
    b = torch.zeros(w.F, device=DEVICE)
    P, n = pool_size(w.k, 4, w.F), w.B * w.k
    scores = column_statistics(x, W, b, "l2")[0]
    members = largest_indices(scores, P)
    z = product(x, W[members].t())
    block, low = torch.empty_like(z), torch.empty_like(z, dtype=torch.bfloat16)
    values, tokens, features, hint = stream_batch(x, W, b, None, None, n)
    slots = by_feature(values, tokens, features, None, w.B, w.F)
    adam = row_adam_calls(W.float(), members)
    return {
        "encoder product": product_of(x, W),
        "score l2, fused": lambda: column_statistics(x, W, b, "l2"),
        "score entropy, fused": lambda: column_statistics(x, W, b, "entropy"),
        "score l2, chunked": lambda: chunked_statistics(x, W, b, "l2", None),
        "pool": lambda: largest_indices(scores, P),
        "pool product": lambda: product(x, W[members].t()),
        "select in the pool": lambda: keep_largest_(block.copy_(z), n, b[members], copy=low),
        "select in the pool, eager": lambda: torch.topk(z.flatten(), n, sorted=False),
        "select in the pool, per token": lambda: keep_rows_(block.copy_(z), w.k, b[members], copy=low),
        "select in all, l=None": lambda: stream_batch(x, W, b, None, None, n, hint),
        "select in all, per token": lambda: stream_token(x, W, b, None, None, w.k),
        "decode entries": lambda: gather_sum(values, features, slots.token_ends, W, None),
        "gradient of values": lambda: entry_dots(x, W, tokens, features, slots.token_ends),
        "order by feature": lambda: feature_order(features, slots.rows),
        "gradient of weights": lambda: segment_sum(
            values, tokens, slots.order, slots.row_ends, x, None, len(slots.rows)
        ),
        **adam,
    }


def row_adam_calls(weight: torch.Tensor, members: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """A decoder's step with the gradient of the pool's rows, in RowAdam's modes."""
    from sampled_sae.kernels.row_adam import row_adam_

    moments = [torch.zeros_like(weight) for _ in range(2)]
    grad = torch.randn(len(members), weight.shape[1], device=DEVICE)
    step = torch.ones((), device=DEVICE)
    last = torch.zeros(len(weight), dtype=torch.int32, device=DEVICE)
    settings = {"factor": None, "lr": 1e-4, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0}
    settings |= {"project": True, "renormalize": True}

    def call(mode: str, last: torch.Tensor | None) -> Callable[[], Any]:
        return lambda: row_adam_(weight, *moments, grad, members, step.add_(1), mode=mode, last=last, **settings)

    return {"row-Adam, dense": call("dense", None), "row-Adam, decayed": call("decayed", last)}


def steps() -> list[Row]:
    """Forward, backward and Adam under bf16 autocast, as a multiple of the encoder product, with peak memory."""
    rows = []
    for w in WORKLOADS:
        x, W = operands(w, torch.bfloat16)
        floor = product_of(x, W)
        for name, rule in RULES.items():
            if pool_size(w.k, rule["l"], w.F) == w.F and rule["l"] is not None:
                continue
            for optimizer, mode in OPTIMIZERS.items():
                if optimizer != "Adam" and name != "l=4":
                    continue
                step, forward_backward = training_step(w, rule, mode)
                took = timed({"product": floor, "step": step, "without optimizer": forward_backward})
                rows.append(
                    {
                        "name": f"{name}, {optimizer}",
                        "workload": w.name,
                        **took["step"],
                        "of product": took["step"]["ms"] / took["product"]["ms"],
                        "without optimizer, of product": took["without optimizer"]["ms"] / took["product"]["ms"],
                        "peak of [B, F]": peak_memory(forward_backward) / (4 * w.B * w.F),
                    }
                )
                del step, forward_backward
                release()
    return rows


def training_step(w: Workload, rule: dict[str, Any], mode: str | None) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """A whole step, and the step without its optimizer."""
    cfg = SampledSAEConfig(d_in=w.d, d_sae=w.F, k=w.k, impl="triton", row_grads=mode is not None, **rule)
    sae = SampledSAE(cfg, device=DEVICE)
    if mode is None:
        optimizer: torch.optim.Optimizer = torch.optim.Adam(sae.parameters(), lr=1e-4, fused=True)
    else:
        optimizer = RowAdam(sae, lr=1e-4, mode=mode)
    x = activations(w, 0).to(DEVICE)

    def forward_backward() -> None:
        optimizer.zero_grad()
        with torch.autocast(DEVICE, torch.bfloat16):
            out = sae(x)
        out.loss.backward()

    def step() -> None:
        forward_backward()
        optimizer.step()

    return step, forward_backward


def peak_memory(function: Callable[[], Any]) -> float:
    """Bytes beyond what is held after the call, gradients included."""
    if DEVICE == "cpu":
        function()
        return 0.0
    function()
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - held


def release() -> None:
    if DEVICE == "cuda":
        torch.cuda.empty_cache()


PARTS: dict[str, Callable[[], list[Row]]] = {
    "correctness": correctness,
    "ceilings": ceilings,
    "kernels": kernels,
    "steps": steps,
}


def machine() -> Row:
    return {
        "device": "rehearsal, no GPU" if REHEARSE else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "date": date.today().isoformat(),
        "command": " ".join(sys.argv[:1] + sys.argv[2:]),
    }


def lines(part: str, rows: list[Row]) -> list[str]:
    shown = [f"{part}:"]
    for row in rows:
        figures = ", ".join(f"{k} {v:.3g}" for k, v in row.items() if isinstance(v, float) and k not in ("p20", "p80"))
        shown.append(f"  {row.get('workload', ''):18} {row['name']:32} {figures or row.get('result', '')}")
    return shown


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for the results")
    parser.add_argument("--only", choices=list(PARTS), nargs="+", default=list(PARTS), help="these parts")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes in the interpreter, without a GPU")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    table, failed = [str(machine())], 0
    for part in args.only:
        start = time.perf_counter()
        try:
            rows = PARTS[part]()
        except Exception:
            failed += 1
            (args.out / f"{part}.error.txt").write_text(traceback.format_exc())
            table.append(f"{part}: FAILED, see {part}.error.txt\n{traceback.format_exc()[-1500:]}")
            continue
        (args.out / f"{part}.json").write_text(json.dumps({**machine(), "rows": rows}, indent=1))
        table += [*lines(part, rows), f"  ({time.perf_counter() - start:.0f} s)"]
    print("\n".join(table))
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
