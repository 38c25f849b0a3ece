"""Small SAEs of every rule, and tokens for them."""

from __future__ import annotations

import torch

from sampled_sae.inference.config import InferenceConfig
from sampled_sae.inference.inference_sae import InferenceSAE
from sampled_sae.inference.tensors import shapes_of

D, F, K = 12, 96, 4


def settings_of(rule, **changes):
    """Fields of an `InferenceConfig` of that rule."""
    return {"d_in": D, "d_sae": F, "rule": rule, **({"k": K} if rule == "topk" else {}), **changes}


def tensors_of(cfg, dtype=torch.float64, seed=0):
    """Normally distributed tensors; about a fifth of the activations are above the thresholds."""
    g = torch.Generator().manual_seed(seed)
    made = {name: torch.randn(shape, generator=g, dtype=torch.float64) for name, shape in shapes_of(cfg).items()}
    made["W_enc"] *= cfg.d_in**-0.5
    for name in ("r_mag", "b_dec", "b_enc", "b_gate", "b_mag"):
        if name in made:
            made[name] *= 0.3
    if "threshold" in made:
        made["threshold"] = 0.8 + 0.3 * made["threshold"]
    return {name: t.to(dtype) for name, t in made.items()}


def make(rule, n_tokens=23, dtype=torch.float64, seed=0, **changes):
    """(an SAE of that rule, tokens [n, d_in] of the same dtype)."""
    cfg = InferenceConfig(**settings_of(rule, **changes))
    g = torch.Generator().manual_seed(seed + 1)
    x = 2 * torch.randn(n_tokens, cfg.d_in, generator=g, dtype=torch.float64)
    return InferenceSAE(cfg, tensors_of(cfg, dtype, seed)), x.to(dtype)


def make_whole(rule, device="cpu", dtype=torch.float32, seed=0, **changes):
    """(an SAE of small whole numbers, weights in `dtype`; float32 tokens of them): sums are exact, ties abound."""
    cfg = InferenceConfig(**settings_of(rule, **changes))
    g = torch.Generator().manual_seed(seed)
    made = {name: torch.randint(-2, 3, s, generator=g).float() for name, s in shapes_of(cfg).items()}
    made |= {name: torch.zeros_like(t) for name, t in made.items() if name == "r_mag"}
    made |= {name: 2 * t for name, t in made.items() if name == "threshold"}
    x = torch.randint(-2, 3, (9, cfg.d_in), generator=g).float()
    tensors = {name: t.to(device, dtype if name.startswith("W") else torch.float32) for name, t in made.items()}
    return InferenceSAE(cfg, tensors), x.to(device)
