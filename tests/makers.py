"""Shared makers: problems, their float64 answers, and a run of one implementation with its gradients."""

from __future__ import annotations

import torch

from sampled_sae import SampledSAE, SampledSAEConfig, reference
from sampled_sae import functional as F

NAMES = ("x", "W_enc", "b_enc", "W_dec", "b_dec")


def problem(B, d, n_features, dtype=torch.float64, seed=0):
    """x [B, d], W_enc [d, F], b_enc [F], W_dec [F, d], b_dec [d], normal."""
    g = torch.Generator().manual_seed(seed)
    shapes = ((B, d), (d, n_features), (n_features,), (n_features, d), (d,))
    widths = (1.0, d**-0.5, 0.3, d**-0.5, 0.3)
    made = (w * torch.randn(s, generator=g, dtype=torch.float64) for s, w in zip(shapes, widths))
    return {name: t.to(dtype) for name, t in zip(NAMES, made)}


def integers(B, d, n_features, dtype=torch.float32, seed=0, largest=2):
    """The same with small whole numbers: every sum is exact in any order, and ties abound."""
    g = torch.Generator().manual_seed(seed)
    shapes = ((B, d), (d, n_features), (n_features,), (n_features, d), (d,))
    made = (torch.randint(-largest, largest + 1, s, generator=g).to(dtype) for s in shapes)
    return dict(zip(NAMES, made))


def separated(B, d, n_features, dtype, rule, scale=None):
    """A problem quantised to `dtype` whose pool and selection leave no doubt at float32 rounding."""
    for seed in range(200):
        tensors = problem(B, d, n_features, dtype, seed)
        exact = {name: t.double() for name, t in tensors.items()}
        a = reference.encode(exact["x"] - exact["b_dec"], exact["W_enc"], exact["b_enc"], scale)
        if margin(a, rule) > 2e-5:
            return tensors
    raise AssertionError("no separated problem among 200 seeds")


def margin(a, rule):
    """Smallest relative gap between what is kept and what is dropped, in the pool and in the selection."""
    gaps = []
    size = a.shape[1] if rule["l"] is None else min(a.shape[1], -int(-rule["k"] * rule["l"] // 1))
    if size < a.shape[1]:
        scores = reference.column_scores(a, rule["score"])
        ordered = scores.sort(descending=True).values
        gaps.append(ordered[size - 1 : size + 1])
        a = a[:, reference.candidate_pool(scores, size)]
    if rule["select"] == "batch":
        ordered = a.flatten().sort(descending=True).values
        n = round(a.shape[0] * rule["k"])
        gaps.append(ordered[n - 1 : n + 1])
    elif rule["k"] < a.shape[1]:
        k = int(rule["k"])
        gaps += list(a.sort(dim=1, descending=True).values[:, k - 1 : k + 1])
    smallest = min(((g[0] - g[1]) / g[0] for g in gaps if len(g) == 2 and g[0] > 0), default=1.0)
    positive = a[a > 0]
    return min(float(smallest), float(positive.min()) if len(positive) else 1.0)


def leaves(tensors):
    return {name: t.clone().requires_grad_() for name, t in tensors.items()}


def run(tensors, impl, generator_seed=None, scale=None, **rule):
    """(codes, x_hat, loss, gradients by name) of one step through the functional interface."""
    t = leaves(tensors)
    generator = None if generator_seed is None else torch.Generator().manual_seed(generator_seed)
    codes = F.sampled_topk(
        t["x"] - t["b_dec"], t["W_enc"], t["b_enc"], scale=scale, generator=generator, impl=impl, **rule
    )
    x_hat = F.decode(codes, t["W_dec"], t["b_dec"], impl=impl)
    loss = reference.reconstruction_loss(t["x"], x_hat)
    loss.backward()
    return codes, x_hat.detach(), loss.detach(), {name: leaf.grad for name, leaf in t.items()}


def assert_same_entries(ours, theirs):
    """The same places, in the same order."""
    assert ours.shape == theirs.shape
    assert torch.equal(ours.tokens, theirs.tokens)
    assert torch.equal(ours.features, theirs.features)


def make_sae(dtype=torch.float64, seed=0, **changes):
    """A small SAE with every parameter away from its initial value."""
    settings = {"d_in": 12, "d_sae": 96, "k": 4, "l": 3.0, "aux_coefficient": 0.0, **changes}
    sae = SampledSAE(SampledSAEConfig(**settings), dtype=dtype)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in sae.parameters():
            noise = 0.2 * torch.randn(p.shape, generator=g, dtype=torch.float64)
            p.add_(noise.to(dtype))
    sae.normalize_decoder()
    return sae


def tokens(*shape, dtype=torch.float64, seed=1):
    """Activations of the given shape."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def gradients(sae):
    return {name: p.grad.clone() for name, p in sae.named_parameters()}
