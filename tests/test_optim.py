"""RowAdam against the calls it stands for."""

import copy

import pytest
import torch
from makers import make_sae, state_of, tokens
from optim_steps import AUX, RULES, assert_close, backward, plain_step

from sampled_sae import RowAdam
from sampled_sae.impl.row_gradients import RowGradient


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("row_grads", [True, False])
@pytest.mark.parametrize(
    "settings",
    [{}, {"clip": None}, {"clip": 0.1, "weight_decay": 0.1}, {"betas": (0.5, 0.7), "eps": 1e-3, "lr": 0.1}],
    ids=str,
)
def test_equals_clip_project_adam_normalise(settings, row_grads, rule):
    settings = {"lr": 0.01, **settings}
    sae = make_sae(row_grads=row_grads, **rule, **AUX)
    other = make_sae(**rule, **AUX)
    for s in (sae, other):
        s.tokens_since_active[::2] = 100
    clip = settings.get("clip", 1.0)
    rows = RowAdam(sae, **settings)
    adam = torch.optim.Adam(other.parameters(), **{k: v for k, v in settings.items() if k != "clip"})
    before = state_of(sae)
    for step in range(5):
        rows.zero_grad()
        adam.zero_grad()
        ours, theirs = backward(sae, step), backward(other, step)
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
        assert (sae.W_enc.grad is None) == row_grads
        norm = torch.linalg.vector_norm(torch.cat([p.grad.flatten() for p in other.parameters()]))
        rows.step()
        plain_step(other, adam, clip)
        torch.testing.assert_close(rows.grad_norm.double(), norm, rtol=1e-6, atol=0)
        assert_close(state_of(sae), state_of(other), rtol=1e-5 if clip else 1e-9, atol=1e-8 if clip else 1e-11)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(sae.cfg.d_sae, dtype=torch.float64))
    assert all(not torch.equal(before[name], p) for name, p in sae.named_parameters())


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_row_gradients_equal_dense_ones_bit_for_bit(rule):
    saes = [make_sae(torch.float32, row_grads=row_grads, **rule, **AUX) for row_grads in (True, False)]
    for sae in saes:
        sae.tokens_since_active[::2] = 100
        backward(sae, 0, torch.float32)
    dense = {name: torch.zeros_like(p) for name, p in saes[0].named_parameters()}
    dense["b_dec"] = saes[0].b_dec.grad
    features = set()
    for part in saes[0].row_grads:
        target = dense[part.name].t() if part.name == "W_enc" else dense[part.name]
        target.index_add_(0, part.features, part.rows.grad)
        features.update(part.features.tolist())
    for name, p in saes[1].named_parameters():
        torch.testing.assert_close(dense[name], p.grad, rtol=1e-6, atol=1e-7)
    assert 0 < len(features) <= saes[0].cfg.d_sae


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_accumulation_over_two_forwards(rule):
    sae, other = make_sae(row_grads=True, **rule), make_sae(**rule)
    rows, adam = RowAdam(sae, lr=0.01, clip=None), torch.optim.Adam(other.parameters(), lr=0.01)
    for step in range(3):
        rows.zero_grad()
        adam.zero_grad()
        for half in range(2):
            for s in (sae, other):
                backward(s, 2 * step + half)
        touched = [p.features for p in sae.row_grads if p.name == "W_enc"]
        assert len(touched) == 2
        assert set(touched[0].tolist()) & set(touched[1].tolist())
        rows.step()
        plain_step(other, adam, None)
        assert_close(state_of(sae), state_of(other))


def test_rows_beside_a_dense_gradient_are_added_to_it():
    sae, other = make_sae(row_grads=True), make_sae()
    rows, adam = RowAdam(sae, lr=0.01, clip=None), torch.optim.Adam(other.parameters(), lr=0.01)
    for s in (sae, other):
        backward(s, 0)
        (s.W_enc.square().sum() + s.b_enc.sum() + s.W_dec.pow(4).sum()).backward()
    rows.step()
    plain_step(other, adam, None)
    assert_close(state_of(sae), state_of(other))


def test_a_dense_gradient_of_any_memory_layout(monkeypatch):
    monkeypatch.setattr("sampled_sae.impl.torch.row_adam.CHUNK_ELEMENTS", 12 * 7)
    sae, other = make_sae(), make_sae()
    rows, adam = RowAdam(sae, lr=0.01, clip=None), torch.optim.Adam(other.parameters(), lr=0.01)
    for s in (sae, other):
        s.W_enc.grad = tokens(12, 96)
        s.W_dec.grad = tokens(12, 96, seed=2).t()
    rows.step()
    plain_step(other, adam, None)
    assert_close(state_of(sae), state_of(other))


def test_weights_of_another_memory_layout(monkeypatch):
    monkeypatch.setattr("sampled_sae.impl.torch.row_adam.CHUNK_ELEMENTS", 12 * 7)
    sae, other = make_sae(), make_sae()
    contiguous = {name: t.clone().contiguous() for name, t in sae.state_dict().items()}
    sae.load_state_dict(contiguous, assign=True)
    assert sae.W_enc.stride() != other.W_enc.stride()
    rows, adam = RowAdam(sae, lr=0.01, clip=None), torch.optim.Adam(other.parameters(), lr=0.01)
    for step in range(3):
        rows.zero_grad()
        adam.zero_grad()
        for s in (sae, other):
            backward(s, step)
        rows.load_state_dict(copy.deepcopy(rows.state_dict()))
        rows.step()
        plain_step(other, adam, None)
        assert_close(state_of(sae), state_of(other))


def test_parameters_without_gradient_stay():
    sae = make_sae(row_grads=True)
    sae.W_enc.requires_grad_(False)
    rows = RowAdam(sae, lr=0.1)
    before = state_of(sae)
    backward(sae, 0)
    assert {part.name for part in sae.row_grads} == {"b_enc", "W_dec"}
    rows.step()
    after = state_of(sae)
    assert torch.equal(before["W_enc"], after["W_enc"])
    assert not torch.equal(before["b_enc"], after["b_enc"])
    rows.zero_grad()
    rows.step()
    assert_close(after, state_of(sae), rtol=0, atol=0)


def test_zero_grad_drops_rows():
    sae = make_sae(row_grads=True)
    rows = RowAdam(sae)
    backward(sae, 0)
    assert all(isinstance(part, RowGradient) for part in sae.row_grads)
    rows.zero_grad()
    assert sae.row_grads == []
    assert sae.b_dec.grad is None


def test_moments_keep_the_weights_memory():
    sae = make_sae(row_grads=True)
    rows = RowAdam(sae)
    backward(sae, 0)
    rows.step()
    for p in sae.parameters():
        for name in ("exp_avg", "exp_avg_sq"):
            assert rows.state[p][name].stride() == p.stride()
            assert rows.state[p][name].dtype == p.dtype


def test_closure():
    sae = make_sae(row_grads=True)
    rows = RowAdam(sae)
    assert rows.step(lambda: backward(sae, 0)) > 0
    assert rows.grad_norm > 0


def test_scheduler_and_lr_by_group():
    sae, other = make_sae(row_grads=True), make_sae()
    rows = RowAdam(sae, lr=0.02, clip=None)
    adam = torch.optim.Adam([{"params": [p], "name": n} for n, p in other.named_parameters()], lr=0.02)
    schedulers = []
    for optimizer in (rows, adam):
        by_name = {group["name"]: group for group in optimizer.param_groups}
        assert set(by_name) == {"W_enc", "b_enc", "W_dec", "b_dec"}
        by_name["b_dec"]["lr"] = 0.5
        by_name["W_dec"]["lr"] = 0.0
        schedulers.append(torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)))
    for step in range(4):
        for s, optimizer, scheduler in zip((sae, other), (rows, adam), schedulers):
            optimizer.zero_grad()
            backward(s, step)
            optimizer.step() if optimizer is rows else plain_step(s, adam, None)
            scheduler.step()
    assert rows.param_groups[0]["lr"] == adam.param_groups[0]["lr"]
    assert_close(state_of(sae), state_of(other))


def test_many_chunks(monkeypatch):
    monkeypatch.setattr("sampled_sae.impl.torch.row_adam.CHUNK_ELEMENTS", 12 * 7)
    sae, other = make_sae(row_grads=True), make_sae()
    rows, adam = RowAdam(sae, lr=0.01, clip=None), torch.optim.Adam(other.parameters(), lr=0.01)
    for step in range(3):
        rows.zero_grad()
        adam.zero_grad()
        for s in (sae, other):
            backward(s, step)
        rows.step()
        plain_step(other, adam, None)
    assert_close(state_of(sae), state_of(other))


def test_16_bit_parameters_follow_adam():
    sae, other = make_sae(torch.bfloat16, row_grads=True), make_sae(torch.bfloat16)
    rows = RowAdam(sae, lr=0.05, clip=None)
    adam = torch.optim.Adam(other.parameters(), lr=0.05, fused=True)
    for step in range(2):
        rows.zero_grad()
        adam.zero_grad()
        for s in (sae, other):
            backward(s, step, torch.bfloat16)
        rows.step()
        plain_step(other, adam, None)
    for p, q in zip(sae.parameters(), other.parameters()):
        assert (p - q).norm() <= 0.02 * q.norm()


def test_the_modules_zero_grad_drops_rows():
    sae = make_sae(row_grads=True)
    backward(sae, 0)
    sae.zero_grad()
    assert sae.row_grads == []


def test_a_step_leaves_the_gradients_as_they_are():
    sae = make_sae(row_grads=True)
    rows = RowAdam(sae, lr=0.0, clip=None)
    backward(sae, 0)
    (sae.W_enc.square().sum() + sae.W_dec.pow(4).sum()).backward()
    norms = []
    for _ in range(2):
        rows.step()
        norms.append(float(rows.grad_norm))
    assert norms[0] == norms[1]


def test_a_wrapped_sae_is_refused():
    with pytest.raises(TypeError, match="sae=Sequential: must be a SampledSAE"):
        RowAdam(torch.nn.Sequential(make_sae()))


def test_moments_need_float32_weights():
    with pytest.raises(ValueError, match=r"moments=torch.bfloat16: needs weights in float32, these are torch.float64"):
        RowAdam(make_sae(), moments=torch.bfloat16)


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"lr": -1.0}, ValueError, "lr=-1.0: must be a finite number >= 0"),
        ({"lr": "fast"}, TypeError, "lr='fast'"),
        ({"eps": float("nan")}, ValueError, "eps=nan"),
        ({"weight_decay": -0.1}, ValueError, "weight_decay=-0.1"),
        ({"betas": (0.9, 1.5)}, ValueError, r"betas\[1\]=1.5"),
        ({"betas": (1.0, 0.9)}, ValueError, r"betas\[0\]=1.0"),
        ({"clip": -1}, ValueError, "clip=-1"),
        ({"mode": "sparse"}, ValueError, "mode='sparse'"),
        ({"moments": torch.float16}, ValueError, "moments=torch.float16"),
    ],
)
def test_bad_settings(settings, error, words):
    with pytest.raises(error, match=words):
        RowAdam(make_sae(), **settings)


@pytest.mark.parametrize("zero_grad", ["optimizer", "module"])
def test_rows_dropped_between_forward_and_backward_are_noticed(zero_grad):
    sae = make_sae(row_grads=True)
    optimizer = RowAdam(sae)
    before = state_of(sae)
    out = sae(tokens(10, 12))
    (optimizer if zero_grad == "optimizer" else sae).zero_grad()
    out.loss.backward()
    with pytest.raises(RuntimeError, match=r"zero_grad\(\) between forward and backward"):
        optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in sae.named_parameters())
    optimizer.zero_grad()
    sae(tokens(10, 12)).loss.backward()
    optimizer.step()
    assert not torch.equal(sae.W_dec, before["W_dec"])
