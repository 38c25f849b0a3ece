"""The benchmarks against the peers: every candidate computes what it is said to; the commands at tiny sizes."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from benchmarks.scaling import exponent
from makers import write_store

from benchmarks import peer_steps
from benchmarks.drop_in import LIBRARIES
from benchmarks.peers import CANDIDATES, Setup, Weights, initial_weights, make
from benchmarks.worker import Worker, WorkerError
from benchmarks.workloads import REHEARSAL, Workload, activations

ROOT = Path(__file__).parents[2]
WORKLOAD = Workload("test", 48, 20, 160, 3)
SETUP = Setup(48, 20, 160, 3, lr=1e-3, warm_up=2)
COMPILED = "torch.compile BatchTopK"  # in a process of its own: some of the libraries' imports break the compiler
NAMES = [name for name in CANDIDATES if name != COMPILED and peer_steps.installed(name)]


def batches(n):
    return [activations(WORKLOAD, seed) + 0.3 for seed in range(n)]


def uneven_weights():
    """With biases, an encoder that is not the decoder's transpose, and decoder rows of unit norm."""
    weights = initial_weights(SETUP, b_dec=0.3 * torch.ones(20))
    g = torch.Generator().manual_seed(3)
    noise = 0.2 * torch.randn(160, 20, generator=g)
    return replace(weights, W_enc=weights.W_enc + noise, b_enc=0.1 * torch.randn(160, generator=g))


def reference_error(weights, name, x):
    with torch.no_grad():
        return float(weights.sae(SETUP.k, impl="reference", **CANDIDATES[name].rule)(x).mse)


@pytest.mark.parametrize("name", NAMES)
def test_step_computes_the_reference(name):
    """The error of the first step is that of the same weights under the same rule."""
    weights, [x] = uneven_weights(), batches(1)
    before = {field: t.clone() for field, t in asdict(weights).items()}
    candidate = make(name, SETUP, weights)
    assert float(candidate.step(x)) == pytest.approx(reference_error(weights, name, x), rel=1e-5)
    assert all(torch.equal(before[field], t) for field, t in asdict(weights).items())


@pytest.mark.parametrize("name", [n for n in NAMES if "sparsify" not in n])
def test_weights_are_those_that_train(name):
    """After some steps, the next step's error is that of the weights that are handed out."""
    candidate = make(name, SETUP, uneven_weights())
    *past, x = batches(4)
    for batch in past:
        candidate.step(batch)
    weights = candidate.weights()
    expected = reference_error(weights, name, x)
    assert float(candidate.step(x)) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", ["sparsify TopK", "sparsify TopK, Adam"])
def test_sparsify_weights_are_those_that_it_saves(name):
    """Of the schedule-free optimizer the averaged ones; asking for them does not disturb the training."""
    asked, left_alone = (make(name, SETUP, uneven_weights()) for _ in range(2))
    *past, x = batches(5)
    for batch in past:
        errors = [float(candidate.step(batch)) for candidate in (asked, left_alone)]
        weights = asked.weights()
        assert errors[0] == pytest.approx(errors[1], rel=1e-5)
    if asked.schedule_free:
        asked.optimizer.eval()
    with torch.no_grad():
        error = float((x - asked.sae(x).sae_out).square().sum(1).mean())
    assert reference_error(weights, name, x) == pytest.approx(error, rel=1e-5)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "sparsify TopK"])
def test_every_candidate_learns(name):
    candidate = make(name, replace(SETUP, lr=1e-2), uneven_weights())
    [x] = batches(1)
    errors = [float(candidate.step(x)) for _ in range(12)]
    assert errors[-1] < 0.95 * errors[0]


def test_same_rule_same_training():
    """dictionary_learning, plain PyTorch and ours take the same steps with Adam at the same learning rates."""
    names = ["ours, l=None (BatchTopK)", "dictionary_learning BatchTopK", "eager PyTorch BatchTopK"]
    candidates = [make(name, replace(SETUP, warm_up=0), uneven_weights()) for name in names]
    for x in batches(4):
        errors = [float(candidate.step(x)) for candidate in candidates]
        assert errors == pytest.approx([errors[0]] * 3, rel=1e-4)


@pytest.mark.slow
def test_compiled_step_computes_the_reference():
    worker = Worker(peer_steps.StepSession, COMPILED, WORKLOAD, "cpu", 1)
    expected = reference_error(initial_weights(SETUP), COMPILED, activations(WORKLOAD, 0))
    assert worker.call("first_error") == pytest.approx(expected, rel=1e-5)


def test_folding_keeps_the_reconstruction():
    weights = uneven_weights()
    factor = torch.linspace(0.5, 2, 160)
    scaled = Weights(
        weights.W_enc / factor[:, None], weights.b_enc / factor, weights.W_dec * factor[:, None], weights.b_dec
    )
    for name, t in asdict(weights).items():
        assert torch.allclose(asdict(scaled.folded())[name], t, atol=1e-6)


def test_weights_survive_their_file(tmp_path):
    weights = uneven_weights()
    weights.save(tmp_path / "w.safetensors")
    loaded = Weights.load(tmp_path / "w.safetensors")
    assert all(torch.equal(asdict(loaded)[name], t) for name, t in asdict(weights).items())


@pytest.mark.parametrize("slope", [0.5, 1.0, 2.0])
def test_exponent(slope):
    sizes = [1, 2, 4, 8]
    assert exponent(sizes, [3 * s**slope for s in sizes]) == pytest.approx(slope)
    assert exponent(sizes, [0, 1, 2, 3]) is None


class Session:
    """For the tests of Worker."""

    def __init__(self, start):
        self.start = start

    def add(self, x):
        return self.start + x

    def die(self):
        os._exit(3)


@pytest.mark.slow
def test_worker():
    worker = Worker(Session, 2)
    assert worker.call("add", 3) == 5
    with pytest.raises(WorkerError, match="TypeError: unsupported operand"):
        worker.call("add", "x")
    dying = Worker(Session, 2)
    with pytest.raises(WorkerError, match="died, exit code 3"):
        dying.call("die")
    with pytest.raises(WorkerError, match="missing 1 required positional argument"):
        Worker(Session)


def test_no_figure_without_the_right_answer(monkeypatch):
    """A candidate with another error than the reference's, and one that is not installed, give their reason only."""
    ours, other = "ours, l=4", "SAELens BatchTopK"
    monkeypatch.setattr(peer_steps, "installed", lambda name: name != other)
    expected = peer_steps.expected_errors
    monkeypatch.setattr(peer_steps, "expected_errors", lambda *a: {n: 1.01 * e for n, e in expected(*a).items()})
    rows = {row["candidate"]: row for row in peer_steps.measure(REHEARSAL[0], [ours, other], 1, "cpu", 1, 2.0**34)}
    assert rows[other] == {"candidate": other, "reason": "not installed"}
    assert "on the first batch, the reference has" in rows[ours]["reason"]
    assert "ratio" not in rows[ours]
    table = peer_steps.markdown_table({"workloads": [{**asdict(REHEARSAL[0]), "rows": list(rows.values())}]})
    assert "not installed" in table
    assert "on the first batch" in table


def test_groups_fit_into_memory():
    names = list("abcdefg")
    wide = Workload("wide", 2048, 768, 65536, 32)
    assert list(peer_steps.groups(names, wide, 1e12)) == [names]
    parts = list(peer_steps.groups(names, wide, 11e9))
    assert [name for part in parts for name in part] == names
    assert max(map(len, parts)) == 2
    assert list(peer_steps.groups(names, wide, 0)) == [[name] for name in names]


def command(script, tmp_path, *arguments):
    """Runs a benchmark at tiny sizes; returns its result and its table."""
    out = tmp_path / "result.json"
    words = [sys.executable, f"benchmarks/{script}", *map(str, arguments), "--threads", "1", "--out", str(out)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    result = json.loads(out.read_text())
    assert {"device", "torch", "date", "command"} <= set(result)
    assert result["command"].endswith("--out result.json")
    assert str(tmp_path.parent) not in result["command"]
    return result, out.with_suffix(".md").read_text()


@pytest.mark.slow
def test_peer_steps_command(tmp_path):
    names = ["ours, l=4", "dictionary_learning BatchTopK", "sparsify TopK"]
    result, table = command("peer_steps.py", tmp_path, "--rehearse", "--rounds", 2, "--candidates", *names)
    rows = result["workloads"][0]["rows"]
    assert [row["candidate"] for row in rows] == names
    for row in rows:
        assert row["ratio_p20"] <= row["ratio"] <= row["ratio_p80"]
        assert row["first_error"] == pytest.approx(row["reference_error"], rel=1e-3)
        assert row["candidate"] in table
    assert result["dictionary-learning"] == "0.1.0"


@pytest.mark.slow
def test_drop_in_command(tmp_path):
    """Each library's own loop, with us and alone, comes to the same weights."""
    result, table = command("drop_in.py", tmp_path, "--rehearse", "--rounds", 2)
    assert [row["library"] for row in result["rows"]] == list(LIBRARIES)
    for row in result["rows"]:
        assert row["alone"]["fvu"] == pytest.approx(row["with us"]["fvu"], rel=1e-3), row
        assert row["speedup_p20"] <= row["speedup"] <= row["speedup_p80"]
        assert row["library"] in table


@pytest.mark.slow
def test_scaling_command(tmp_path):
    result, table = command("scaling.py", tmp_path, "--rehearse", "--rounds", 1, "--axes", "k")
    assert [(row["axis"], row["value"]) for row in result["rows"]] == [("k", 2)] * 3 + [("k", 4)] * 3
    assert {row["rule"] for row in result["exponents"]} == {row["rule"] for row in result["rows"]}
    assert "exponent of step" in table


@pytest.mark.slow
def test_equal_time_command(tmp_path):
    names = ["ours, l=None (BatchTopK)", "SAELens BatchTopK", "ours, l=4, decayed, pool_every=4"]
    store = write_store(tmp_path / "store")
    small = ["--features", 64, "--k", 3, "--batch-size", 16, "--marks", 0.05, 0.1, "--model", "none"]
    result, table = command("equal_time.py", tmp_path, store, *small, "--candidates", *names)
    assert [row["seconds"] for row in result["rows"]] == [0.05] * 3 + [0.1] * 3
    for row in result["rows"]:
        assert row["steps"] > 0
        assert 0 < row["fvu"] < 10
        assert row["candidate"] in table
