"""What each part of a visit to a GPU does about failures, wrong results and time; in the interpreter, tiny sizes."""

import dataclasses
import os
import time
from functools import cached_property

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.kernels import race

from benchmarks.gpu_parts import compiling, kernels, peers, score, steps, summary, tunable, tuning, visit
from benchmarks.gpu_parts.visit import Visit
from benchmarks.workloads import REHEARSAL
from sampled_sae.kernels import configs

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="runs the kernels in the interpreter")


class OnGpu(Visit):
    """Not a rehearsal, and still on the CPU."""

    device, workloads = "cpu", (*REHEARSAL, dataclasses.replace(REHEARSAL[0], name="another"))

    def __post_init__(self):
        self.log = []
        super().__post_init__()

    @cached_property
    def head(self):
        return {}

    def release(self):
        self.log.append("release")

    def add(self, *rows):
        super().add(*rows)
        self.log += [row.get("name", "") for row in rows]


@pytest.fixture
def on_gpu(tmp_path, monkeypatch):
    for part in (kernels, peers, score, steps, tuning):
        monkeypatch.setattr(part, "compile_all", lambda *_: None, raising=False)
    return OnGpu("part", tmp_path, 1000, False)


def test_what_fails_leaves_its_reason_and_the_rest_goes_on(on_gpu, monkeypatch):
    def raced(visit, name, *_):
        if name == "score l2":
            raise RuntimeError("out of resource:\nshared memory")
        return [{"operation": name, "ms": 1.0}]

    monkeypatch.setattr(kernels, "raced", raced)
    monkeypatch.setattr(kernels, "GPU_KERNELS", REHEARSAL)
    kernels.run(on_gpu)
    bad = [row for row in on_gpu.rows if "ms" not in row]
    assert {row["left out"] for row in bad} == {"FAILED: RuntimeError: out of resource: shared memory"}
    assert [(row["operation"], row["form"]) for row in bad] == [("score l2", "all"), ("score l2", "torch.compile")]
    assert len(on_gpu.rows) == 2 * len(kernels.OPERATIONS)
    assert "score l2 all rehearsal and 1 more: FAILED: RuntimeError" in summary.without_figures(on_gpu.rows)[0]


def test_nothing_is_begun_without_time(on_gpu, monkeypatch):
    monkeypatch.setattr(OnGpu, "left", 0.5)
    for part in (score, steps, peers, tuning):
        part.run(on_gpu)
    assert on_gpu.rows
    assert {row["note"] for row in on_gpu.rows} <= {"no time left", "not installed"}


def test_after_a_failed_capture_nothing_is_captured_or_released(on_gpu, monkeypatch):
    def captured(*_):
        on_gpu.log.append("capture")
        raise RuntimeError("operation not permitted when stream is capturing")

    def row(visit, case, row, *_):
        return [{**row, "ms": 1.0}]

    monkeypatch.setattr(steps, "captured", captured)
    monkeypatch.setattr(steps, "our_row", row)
    monkeypatch.setattr(steps, "eager_row", row)
    steps.run(on_gpu)
    assert on_gpu.log[-2:] == ["capture", "l=4, Adam, graph"]
    assert on_gpu.log.count("capture") == 1
    plain = [r for r in on_gpu.rows if "ms" in r]
    assert len(plain) == len(on_gpu.rows) - 1
    assert {r["workload"] for r in plain} == {w.name for w in on_gpu.workloads}


def test_every_optimizer_takes_the_same_whole_step():
    case = steps.Case(REHEARSAL[0], "cpu")
    dense, rows = (steps.Step(case.made, steps.RULES["l=4"], mode) for mode in (None, "dense"))
    for _ in range(3):
        x = next(case.batches)
        dense(x)
        rows(x)
    for name, p in dense.sae.named_parameters():
        assert p.grad is None
        assert not torch.equal(p, dict(case.made.named_parameters())[name])
        torch.testing.assert_close(p, dict(rows.sae.named_parameters())[name], rtol=1e-3, atol=1e-4)


def test_batches_change():
    several = visit.batches(REHEARSAL[0], "cpu")
    shown = [next(several) for _ in range(2 * visit.BATCHES)]
    assert not torch.equal(shown[0], shown[1])
    assert shown[0] is shown[visit.BATCHES]


@pytest.mark.parametrize("name", ["ours, l=4", "eager PyTorch BatchTopK"])
def test_a_wrong_first_error_gets_no_figure(tmp_path, monkeypatch, name):
    made = peers.make

    def wrong(*args):
        candidate = made(*args)
        step = candidate.step
        monkeypatch.setattr(candidate, "step", lambda x: 1.01 * step(x), raising=False)
        return candidate

    monkeypatch.setattr(peers, "CANDIDATES", {name: peers.CANDIDATES[name]})
    one = Visit("peers", tmp_path, 10, True)
    peers.run(one)
    monkeypatch.setattr(peers, "make", wrong)
    peers.run(one)
    right, bad = one.rows
    assert right["ms"] > 0
    assert "on the first batch, the reference has" in bad["note"]
    assert "ms" not in bad


@pytest.mark.parametrize("kind", ["written", "summed", "l2", "entropy"])
def test_scores_are_checked_at_all_features(kind):
    x, W = torch.randn(9, 16), torch.randn(1000, 16)
    z = x.double() @ W.double().t()
    a = z.relu()
    results = {"written": z.t(), "summed": z, "l2": a.square().sum(0, keepdim=True)}
    results["entropy"] = torch.stack((a.sum(0), torch.xlogy(a, a).sum(0)))
    exact, result = score.exact_results(x, W), results[kind].float()
    score.check(f"form {kind}", result, exact)
    (result.t() if kind != "written" else result)[700:] *= 1.1
    with pytest.raises(ValueError, match="allowed are"):
        score.check(f"form {kind}", result, exact)


def made_in_turn(count):
    """Calls 0, 1, ... of which the third fails."""
    made_in_turn.made = made = []

    def call(i):
        made.append(i)
        if i == 2:
            raise KeyError("no such tile")

    return [(str(i), lambda i=i: call(i)) for i in range(count)]


class Sent(list):
    send = list.append


def test_compiling_shares_the_calls_and_outlives_failures():
    later, sent = time.time() + 60, Sent()
    compiling.compile_some(sent, made_in_turn, [(7,)], 1, 2, later)
    assert made_in_turn.made == [1, 3, 5]
    assert not sent
    compiling.compile_some(sent, made_in_turn, [("no count",), (7,)], 0, 2, later)
    assert made_in_turn.made == [0, 2, 4, 6]
    (case, why), (call, no_tile) = sent
    assert (case, call) == ("no count", "2")
    assert why.startswith("FAILED: TypeError")
    assert no_tile == "FAILED: KeyError: 'no such tile'"
    compiling.compile_some(sent, made_in_turn, [(7,)], 0, 2, time.time() - 1)
    assert made_in_turn.made == []


def fatal(how):
    """In a process of its own: a failure, a crash, or no end."""
    calls = {"fail": lambda: {}["tile"], "crash": lambda: os._exit(9), "hang": lambda: time.sleep(600)}
    yield how, calls[how]


@pytest.mark.parametrize(
    ("how", "note"),
    [
        ("fail", "FAILED: KeyError: 'tile'"),
        ("crash", "a process died with exit code 9"),
        ("hang", "a process was stopped: its last compilation took too long"),
    ],
)
def test_a_compiling_process_may_fail_crash_or_hang(tmp_path, monkeypatch, how, note):
    monkeypatch.setattr(compiling, "COMPILERS", 1)
    monkeypatch.setattr(compiling, "PATIENCE", 1)
    monkeypatch.setattr(OnGpu, "left", 4 if how == "hang" else 120)
    one = OnGpu("part", tmp_path, 0, False)
    compiling.compile_all(one, fatal, [(how,)])
    assert [row["note"] for row in one.rows] == [note]


def test_driver_version(tmp_path, monkeypatch):
    file = tmp_path / "version"
    monkeypatch.setattr(visit, "DRIVER", file)
    assert visit.driver() is None
    for text in (
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Thu Jan 1 00:00:00 UTC 2025",
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build",
    ):
        file.write_text(text + "\nGCC version:  gcc version 12.2.0\n")
        assert visit.driver() == "570.86.15"


def test_whoever_takes_the_time_itself_finds_the_gpu_at_rest(monkeypatch):
    inputs = kernels.Inputs(REHEARSAL[0], "cpu", torch.float32, "torch")
    one = race.Race("pool l=4", inputs, kernels.OPERATIONS["pool l=4"](inputs), None, small=True)
    log = []
    monkeypatch.setattr(one, "operation", dataclasses.replace(one.operation, prepare=lambda: log.append("prepare")))
    monkeypatch.setattr(race, "on_gpu", lambda device: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append("rest"))
    monkeypatch.setattr(race, "timed", lambda call, device, queued: log.append("queued" if queued else "timed") or 0)
    one.round()
    assert log == ["prepare", "queued"] * len(one.calls)
    log.clear()
    one.round(without="ours")
    assert log == [*["prepare", "timed"] * (len(one.calls) - 1), "prepare", "rest"]


def all_tunables():
    return tunable.tunables(REHEARSAL[0], "cpu", torch.float32)


def test_tunables_put_their_values_in_use_and_back():
    for one in all_tunables():
        reads = {
            "COLUMN_SCORES": lambda: configs.COLUMN_SCORES["interpreter", 32][0],
            "FOLD": lambda: tunable.column_scores.FOLD,
            "CHUNK_SCORES": lambda: configs.chunk_scores_config("interpreter"),
            "CHUNK_FILTER": lambda: configs.chunk_filter_config("interpreter"),
            "SEGMENT_SUM": lambda: configs.segment_sum_config("interpreter", torch.float32),
            "ENTRY_DOTS": lambda: configs.entry_dots_config("interpreter", torch.float32),
            "RADIX": lambda: configs.radix_config("interpreter"),
            "ROWS": lambda: configs.ROWS["interpreter"][0],
            "ROW_ADAM": lambda: configs.ROW_ADAM["interpreter"][0],
        }
        read = reads[one.table]
        assert read() is one.current
        for value in one.candidates:
            with one.using(value):
                assert read() is value
        assert read() is one.current


def test_a_configuration_with_another_result_is_refused(tmp_path):
    one = next(t for t in all_tunables() if t.table == "ROWS")
    good, call = one.candidates[0], one.call

    def wrong():
        out = call()
        if configs.ROWS["interpreter"][0] is good:
            out[0, 0] += 1
        return out

    one.call = wrong
    rows = tuning.tried(one, REHEARSAL[0], Visit("tuning", tmp_path, 10, True))
    assert [(row["current"], row.get("note")) for row in rows] == [(True, None), (False, "another result")]
    one.call, one.exact = call, False
    rows = tuning.tried(one, REHEARSAL[0], Visit("tuning", tmp_path, 10, True))
    assert all("ms" in row for row in rows)


def test_advice_takes_the_mean_over_sizes():
    same = {"table": "T", "key": "k", "d": 1, "F": 1}

    def row(config, B, ratio):
        return {**same, "config": config, "B": B, "of current": ratio, "current": config == "now"}

    rows = [row("now", 1, 1.0), row("now", 2, 1.0), row("new", 1, 0.5), row("new", 2, 1.0), row("once", 1, 0.1)]
    assert tuning.advice("T", "k", rows) == "T[k]: new  # 0.707 of now"
    assert tuning.advice("T", "k", rows[:2]) == "T[k]: now  # stays"
