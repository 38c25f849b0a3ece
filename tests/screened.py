"""Encoders whose scores and searches a screen may get wrong, and what it may change in them."""

import torch
from hypothesis import strategies as st
from makers import tokens

from sampled_sae import RowAdam
from sampled_sae.impl.interface import implementation
from sampled_sae.testing import whole_numbers

TORCH = implementation("torch")


def low_rank(x, W, b, g):
    left, right = torch.randn(len(x), 2, generator=g), torch.randn(2, x.shape[1], generator=g)
    return left @ right + 1e-3 * x, W, b


def huge_token(x, W, b, g):
    x[0] *= 1e4
    return x, W, b


def huge_feature(x, W, b, g):
    W[-1] *= 1e4
    return x, W, b


def heavy_tails(x, W, b, g):
    return x * torch.randn(len(x), 1, generator=g).exp() ** 3, W * torch.randn(len(W), 1, generator=g).exp() ** 3, b


def twins(x, W, b, g):
    """Columns that differ by less than bfloat16 can tell."""
    W[1::2] = W[: len(W) // 2 * 2 : 2] * (1 + 1e-4 * torch.rand(len(W) // 2, 1, generator=g))
    return x, W, b


def tiny(x, W, b, g):
    return 1e-23 * x, W, 1e-23 * b


def no_signal(x, W, b, g):
    return torch.zeros_like(x), W, b


def on_the_bound(x, W, b, g):
    """Weights and activations that rounding moves as far as it can, all of one sign."""
    return (1 + 2.0**-8 - 2.0**-20) * torch.ones_like(x), (1 + 2.0**-8 - 2.0**-20) * W.sign(), b


SCORED = [("l2", "top"), ("l2_squared", "top"), ("uniform", "top"), ("l2", "sample"), ("l2_squared", "sample")]
KINDS = [on_the_bound, None, low_rank, huge_token, huge_feature, heavy_tails, twins, tiny, no_signal]


@st.composite
def encoders(draw, most_features=300):
    """(x, W, b, scale, tolerance): how far float32 rounding may move an activation, per unit of ||x|| ||w||."""
    B, d, n = draw(st.integers(1, 40)), draw(st.integers(1, 24)), draw(st.integers(2, most_features))
    seed = draw(st.integers(0, 10**6))
    if draw(st.booleans()):
        # exact in float32, not in bfloat16; ties abound
        t = whole_numbers(B, min(d, 8), n, seed=seed, largest=draw(st.sampled_from([1, 40, 700])))
        return t["x"], t["W_enc"].t().contiguous(), t["b_enc"], None, 0.0
    g = torch.Generator().manual_seed(seed)
    x, W, b = torch.randn(B, d, generator=g), torch.randn(n, d, generator=g), 0.3 * torch.randn(n, generator=g)
    kind = draw(st.sampled_from(KINDS))
    if kind is not None:
        x, W, b = kind(x, W, b, g)
    scale = torch.rand(n, generator=g) + 0.5 if draw(st.booleans()) else None
    return x, W, b, scale, 1e-6


def both(x, W, b, scale):
    """The encoder without and with a screen."""
    seen = [TORCH.encoder(x, W, b, None, scale, screen=name) for name in ("off", "bf16")]
    assert seen[0].operands.screen is None
    return seen


def activations(x, W, b, scale):
    a = torch.relu(x.double() @ W.double().t() + b.double())
    return a if scale is None else a * scale.double()


def rounding(case):
    """[B, F]: how far float32 may be from the activations."""
    x, W, b, scale, tolerance = case
    size = x.double().norm(dim=1)[:, None] * W.double().norm(dim=1) + b.double().abs()
    return tolerance * (size if scale is None else size * scale)


def assert_same_pairs(case, off, seen, threshold=None, by_token=False):
    """Equal, but for pairs that float32 rounding alone may swap: as close to the cut, or to that of their token."""
    ours, theirs = off.to_dense() != 0, seen.to_dense() != 0
    differ = ours != theirs
    if not differ.any():
        return
    assert case[4] > 0, "whole numbers must give the same pairs"
    a, slack = activations(*case[:4]), rounding(case)
    if by_token:
        cut = torch.where(ours | theirs, a, torch.inf).amin(1, keepdim=True)
        assert ((a - cut).abs() <= 2 * slack + 2 * slack.amax(1, keepdim=True))[differ].all()
        return
    cut = a[ours | theirs].min() if threshold is None else threshold
    assert ((a[differ] - cut).abs() <= 2 * slack[differ] + 2 * slack[ours | theirs].max()).all()


def assert_same_pool(case, off, seen):
    """Members int64 [P] of the top of l2, but for columns whose norms tie to float32's rounding."""
    differ = set(off.tolist()) ^ set(seen.tolist())
    assert len(off) == len(seen)
    if differ:
        assert case[4] > 0, "whole numbers must give the same pool"
        exact = activations(*case[:4]).norm(dim=0)
        cut = exact[off].min()
        assert all(abs(exact[j] - cut) <= 1e-5 * cut + rounding(case)[:, j].norm() for j in differ)


def assert_same_members(case, rule, off, seen):
    """Of two pools by one rule, the second through a screen."""
    if rule.score == "uniform":
        assert torch.equal(off, seen)
    elif rule.pool == "top":
        assert_same_pool(case, off, seen)
    else:
        # keys that tie to float32's rounding
        assert len(set(off.tolist()) ^ set(seen.tolist())) <= 2


def assert_same_steps(make, steps):
    """A training without and with a screen keeps the same pairs in each step, from weights equal up to rounding.

    make: gives the SAE, by its screen. Returns what the last step gave.
    """
    saes = {screen: make(screen) for screen in ("off", "bf16")}
    optimizers = {screen: RowAdam(sae, lr=1e-2) for screen, sae in saes.items()}
    for step in range(steps):
        saes["bf16"].load_state_dict(saes["off"].state_dict())
        kept = []
        for screen, sae in saes.items():
            out = sae(tokens(16, 12, seed=step).float().to(sae.W_enc.device))
            assert (sae.memory.looks is None) == (screen == "off")
            out.loss.backward()
            optimizers[screen].step()
            optimizers[screen].zero_grad()
            kept.append(out)
        assert torch.equal(*(out.codes.to_dense() != 0 for out in kept))
        for name in ("loss", "aux"):
            torch.testing.assert_close(*(getattr(out, name) for out in kept), rtol=1e-5, atol=1e-6)
    return kept[0]
