"""Rounded weights that are kept from step to step: always `W.bfloat16()`, and never rounded as a whole again."""

import copy
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from makers import make_sae, tokens
from torch.utils._python_dispatch import TorchDispatchMode

from sampled_sae import RowAdam

pytestmark = pytest.mark.gpu
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
D, F = 12, 48
# the first selects in a block, which reads few rows of W_dec; the second by entries, which read all
RULES = {3.0: ["W_enc"], None: ["W_enc", "W_dec"]}
AUX = {"aux_coefficient": 1 / 32, "dead_after": 20, "aux_pool": 10, "k_aux": 3}


class WeightsRounded(TorchDispatchMode):
    """Counts conversions of all of W_enc or W_dec to 16 bits."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        whole = isinstance(out, torch.Tensor) and out.dtype == torch.bfloat16 and out.shape == (F, D)
        self.count += whole and "copy" in func._schema.name
        return out


def make(l=None, seed=0, **changes):
    return make_sae(torch.float32, seed, DEVICE, impl="triton", d_sae=F, l=l, row_grads=True, **{**AUX, **changes})


def train(sae, optimizer, steps, first=0):
    for step in range(first, first + steps):
        optimizer.zero_grad()
        with torch.autocast(DEVICE, torch.bfloat16):
            out = sae(tokens(10, D, seed=step, dtype=torch.float32).to(DEVICE))
        out.loss.backward()
        optimizer.step()


def weights(sae):
    """W_enc and W_dec, features first."""
    return {"W_enc": sae.W_enc.detach().t(), "W_dec": sae.W_dec.detach()}


def copies(sae):
    return {name: sae.memory.rounded.following(name, W) for name, W in weights(sae).items()}


@pytest.mark.parametrize("mode", ["dense", "decayed"])
@pytest.mark.parametrize("l", RULES)
def test_steps_are_the_same_and_round_no_weights(mode, l):
    kept, fresh = make(l), make(l)
    optimizers = [RowAdam(sae, lr=0.01, mode=mode, keep_rounded=sae is kept) for sae in (kept, fresh)]
    train(kept, optimizers[0], 1)
    with WeightsRounded() as rounded:
        train(kept, optimizers[0], 2, first=1)
    assert rounded.count == 0
    train(fresh, optimizers[1], 1)
    with WeightsRounded() as rounded:
        train(fresh, optimizers[1], 2, first=1)
    assert rounded.count == 2 * len(RULES[l])
    for (name, p), q in zip(kept.named_parameters(), fresh.parameters()):
        assert torch.equal(p, q), name
    found = copies(kept)
    assert [name for name, values in found.items() if values is not None] == RULES[l]
    assert all(torch.equal(found[name], weights(kept)[name].bfloat16()) for name in RULES[l])


def halved(sae):
    with torch.no_grad():
        sae.W_enc.mul_(0.5)


def moved_by_torch(sae):
    sae.zero_grad()
    sae.W_enc.grad = torch.ones_like(sae.W_enc)
    torch.optim.Adam([sae.W_enc], lr=0.1).step()


def moved_by_another_implementation(sae):
    sae.zero_grad()
    config, sae.cfg = sae.cfg, replace(sae.cfg, impl="torch")
    sae.W_enc.grad = torch.ones_like(sae.W_enc)
    RowAdam(sae, lr=0.1, keep_rounded=True).step()
    sae.cfg = config


def loaded(sae):
    sae.load_state_dict(make(seed=9).state_dict())


def on_other_memory(sae):
    sae.W_enc.data = (0.5 * sae.W_enc.detach().t()).t()


CHANGES = [halved, moved_by_torch, moved_by_another_implementation, loaded, on_other_memory]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_weights_that_something_else_has_moved_are_rounded_again(change):
    sae = make()
    train(sae, RowAdam(sae, keep_rounded=True), 1)
    assert copies(sae)["W_enc"] is not None
    change(sae)
    assert copies(sae)["W_enc"] is None
    train(sae, RowAdam(sae, keep_rounded=True), 1)
    for name, W in weights(sae).items():
        assert torch.equal(copies(sae)[name], W.bfloat16())


def test_decoder_rows_of_several_layers_are_rounded_in_each_step():
    """They are normalised after the kernel."""
    sae = make(d_in=D // 2, layers=2)
    train(sae, RowAdam(sae, lr=0.1, keep_rounded=True), 2)
    with torch.autocast(DEVICE, torch.bfloat16):
        sae(tokens(10, D, dtype=torch.float32).to(DEVICE))
    for name, W in weights(sae).items():
        assert torch.equal(copies(sae)[name], W.bfloat16())


@pytest.mark.parametrize("made", [copy.deepcopy, lambda sae: sae.to(torch.float64).to(torch.float32)])
def test_copies_and_conversions_begin_without(made):
    sae = make()
    train(sae, RowAdam(sae, keep_rounded=True), 1)
    assert None not in copies(sae).values()
    assert set(copies(made(sae)).values()) == {None}


def test_nothing_is_kept_unasked_or_of_float32():
    sae = make()
    train(sae, RowAdam(sae), 1)
    assert set(copies(sae).values()) == {None}
    optimizer = RowAdam(sae, keep_rounded=True)
    sae(tokens(10, D, dtype=torch.float32).to(DEVICE)).loss.backward()
    optimizer.step()
    assert set(copies(sae).values()) == {None}


def test_a_graph_from_before_a_step_is_refused():
    """Its backward pass would read weights that are no longer those of its forward pass."""
    sae = make()
    optimizer = RowAdam(sae, keep_rounded=True)
    with torch.autocast(DEVICE, torch.bfloat16):
        loss = sae(tokens(10, D, dtype=torch.float32).to(DEVICE)).loss
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
