"""Shared makers: problems, their float64 answers, and a run of one implementation with its gradients."""

from __future__ import annotations

import torch

from sampled_sae import SampledSAE, SampledSAEConfig, reference, testing
from sampled_sae import functional as F


def problem(B, d, n_features, dtype=torch.float64, seed=0):
    """x [B, d], W_enc [d, F], b_enc [F], W_dec [F, d], b_dec [d], normal."""
    return testing.normal(B, d, n_features, dtype, seed)


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
