"""The benchmarks against the peers: every candidate computes what it is said to; the commands at tiny sizes."""

import json
import sys
from dataclasses import replace

import pytest
import torch

from benchmarks import equal_time
from benchmarks.peers import CANDIDATES, Setup, Weights, installed, ours
from benchmarks.peers import make as made
from benchmarks.peers.candidate import initial_weights
from benchmarks.quality import splice_of
from benchmarks.steps import __main__ as steps
from benchmarks.steps import harness
from benchmarks.steps.experiments import exponent, table
from benchmarks.steps.harness import Harness, Task, fitting
from benchmarks.steps.session import StepSession
from benchmarks.worker import Here, Worker
from benchmarks.workloads import REHEARSAL, Workload
from sampled_sae.bench import activations
from sampled_sae.training.activation_store import ActivationStore

SETUP = Setup(48, 20, 160, 3, lr=1e-3, warm_up=2)
COMPILED = "torch.compile BatchTopK"  # in a process of its own: some of the libraries' imports break the compiler
NAMES = [name for name in CANDIDATES if name != COMPILED and installed(CANDIDATES[name])]


def make(name, setup, weights):
    return made(CANDIDATES[name], setup, weights)


def batches(n):
    return [activations(48, 20, seed) + 0.3 for seed in range(n)]


def uneven_weights():
    """With biases, an encoder that is not the decoder's transpose, and decoder rows of unit norm."""
    weights = initial_weights(SETUP, b_dec=0.3 * torch.ones(20))
    g = torch.Generator().manual_seed(3)
    noise = 0.2 * torch.randn(160, 20, generator=g)
    return weights._replace(W_enc=weights.W_enc + noise, b_enc=0.1 * torch.randn(160, generator=g))


def reference_error(weights, name, x):
    with torch.no_grad():
        return float(weights.sae(SETUP.k, impl="reference", **CANDIDATES[name].rule)(x).mse)


@pytest.mark.parametrize("name", NAMES)
def test_step_computes_the_reference(name):
    """The error of the first step is that of the same weights under the same rule."""
    weights, [x] = uneven_weights(), batches(1)
    before = {field: t.clone() for field, t in weights.tensors().items()}
    candidate = make(name, SETUP, weights)
    assert float(candidate.step(x)) == pytest.approx(reference_error(weights, name, x), rel=1e-5)
    assert all(torch.equal(before[field], t) for field, t in weights.tensors().items())


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
    worker = Worker(StepSession, CANDIDATES[COMPILED], SETUP, 1, ("product",))
    expected = reference_error(initial_weights(SETUP), COMPILED, activations(48, 20, 0))
    assert worker.call("first_error") == pytest.approx(expected, rel=1e-5)


def test_folding_keeps_the_reconstruction():
    weights = uneven_weights()
    factor = torch.linspace(0.5, 2, 160)
    scaled = Weights(
        weights.W_enc / factor[:, None], weights.b_enc / factor, weights.W_dec * factor[:, None], weights.b_dec
    )
    for name, t in weights.tensors().items():
        assert torch.allclose(scaled.folded().tensors()[name], t, atol=1e-6)


@pytest.mark.parametrize("slope", [0.5, 1.0, 2.0])
def test_exponent(slope):
    sizes = [1, 2, 4, 8]
    assert exponent(sizes, [3 * s**slope for s in sizes]) == pytest.approx(slope)
    assert exponent(sizes, [0, 1, 2, 3]) is None


def tasks(*names, workload=REHEARSAL[0]):
    return [Task(name, CANDIDATES[name], workload, "") for name in names]


def test_no_figure_without_the_right_answer(monkeypatch):
    """A candidate with another error than the reference's, and one that is not installed, give their reason only."""
    right, other = "ours, l=4", "SAELens BatchTopK"
    monkeypatch.setattr(harness, "installed", lambda entry: entry.distribution != "sae-lens")
    one = Harness(rounds=1, threads=1, start=Here)
    (row,) = one.measure_group(tasks(right))
    assert row["ratio"] > 0
    expected = StepSession.expected_error
    monkeypatch.setattr(StepSession, "expected_error", lambda session: 1.01 * expected(session))
    rows = {row["candidate"]: row for row in one.measure_group(tasks(right, other))}
    assert rows[other]["reason"] == "not installed"
    assert ", expected " in rows[right]["reason"]
    assert not [name for row in rows.values() for name in row if name.startswith("ratio")]
    shown = table("peer_steps", {"rows": list(rows.values())})
    assert "not installed" in shown
    assert ", expected " in shown


def test_after_a_failure_the_others_go_on(monkeypatch):
    monkeypatch.setattr(
        StepSession, "sample", lambda self: 1 / 0 if self.entry.steps == 2 else {"product": 1, "step": 2}
    )
    broken = replace(ours(l=1.0), steps=2, beside="ours, l=4")
    broken, right = Harness(rounds=1, threads=1, start=Here).measure_group(
        [Task("broken", broken, REHEARSAL[0], ""), *tasks("ours, l=4")]
    )
    assert broken["reason"].startswith("ZeroDivisionError")
    assert right["ratio"] == 2


def test_groups_fit_into_memory():
    wide = Workload("wide", 2048, 768, 65536, 32)
    seven = tasks(*["ours, l=4"] * 7, workload=wide)
    assert list(fitting(seven, 1e12)) == [seven]
    parts = list(fitting(seven, 11e9))
    assert [task for part in parts for task in part] == seven
    assert max(map(len, parts)) == 2
    assert list(fitting(seven, 0)) == [[task] for task in seven]
    pair = [*tasks("ours, l=1"), Task("after", replace(ours(l=1.0), beside="ours, l=1"), wide, "")]
    assert list(fitting([*pair, *pair], 0)) == [pair, pair]


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Runs a benchmark at tiny sizes; returns its result and its table."""

    def run(module, *arguments):
        out = tmp_path / "result.json"
        words = [module.__file__, *map(str, arguments), "--threads", "1", "--out", str(out)]
        monkeypatch.setattr(sys, "argv", words)
        monkeypatch.setenv("TQDM_DISABLE", "1")  # that a command sets it stays among its tests
        module.main()
        result = json.loads(out.read_text())
        assert {"device", "torch", "date", "command"} <= set(result)
        assert result["command"].endswith("--out result.json")
        assert str(tmp_path.parent) not in result["command"]
        return result, out.with_suffix(".md").read_text(encoding="utf-8")

    return run


def test_peer_steps_command(command):
    names = ["ours, l=4", "dictionary_learning BatchTopK", "sparsify TopK"]
    result, shown = command(steps, "peer_steps", "--rehearse", "--here", "--rounds", 2, "--candidates", *names)
    assert [row["candidate"] for row in result["rows"]] == names
    for row in result["rows"]:
        assert row["ratio_p20"] <= row["ratio"] <= row["ratio_p80"]
        assert row["first_error"] == pytest.approx(row["reference_error"], rel=1e-3)
        assert row["candidate"] in shown
    assert result["dictionary-learning"] == "0.1.0"


@pytest.mark.slow
@pytest.mark.usefixtures("forked_workers")
def test_scaling_command(command):
    arguments = ["--rehearse", "--rounds", 1, "--workloads", "k", "--candidates", "l=4"]
    result, shown = command(steps, "scaling", *arguments)
    assert [(row["workload"], row["value"]) for row in result["rows"]] == [("k", 2), ("k", 4)]
    assert "exponent of step" in shown


@pytest.mark.slow
@pytest.mark.usefixtures("forked_workers")
def test_family_command(command):
    names = ["l=4", "l=4, three groups"]
    result, shown = command(steps, "family", "--rehearse", "--rounds", 1, "--candidates", *names)
    plain, nested = result["rows"]
    assert nested["first_error"] == pytest.approx(plain["first_error"], rel=1e-6)
    assert "quotient" not in plain
    assert nested["quotient"] > 0
    assert "with / without groups" in shown


@pytest.mark.slow
def test_before_after_command(command):
    """Against this very revision: both sides begin with the same error."""
    names = ["l=4, before", "l=4"]
    arguments = ["--rehearse", "--rounds", 1, "--revision", "HEAD", "--candidates", *names]
    result, shown = command(steps, "before_after", *arguments)
    before, after = result["rows"]
    assert before["first_error"] == pytest.approx(after["first_error"], rel=1e-6)
    assert "quotient" not in before
    assert after["quotient"] > 0
    assert "after / before" in shown
    assert result["before"]


@pytest.mark.slow
@pytest.mark.usefixtures("forked_workers")
def test_drop_in_command(command, tmp_path):
    """Each library's own loop, with us and alone, comes to the same weights; on activations of its width."""
    ActivationStore.write(tmp_path / "store", torch.randn(300, 16), holdout=60)
    for more, kind in (((), "drawn"), (("--activations", tmp_path / "store", "--steps", 7), "real")):
        result, shown = command(steps, "drop_in", "--rehearse", "--rounds", 2, *more)
        rows = {row["candidate"]: row for row in result["rows"]}
        for name in ("SAELens BatchTopK", "dictionary_learning BatchTopK", "sparsify TopK"):
            alone, ours, autocast = rows[name], rows[f"{name}, with us"], rows[f"{name}, bf16 autocast"]
            assert alone["fvu"] == pytest.approx(ours["fvu"], rel=1e-3), alone
            assert alone["quotient_p20"] <= alone["quotient"] <= alone["quotient_p80"]
            assert autocast["quotient"] > 0
            assert {row["activations"] for row in (alone, ours, autocast)} == {kind}
            assert {row["steps"] for row in (alone, ours, autocast)} == {7} or kind == "drawn"
        assert f"| {name}, with us |" in shown


@pytest.mark.parametrize(("holdout", "reason"), [(20, "has no token rows"), (0, "has no held-out part")])
def test_loss_recovered_needs_a_store_with_text(tmp_path, holdout, reason):
    """Said before a model is loaded, by equal_time.py and quality.py alike."""
    store = ActivationStore.write(tmp_path / "store", torch.randn(60, 5), holdout=holdout)
    with pytest.raises(ValueError, match=reason):
        splice_of("no such model", store, 4)
    with pytest.raises(ValueError, match=reason):
        equal_time.splices("no such model", {"sae": store}, 4)
