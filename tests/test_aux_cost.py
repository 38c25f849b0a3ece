"""What the dead-feature loss costs: bounded by aux_pool, and never a tensor [B, F]."""

import copy
from dataclasses import replace

import pytest
import torch
from makers import make_sae, tokens
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from sampled_sae.impl.dead_features import IdleTokens


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that an operation returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor) and t.layout == torch.strided:
                # of its memory, which an expanded tensor has less of than elements
                self.elements = max(self.elements, t.untyped_storage().nbytes() // t.itemsize)
        return out


def with_dead(n_dead, **settings):
    sae = make_sae(torch.float32, aux_coefficient=1.0, dead_after=10_000, row_grads=True, **settings)
    sae.tokens_since_active[:n_dead] = 10_000
    return sae


def flops_of_a_step(n_dead, aux_pool):
    sae = with_dead(n_dead, d_sae=4000, aux_pool=aux_pool)
    with FlopCounterMode(display=False) as counter:
        out = sae(tokens(64, 12, dtype=torch.float32))
        out.loss.backward()
    assert (out.aux > 0) == (n_dead > 0)
    return counter.get_total_flops()


def test_flops_do_not_grow_with_the_dead_features():
    none, some, many = (flops_of_a_step(n_dead, 100) for n_dead in (0, 500, 3900))
    assert none < some == many
    # encode, decode, and three products of the backward pass, with 100 features each
    assert some - none == 5 * 2 * 64 * 12 * 100


@pytest.mark.parametrize("aux_pool", [None, 100])
def test_no_tensor_of_tokens_by_features(aux_pool):
    sae = with_dead(30_000, d_sae=1 << 15, aux_pool=aux_pool, k_aux=4)
    x = tokens(512, 12, dtype=torch.float32)
    with Largest() as largest:
        sae(x).loss.backward()
    assert 0 < largest.elements < 512 * (1 << 15) / 2


@pytest.mark.parametrize("aux_pool", [None, 100])
def test_the_gradient_reaches_dead_features(aux_pool):
    """Which some libraries' aux loss does not: sparsify 1.3.3 leaves the encoder's at zero."""
    sae = with_dead(500, d_sae=4000, aux_pool=aux_pool)
    sae(tokens(64, 12, dtype=torch.float32)).aux.backward()
    for name in ("W_enc", "b_enc", "W_dec"):
        moving = torch.zeros(4000, dtype=torch.bool)
        for part in sae.row_grads:
            if part.name == name and part.rows.grad is not None:
                moving[part.features] |= (part.rows.grad != 0).view(len(part.features), -1).any(1)
        assert 0 < moving[:500].sum() <= (aux_pool or 500)
        assert not moving[500:].any()


class Reads(TorchDispatchMode):
    """How often a value went to the host."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def active(*features):
    """bool [6]."""
    return torch.zeros(6, dtype=torch.bool).index_fill(0, torch.tensor(features), True)


def test_a_feature_is_dead_when_its_count_says_so_and_is_rarely_asked():
    """A bound that has grown to the limit while every feature came back is replaced by the greatest count."""
    idle, counts, expected = IdleTokens(), torch.zeros(6, dtype=torch.int64), []
    with Reads() as reads:
        for t in range(30):
            # each comes back every third token, one of them up to the 18th
            kept = (0, 1, 2) if t % 3 == 0 else (3, 4) if t % 3 == 1 else ((5,) if t < 20 else (0,))
            expected.append(int(counts.max()) >= 5)
            reads.count -= 1
            assert idle.reaches(counts, 5) == expected[-1]
            idle.count_(counts, active(*kept), 1)
    assert sum(expected) == 7
    # where the bound had grown to 5: a third of the steps, and all once the feature is dead
    assert reads.count <= 1 + 30 // 3 + sum(expected)


def test_counts_moved_by_others_and_another_limit_are_seen():
    idle, counts = IdleTokens(), torch.zeros(6, dtype=torch.int64)
    assert not idle.reaches(counts, 5)
    counts[2] = 7
    assert idle.reaches(counts, 5)
    idle.count_(counts, active(0), 1)
    assert idle.reaches(counts, 8)
    assert not idle.reaches(counts, 9)
    idle.count_(counts, active(2), 1)
    assert not idle.reaches(counts, 9)
    assert idle.reaches(counts, 2)
    assert not copy.deepcopy(idle).reaches(counts, 9)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_nothing_is_computed_where_nothing_is_dead(impl, monkeypatch):
    """Though `dead_after` tokens have passed: every feature is kept in every step."""
    if impl == "triton":
        pytest.importorskip("triton")
    sae = make_sae(torch.float32, impl=impl, d_sae=16, k=16, l=None, aux_coefficient=1.0, dead_after=30)
    sae.b_enc.data.fill_(100.0)
    called = []
    parts = sae._parts
    spied = replace(parts, aux_loss=lambda *args: called.append(None) or parts.aux_loss(*args))
    monkeypatch.setattr(type(sae), "_parts", property(lambda self: spied))
    for _ in range(5):
        sae(tokens(12, 12, dtype=torch.float32))
    assert called == []
    sae.tokens_since_active[3] = 30
    sae(tokens(12, 12, dtype=torch.float32))
    assert called == [None]
