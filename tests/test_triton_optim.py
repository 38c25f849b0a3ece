"""RowAdam on the kernels: the same steps as without a GPU, and no look at the device."""

import copy

import pytest
import torch

pytest.importorskip("triton")

from makers import make_sae, tokens
from no_host_sync import NoHostSync, allow_late_scalars

from sampled_sae import RowAdam

pytestmark = pytest.mark.gpu
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MODES = ["dense", "lazy", "decayed"]
# A block of the pool, and the whole dictionary; the aux loss adds rows of other features.
RULES = [{"d_sae": 128, "l": 3.0}, {"l": None}]
AUX = {"aux_coefficient": 1 / 32, "dead_after": 20, "aux_pool": 10, "k_aux": 3}


def trained(sae, optimizer, steps, first=0):
    for step in range(first, first + steps):
        optimizer.zero_grad()
        sae(tokens(10, 12, seed=step, dtype=torch.float32).to(DEVICE)).loss.backward()
        optimizer.step()
    return sae


def make(impl, **changes):
    return make_sae(torch.float32, device=DEVICE, impl=impl, **{"d_sae": 48, "row_grads": True, **AUX, **changes})


SETTINGS = [{}, {"clip": 0.1, "weight_decay": 0.1}, {"clip": None}]
# every mode with all settings, every rule with each of both
STEPS = [(mode, RULES[(i + j) % 2], SETTINGS[j]) for i, mode in enumerate(MODES) for j in range(3)]


@pytest.mark.one_in(3)
@pytest.mark.parametrize(("mode", "rule", "settings"), STEPS, ids=str)
def test_steps_equal_those_without_a_gpu(mode, rule, settings):
    saes = [make(impl, **rule) for impl in ("triton", "torch")]
    optimizers = [RowAdam(sae, lr=0.01, mode=mode, **settings) for sae in saes]
    for step in range(4):
        for sae, optimizer in zip(saes, optimizers):
            trained(sae, optimizer, 1, step)
        ours, theirs = (dict(sae.named_parameters()) for sae in saes)
        for name in theirs:
            torch.testing.assert_close(
                ours[name], theirs[name], rtol=1e-4, atol=3e-6, msg=lambda m, n=name: f"{n}: {m}"
            )
        torch.testing.assert_close(optimizers[0].grad_norm, optimizers[1].grad_norm, rtol=1e-4, atol=0)
    assert saes[1](tokens(10, 12, dtype=torch.float32).to(DEVICE)).aux.detach() > 0
    torch.testing.assert_close(saes[0].W_dec.norm(dim=1), torch.ones(saes[0].cfg.d_sae, device=DEVICE))


@pytest.mark.parametrize("mode", MODES)
def test_dense_gradients(mode):
    saes = [make("triton", row_grads=row_grads) for row_grads in (True, False)]
    for sae in saes:
        trained(sae, RowAdam(sae, lr=0.01, mode=mode), 3)
    for p, q in zip(saes[0].parameters(), saes[1].parameters()):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=3e-6)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", MODES)
def test_resume_is_bit_for_bit(mode, moments):
    settings = {"mode": mode, "moments": moments}
    sae = make("triton")
    optimizer = RowAdam(sae, lr=0.01, **settings)
    trained(sae, optimizer, 2)
    fresh = make("triton", seed=9)
    fresh.load_state_dict(sae.state_dict())
    again = RowAdam(fresh, lr=0.5, **settings)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    trained(sae, optimizer, 2, first=2)
    trained(fresh, again, 2, first=2)
    for name, value in sae.state_dict().items():
        assert torch.equal(value, fresh.state_dict()[name]), name


@pytest.mark.parametrize("mode", MODES)
def test_no_step_waits_for_the_device(mode, monkeypatch):
    sae = make("triton")
    monkeypatch.setattr(sae.memory.inputs, "check", lambda x: None)
    allow_late_scalars(monkeypatch)
    optimizer = RowAdam(sae, mode=mode)
    trained(sae, optimizer, 3)
    x = tokens(10, 12, dtype=torch.float32).to(DEVICE)
    sae(x).loss.backward()
    assert len({part.name for part in sae.row_grads}) < len(sae.row_grads), "the aux loss adds parts to be merged"
    with NoHostSync() as mode_:
        optimizer.step()
    assert "top_pool" in mode_.seen


@pytest.mark.parametrize("mode", ["dense", "decayed"])
def test_float32_weights_under_products_in_16_bits(mode):
    """The weights that Adam moves stay in float32; a step is smaller than bfloat16 could show."""
    full, half = make("triton", l=None), make("triton", l=None)
    start = [p.detach().clone() for p in full.parameters()]
    trained(full, RowAdam(full, lr=1e-4, mode=mode), 4)
    with torch.autocast(DEVICE, torch.bfloat16):
        trained(half, RowAdam(half, lr=1e-4, mode=mode), 4)
    for first, p, q in zip(start, full.parameters(), half.parameters()):
        assert q.dtype == torch.float32
        moved = (p - first).norm()
        assert (q - first).norm() > 0.9 * moved
        assert (q - p).norm() < 0.5 * moved
