"""`sampled_sae.testing` and `sampled-sae check` find the mistakes that they are for."""

import dataclasses
import itertools
import os
import signal
import subprocess
import sys

import pytest
import torch

from sampled_sae import check, cli, reference, testing
from sampled_sae import functional as F
from sampled_sae.impl import interface, layout

RULE = {"k": 3, "l": 4, "score": "l2"}
SHAPE = (33, 17, 252)


def right(x, W_enc, b_enc, W_dec, b_dec):
    codes = F.sampled_topk(x - b_dec, W_enc, b_enc, **RULE)
    return codes, F.decode(codes, W_dec, b_dec)


def reversed_ties(x, W_enc, b_enc, W_dec, b_dec):
    """Ties to the higher token."""
    codes = F.sampled_topk((x - b_dec).flip(0), W_enc, b_enc, **RULE).to_dense().flip(0)
    return codes, codes @ W_dec + b_dec


def no_pool(x, W_enc, b_enc, W_dec, b_dec):
    codes = F.sampled_topk(x - b_dec, W_enc, b_enc, k=3, l=None)
    return codes, F.decode(codes, W_dec, b_dec)


def no_bias(x, W_enc, b_enc, W_dec, b_dec):
    codes = F.sampled_topk(x - b_dec, W_enc, b_enc, **RULE)
    return codes, F.decode(codes, W_dec)


def rounded_values(x, W_enc, b_enc, W_dec, b_dec):
    codes = F.sampled_topk(x - b_dec, W_enc, b_enc, **RULE).to_dense()
    return codes.bfloat16().float(), codes @ W_dec + b_dec


def no_encoder_gradient(x, W_enc, b_enc, W_dec, b_dec):
    codes = F.sampled_topk(x - b_dec, W_enc.detach(), b_enc, **RULE)
    return codes, F.decode(codes, W_dec, b_dec) + 0 * W_enc.sum()


def one_entry_too_few(x, W_enc, b_enc, W_dec, b_dec):
    codes = F.sampled_topk(x - b_dec, W_enc, b_enc, **RULE).to_dense()
    codes = torch.where(codes == codes[codes > 0].min(), 0, codes)
    return codes, codes @ W_dec + b_dec


@pytest.mark.parametrize("maker", testing.MAKERS.values(), ids=testing.MAKERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_right_step_passes(maker, dtype):
    if maker is testing.whole_numbers:
        tensors = maker(*SHAPE, dtype)
    else:
        tensors = testing.separated(maker, SHAPE, dtype, least=3e-6, **RULE)
    assert {name: t.dtype for name, t in tensors.items()} == dict.fromkeys(testing.NAMES, dtype)
    compared = testing.assert_matches_reference(right, tensors, **RULE)
    assert len(compared) == 7
    assert all(c.passed for c in compared)
    assert len(testing.assert_matches_reference(right, tensors, gradients=False, **RULE)) == 2


@pytest.mark.parametrize(
    ("step", "maker", "message"),
    [
        (reversed_ties, testing.whole_numbers, "entries differ; the first: token"),
        (no_pool, testing.normal, "entries differ"),
        (no_bias, testing.normal, "x_hat: error"),
        (rounded_values, testing.normal, "codes: error"),
        (no_encoder_gradient, testing.normal, "grad W_enc: error 1 against float64"),
        (one_entry_too_few, testing.normal, "is dropped"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_wrong_step_fails(step, maker, message):
    separated = maker is not testing.whole_numbers
    tensors = testing.separated(maker, SHAPE, torch.float32, **RULE) if separated else maker(*SHAPE)
    with pytest.raises(AssertionError, match=message):
        testing.assert_matches_reference(step, tensors, **RULE)


def test_values_of_whole_numbers_must_be_exact():
    def step(*tensors):
        codes, x_hat = right(*tensors)
        return codes.to_dense() * (1 + 1e-7), x_hat

    with pytest.raises(AssertionError, match="whole numbers must come out exactly"):
        testing.assert_matches_reference(step, testing.whole_numbers(*SHAPE), **RULE)


def test_inputs_that_leave_doubt_are_refused():
    tensors = testing.whole_numbers(*SHAPE)
    tensors["b_dec"][0] += 0.5
    with pytest.raises(ValueError, match="rounding alone could change what is kept"):
        testing.assert_matches_reference(right, tensors, **RULE)
    with pytest.raises(ValueError, match=r"shape=\(33, 17, 252\): no problem with a margin above 0.9"):
        testing.separated(testing.normal, SHAPE, torch.float32, least=0.9, **RULE)


def test_a_scale_is_part_of_the_rule():
    scale = torch.rand(252, generator=torch.Generator().manual_seed(0)) + 0.5

    def step(x, W_enc, b_enc, W_dec, b_dec):
        codes = F.sampled_topk(x - b_dec, W_enc, b_enc, scale=scale, **RULE)
        return codes, F.decode(codes, W_dec, b_dec)

    tensors = testing.separated(testing.normal, SHAPE, torch.float32, scale.double(), **RULE)
    testing.assert_matches_reference(step, tensors, scale=scale, **RULE)
    with pytest.raises(AssertionError):
        testing.assert_matches_reference(right, tensors, scale=scale, **RULE)


def test_makers_make_what_they_say():
    dead = testing.exact_activations(testing.dead_columns(*SHAPE))
    assert not dead[:, 1::4].any()
    assert not dead[:, 2::4].any()
    assert dead[:, ::4].any()
    heavy = testing.heavy_tails(*SHAPE)
    norms = heavy["x"].norm(dim=1)
    assert norms.max() > 20 * norms.min()
    whole = testing.exact_activations(testing.whole_numbers(*SHAPE))
    assert len(whole.unique()) < 50
    assert torch.equal(whole, whole.round())
    assert not torch.equal(testing.normal(*SHAPE, seed=1)["x"], testing.normal(*SHAPE, seed=2)["x"])


def test_check_passes_here(capsys):
    assert cli.main(["check", "--impl", "torch", "--quick"]) == 0
    out = capsys.readouterr().out
    assert "| torch | step l=None token | heavy tails | bfloat16 |" in out
    assert "FAILED" not in out
    done, _, total = out.splitlines()[-1].split()[:3]
    assert done == total


@pytest.mark.slow
def test_check_as_a_user_runs_it():
    """Without a GPU it has to put Triton into its interpreter by itself, before Triton is imported.

    Some rows are enough: the next test sees all of them.
    """
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "sampled_sae", "check", "--impl", "triton", "--quick"]
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
    with subprocess.Popen(command, env=env, **how) as process:
        lines = list(itertools.islice(process.stdout, 12))
        os.killpg(process.pid, signal.SIGKILL)
    assert lines[0].startswith("CPU, Triton in its interpreter")
    assert sum(line.startswith("| triton |") and line.endswith("| ok |\n") for line in lines) == 9, "".join(lines)


@pytest.mark.slow
def test_check_passes_in_the_interpreter(monkeypatch, capsys):
    pytest.importorskip("triton")
    monkeypatch.setattr(check, "SHAPES", ((1, 3, 9), (35, 6, 70)))
    assert cli.main(["check", "--impl", "triton", "--quick", "--quiet"]) == 0
    out = capsys.readouterr().out
    assert "FAILED" not in out
    passed, _, total = out.splitlines()[-1].split()[:3]
    assert int(passed) == int(total) > 100


@pytest.mark.parametrize(
    ("name", "wrong", "found"),
    [
        ("column_scores", lambda f: lambda *a, **k: f(*a, **k) * 1.01, "column_scores l2"),
        ("candidate_pool", lambda f: lambda scores, size: f(scores, size).flip(0), "candidate pool"),
        ("decode", lambda f: lambda codes, W, b, impl: f(codes, W, b, impl=impl) + 0.01, "x_hat"),
    ],
)
def test_check_exits_1_where_something_is_wrong(name, wrong, found, monkeypatch, capsys):
    monkeypatch.setattr(check.F, name, wrong(getattr(F, name)))
    assert cli.main(["check", "--impl", "torch", "--quick", "--quiet"]) == 1
    out = capsys.readouterr().out
    assert "FAILED" in out
    assert found in out


def test_check_finds_a_wrong_optimizer(monkeypatch):
    parts = interface.implementation("torch")

    def wrong(weight, *rest):
        parts.row_adam_(weight, *rest)
        if weight.dtype == torch.float32:
            weight.mul_(1 + 1e-5)

    changed = dataclasses.replace(parts, row_adam_=wrong)
    monkeypatch.setattr(layout, "implementation", lambda name: changed)
    failed = {row.op for row in check.run_checks("torch", "cpu", quick=True) if row.failure}
    assert failed == {"RowAdam dense", "RowAdam lazy", "RowAdam decayed"}


def test_check_reports_what_raises(monkeypatch):
    monkeypatch.setattr(reference, "aux_loss", lambda *a, **k: 1 / 0)
    rows = [row for row in check.run_checks("torch", "cpu", quick=True) if row.failure]
    assert rows
    assert all(row.op.startswith("aux loss") and "ZeroDivisionError" in row.failure for row in rows)
