"""RowAdam's modes and moments: what happens to rows without gradient, and to 16-bit moments."""

import copy

import pytest
import torch
from makers import make_sae, state_of
from optim_steps import AUX, RULES, assert_close, backward

from sampled_sae import RowAdam
from sampled_sae.impl.torch.row_adam import stochastically_rounded


def rows_touched(sae):
    """bool [F] by parameter: whether the row has a gradient other than zero."""
    touched = {name: torch.zeros(sae.cfg.d_sae, dtype=torch.bool) for name in ("W_enc", "b_enc", "W_dec")}
    for part in sae.row_grads:
        moving = part.rows.grad != 0
        touched[part.name][part.features] |= moving.any(1) if moving.dim() > 1 else moving
    return touched


def as_rows(name, t):
    return t.t() if name == "W_enc" else t


@pytest.mark.parametrize(
    ("mode", "settings"),
    [("lazy", {}), ("lazy", {"clip": 0.1, "weight_decay": 0.1}), ("decayed", {}), ("decayed", {"clip": 0.1})],
    ids=str,
)
@pytest.mark.parametrize("rule", [*RULES, {"l": None, **AUX}], ids=str)
def test_rows_without_gradient_stand_still(mode, rule, settings, monkeypatch):
    """And the others take a step of Adam's, from moments that stood still too, or that decayed in every step."""
    monkeypatch.setattr("sampled_sae.impl.torch.row_adam.CHUNK_ELEMENTS", 12 * 7)
    sae = make_sae(row_grads=True, **rule)
    sae.tokens_since_active[::2] = 100
    twin = copy.deepcopy(sae)
    rows, adam = RowAdam(sae, lr=0.01, mode=mode, **settings), RowAdam(twin, lr=0.01, **settings)
    idle = 0
    for step in range(4):
        rows.zero_grad()
        backward(sae, step)
        touched, before = rows_touched(sae), state_of(sae)
        twin.load_state_dict(sae.state_dict())
        twin.row_grads = copy.deepcopy(sae.row_grads)
        twin.b_dec.grad = sae.b_dec.grad
        if mode == "lazy" and step:
            for p, q in zip(sae.parameters(), twin.parameters()):
                adam.state[q].update({n: rows.state[p][n].clone() for n in ("exp_avg", "exp_avg_sq")})
        adam.step()
        rows.step()
        after, expected = state_of(sae), state_of(twin)
        torch.testing.assert_close(after["b_dec"], expected["b_dec"])
        for name, moving in touched.items():
            old, new, wanted = (as_rows(name, state[name]) for state in (before, after, expected))
            assert torch.equal(new[~moving], old[~moving])
            torch.testing.assert_close(new[moving], wanted[moving], rtol=1e-5, atol=1e-8)
            assert moving.any()
            idle += int((~moving).sum())
    assert idle > 0


def test_lazy_is_sparse_adam():
    """torch's adds eps before bias correction, hence one so small."""
    sae = make_sae(row_grads=True, apply_b_dec_to_input=False)
    weight = torch.nn.Parameter(sae.W_enc.detach().t().clone())
    rows = RowAdam(sae, lr=0.01, eps=1e-20, mode="lazy", clip=None)
    sparse = torch.optim.SparseAdam([weight], lr=0.01, eps=1e-20)
    for step in range(4):
        rows.zero_grad()
        backward(sae, step)
        part = next(part for part in sae.row_grads if part.name == "W_enc")
        moving = (part.rows.grad != 0).any(1)
        weight.grad = torch.sparse_coo_tensor(
            part.features[moving][None], part.rows.grad[moving], weight.shape, is_coalesced=True
        )
        rows.step()
        sparse.step()
        torch.testing.assert_close(sae.W_enc.detach().t(), weight.detach(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("mode", ["dense", "lazy", "decayed"])
def test_modes_take_dense_gradients_too(mode):
    """Rows that are zero in a dense gradient are rows without one."""
    saes = [make_sae(row_grads=row_grads) for row_grads in (True, False)]
    optimizers = [RowAdam(sae, lr=0.01, mode=mode) for sae in saes]
    for step in range(3):
        for sae, optimizer in zip(saes, optimizers):
            optimizer.zero_grad()
            backward(sae, step)
            optimizer.step()
    assert_close(*map(state_of, saes))


@pytest.mark.parametrize("mode", ["dense", "lazy", "decayed"])
def test_16_bit_moments(mode):
    """A path near that of full moments, resumed with the moments that were saved."""
    full, half = (make_sae(torch.float32, row_grads=True, l=None) for _ in range(2))
    start = state_of(full)
    optimizers = [RowAdam(full, lr=0.01, mode=mode), RowAdam(half, lr=0.01, mode=mode, moments=torch.bfloat16)]
    for step in range(20):
        for sae, optimizer in zip((full, half), optimizers):
            optimizer.zero_grad()
            backward(sae, step, torch.float32)
            optimizer.step()
        if step == 10:
            saved = copy.deepcopy(optimizers[1].state_dict())
            optimizers[1] = RowAdam(half, lr=0.5, mode=mode, moments=torch.bfloat16)
            optimizers[1].load_state_dict(saved)
            for i, p in enumerate(half.parameters()):
                for name, value in saved["state"][i].items():
                    assert optimizers[1].state[p][name].dtype == value.dtype
                    assert torch.equal(optimizers[1].state[p][name], value)
            assert saved["state"][0]["exp_avg"].dtype == torch.bfloat16
    for name, value in state_of(half).items():
        moved = (state_of(full)[name] - start[name]).norm()
        assert 0 < (value - state_of(full)[name]).norm() < 0.15 * moved, name


def test_rounding_is_right_on_average():
    generator = torch.Generator().manual_seed(0)
    value = torch.tensor([1.001, -3.3, 1e-20, 0.0, 5e-3])
    many = stochastically_rounded(value.repeat(40_000, 1), torch.bfloat16, generator)
    torch.testing.assert_close(many.float().mean(0), value, rtol=1e-4, atol=0)
    assert (many.float() - value).abs().max() < 2**-7 * 3.3
    assert torch.equal(many[:, 3], torch.zeros(40_000, dtype=torch.bfloat16))
