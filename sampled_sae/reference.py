"""The specification: docs/method.md in plain dense PyTorch, its steps 1 to 8 numbered as there.

Every other path computes this function. B tokens, d = d_in, F = d_sae; x [B, d], W_enc [d, F], b_enc [F],
W_dec [F, d], b_dec [d]. Any float dtype; 16-bit inputs are computed in float32. Gradients by autograd; step 7
says what they are. It stores [B, F] several times and is meant to be read and compared with, not to be used for
training.

Sources: scores, pool and selection from arXiv 2508.21324, BatchTopK from arXiv 2412.06410, TopK and the
dead-feature loss from arXiv 2406.04093, nested reconstructions from arXiv 2503.17547, selection by decoder norms over
several layers from arXiv 2504.02922; docs/method.md lists the readings that are ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype


def encode(x: Tensor, W_enc: Tensor, b_enc: Tensor, scale: Tensor | None = None) -> Tensor:
    """Step 1: a = relu(x W_enc + b_enc) * scale, [B, F]; x is centred by the caller."""
    dtype = compute_dtype(x)
    a = torch.relu(x.to(dtype) @ W_enc.to(dtype) + b_enc.to(dtype))
    return a if scale is None else a * scale.to(dtype)


def column_scores(a: Tensor, score: str = "l2") -> Tensor:
    """Step 2: s_j of column j of a [B, F]: one score a feature, [F]."""
    a = a.detach()
    if score == "l2":
        return a.square().sum(0).sqrt()
    if score == "l2_squared":
        return a.square().sum(0)
    if score == "entropy":
        total = a.sum(0)
        p = a / torch.where(total > 0, total, 1)
        entropy = -torch.special.xlogy(p, p).sum(0)
        # A column that fires ranks above one that never does, even with all its mass on one token.
        return torch.where(total > 0, entropy.clamp_min(torch.finfo(a.dtype).tiny), 0)
    if score == "uniform":
        return (a > 0).any(0).to(a.dtype)
    raise ValueError(f"score={score!r}")


def candidate_pool(scores: Tensor, size: int, pool: str = "top", generator: torch.Generator | None = None) -> Tensor:
    """Step 3: the pool C of `size` features, int64 ascending. Ties go to the lower index."""
    if pool == "sample":
        device = None if generator is None else generator.device
        u = torch.rand(scores.shape, dtype=torch.float64, generator=generator, device=device)
        scores = scores.double().log() - (-u.to(scores.device).log()).log()
    order = torch.sort(scores, descending=True, stable=True).indices
    return order[:size].sort().values


def select_batch(a: Tensor, n: int) -> Tensor:
    """Step 4, by batch: mask [B, F] of the n largest positive entries; ties to the lower token, then feature."""
    order = torch.sort(a.detach().flatten(), descending=True, stable=True).indices[:n]
    mask = torch.zeros(a.numel(), dtype=torch.bool, device=a.device)
    mask[order] = True
    return mask.view(a.shape) & (a > 0)


def select_token(a: Tensor, k: int) -> Tensor:
    """Step 4, by token: mask [B, F] of the k largest positive entries of each; ties to the lower feature."""
    order = torch.sort(a.detach(), dim=1, descending=True, stable=True).indices[:, :k]
    return torch.zeros_like(a, dtype=torch.bool).scatter(1, order, True) & (a > 0)


def sampled_topk(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    *,
    k: float,
    l: float | None,
    score: str = "l2",
    pool: str = "top",
    select: str = "batch",
    scale: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Steps 1 to 4: dense codes c, [B, F]."""
    a = encode(x, W_enc, b_enc, scale)
    members = None
    if l is not None:
        size = min(a.shape[1], math.ceil(round(k * l, 9)))
        members = candidate_pool(column_scores(a, score), size, pool, generator)
    return select_inside(a, members, k, select)


def select_inside(a: Tensor, members: Tensor | None, k: float, select: str) -> Tensor:
    """Step 4: of a [B, F] the selected entries in the columns of the pool, all others 0."""
    candidates = a.detach()
    if members is not None:
        inside = torch.zeros(a.shape[1], dtype=torch.bool, device=a.device).index_fill(0, members, True)
        candidates = torch.where(inside, candidates, 0)
    if select == "batch":
        mask = select_batch(candidates, round(len(a) * k))
    else:
        mask = select_token(candidates, int(k))
    return torch.where(mask, a, 0)


def above(a: Tensor, threshold: Tensor | float) -> Tensor:
    """Inference: of activations a [B, F] those strictly above the threshold, 0-dim or [F]; all others 0."""
    return torch.where(a > threshold, a, 0)


def gated(z: Tensor, b_gate: Tensor, gain: Tensor, b_mag: Tensor) -> Tensor:
    """Inference, gated: relu(z * gain + b_mag) where z + b_gate > 0, all others 0; z = x W_enc, gain = exp(r_mag)."""
    return torch.where(z + b_gate > 0, torch.relu(z * gain + b_mag), 0)


def decode(c: Tensor, W_dec: Tensor, b_dec: Tensor | None = None) -> Tensor:
    """Step 5: x_hat = c W_dec + b_dec, [B, d]."""
    x_hat = c @ W_dec.to(c.dtype)
    return x_hat if b_dec is None else x_hat + b_dec.to(c.dtype)


def transcode(c: Tensor, W_dec: Tensor, b_dec: Tensor, x: Tensor, W_skip: Tensor) -> Tensor:
    """Step 5 of a transcoder with a skip: c W_dec + b_dec + x W_skip, [B, d_out]; x [B, d_in], W_skip [d_in, d_out]."""
    return decode(c, W_dec, b_dec) + x.to(c.dtype) @ W_skip.to(c.dtype)


def norm_sums(W_dec: Tensor, layers: int) -> Tensor:
    """Of a crosscoder's W_dec [F, L d]: the sum over the L layers of the norms of each feature's rows, [F]."""
    return W_dec.view(len(W_dec), layers, -1).norm(dim=2).sum(1)


def crosscode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor, *, k: float, l: float | None, **rule: Any
) -> tuple[Tensor, Tensor]:
    """Steps 1 to 5 of a crosscoder: codes c [B, F] and x_hat [B, L, d] of x [B, L, d], whatever the decoder's norms.

    W_enc [L d, F], W_dec [F, L d], b_dec [L d]: those of an SAE on the layers one behind the other. Entries are
    selected by a_j times `norm_sums`, a scale, and decoded without it. Training keeps the sums at 1: c is then both.
    """
    scale = norm_sums(W_dec, x.shape[1]).detach()
    c = sampled_topk(x.flatten(1), W_enc, b_enc, k=k, l=l, scale=scale, **rule) / scale
    return c, decode(c, W_dec, b_dec).view(x.shape)


def decode_levels(c: Tensor, W_dec: Tensor, b_dec: Tensor | None, groups: Sequence[int]) -> Tensor:
    """Step 5 of a Matryoshka SAE: the reconstructions by the first g features, for each g of `groups`: [B, G, d]."""
    return torch.stack([decode(c[:, :g], W_dec[:g], b_dec) for g in groups], dim=1)


def nested_loss(x: Tensor, levels: Tensor) -> Tensor:
    """Step 6 of a Matryoshka SAE: the mean over levels [B, G, d] of their reconstruction losses."""
    return torch.stack([reconstruction_loss(x, x_hat) for x_hat in levels.unbind(1)]).mean()


def reconstruction_loss(x: Tensor, x_hat: Tensor) -> Tensor:
    """Step 6: mean over tokens of ||x - x_hat||^2, summed over d, and of a crosscoder over its layers."""
    return (x - x_hat).square().sum(-1).mean()


def residual_variance(residual: Tensor, x: Tensor) -> Tensor:
    """Step 6: mean over tokens of ||e - mean(e)||^2, 0-dim; 0 where rounding alone explains it.

    residual: e [B, d], the difference of x [B, d] and a reconstruction, and rounded as they are.
    """
    variance = (residual - residual.mean(0)).square().sum(-1).mean()
    size = residual.square().sum(-1).mean() + x.square().sum(-1).mean()
    return torch.where(variance > (64 * torch.finfo(residual.dtype).eps) ** 2 * size, variance, 0)


def aux_loss(
    x: Tensor,
    x_hat: Tensor,
    x_in: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    W_dec: Tensor,
    dead: Tensor,
    *,
    k_aux: int,
    aux_pool: int | None = None,
    scores: Tensor | None = None,
) -> Tensor:
    """Step 6: dead features (bool [F]) reconstruct the residual; 0 with none dead or no variance to explain.

    x_in [B, d] is the encoder's input (x - b_dec, or x). Gradient reaches W_enc, b_enc and W_dec alone.
    """
    residual = (x - x_hat).detach()
    members = dead.nonzero().squeeze(1)
    denominator = residual_variance(residual, x)
    if len(members) == 0 or denominator == 0:
        return residual.new_zeros(())
    if aux_pool is not None and len(members) > aux_pool:
        assert scores is not None
        members = members[candidate_pool(scores[members], aux_pool)]
    a = encode(x_in.detach(), W_enc[:, members], b_enc[members])
    c = torch.where(select_token(a, k_aux), a, 0)
    return reconstruction_loss(residual, decode(c, W_dec[members])) / denominator


def gradients(
    x: Tensor,
    x_hat: Tensor,
    x_in: Tensor,
    c: Tensor,
    W_enc: Tensor,
    W_dec: Tensor,
    *,
    centred: bool = True,
    scale: Tensor | None = None,
) -> dict[str, Tensor]:
    """Step 7: the gradients of `reconstruction_loss` by parameter, as autograd gives them.

    x_in [B, d] is the encoder's input and c [B, F] the codes; `centred` says whether x_in is x - b_dec.
    """
    g = 2 / len(x) * (x_hat - x)
    dc = torch.where(c > 0, g @ W_dec.T, 0)
    if scale is not None:
        dc = dc * scale
    through_the_input = (dc @ W_enc.T).sum(0) if centred else 0
    return {"W_enc": x_in.T @ dc, "b_enc": dc.sum(0), "W_dec": c.T @ g, "b_dec": g.sum(0) - through_the_input}


@torch.no_grad()
def update(
    weights: dict[str, Tensor],
    gradients: dict[str, Tensor],
    moments: dict[str, tuple[Tensor, Tensor]],
    step: int,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    clip: float | None = 1.0,
    layers: int = 1,
) -> None:
    """Step 8, in place: clip, project, Adam, unit decoder rows; of a crosscoder with `layers` L the norms of a
    feature's rows add up to 1. `step` counts from 1; `moments` starts empty."""
    norm = torch.stack([g.norm() for g in gradients.values()]).norm()
    factor = 1.0 if clip is None else (clip / (norm + 1e-6)).clamp(max=1.0)
    for name, g in gradients.items():
        w, g = weights[name], g * factor
        if name == "W_dec":
            unit = torch.nn.functional.normalize(w.view(len(w), layers, -1), dim=2).view(w.shape)
            g = g - (g * unit).sum(1, keepdim=True) / layers * unit
        g = g + weight_decay * w
        m, v = moments.get(name, (torch.zeros_like(g), torch.zeros_like(g)))
        m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g.square()
        moments[name] = m, v
        w -= lr * m / (1 - betas[0] ** step) / ((v / (1 - betas[1] ** step)).sqrt() + eps)
        if name == "W_dec":
            w /= norm_sums(w, layers).unsqueeze(1).clamp_min(1e-12)
