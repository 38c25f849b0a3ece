"""SAELens' auxiliary loss, token by token: the k largest activations among the dead features explain the residual.

Unlike that of docs/method.md it takes activations before the relu, so that negative ones take part where few are
positive, is not divided by the residual's variance, and its gradient reaches b_dec.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...codes import Entries
from ...impl.encoder import Encoder
from ...impl.interface import implementation

DENSE_PER_K = 6
# on a CPU a chunk stays in its cache; a GPU's is large enough that its launches do not count
CHUNK_ELEMENTS = 1 << 20
GPU_CHUNK_ELEMENTS = 1 << 25


def dead_reconstruction_loss(encoder: Encoder, W_dec: Tensor, residual: Tensor, members: Tensor, k: int) -> Tensor:
    """mean over tokens of ||residual - e_hat||^2, e_hat the reconstruction by `members` alone, 0-dim, at least float32.

    Equivalent to `a = (x - b_dec) @ W[members].T + b[members]; e_hat = keep_top_k(a, by=a * scale) @ W_dec[members]`.

    Args:
        W_dec: [F, d].
        residual: [B, d], no gradient.
        members: int64 [D], the dead features, ascending.
        k: entries a token, 1 <= k <= D, those of the largest activation times the encoder's scale.
    """
    x, W, b, b_dec, scale, rows, _ = encoder
    scale = None if scale is None else scale[members]
    with torch.autocast(x.device.type, enabled=False):
        # the torch form computes in float32 on every device
        exact = implementation("torch").encoder(x, W, b, b_dec, None, rows)
        reconstruct = by_products if len(members) <= DENSE_PER_K * k else by_entries
        e_hat = reconstruct(exact, W_dec, members, scale, k)
        return (residual.to(e_hat.dtype) - e_hat).square().sum(-1).mean()


def by_products(encoder: Encoder, W_dec: Tensor, members: Tensor, scale: Tensor | None, k: int) -> Tensor:
    """e_hat from dense products on [B, D]."""
    x, W, b, b_dec, _, rows, operands = encoder
    centred, dtype = operands.x, operands.x.dtype
    W_dead, b_dead = rows.gather("W_enc", W, members, dtype), rows.gather("b_enc", b, members, dtype)
    # x and b_dec are in `centred` already: zeros that carry their gradients
    if b_dec is not None:
        b_dead = b_dead - W_dead.detach() @ (b_dec - b_dec.detach()).to(dtype)
    if x.requires_grad:
        centred = centred + (x - x.detach()).to(dtype)
    a = torch.addmm(b_dead, centred, W_dead.t())
    if k < len(members):
        kept = torch.zeros_like(a, dtype=torch.bool).scatter_(1, largest(a, scale, k), True)
        a = torch.where(kept, a, 0)
    return a @ rows.gather("W_dec", W_dec, members, dtype)


def by_entries(encoder: Encoder, W_dec: Tensor, members: Tensor, scale: Tensor | None, k: int) -> Tensor:
    """The same from the kept entries alone, some tokens at a time."""
    parts, elements = implementation("torch"), CHUNK_ELEMENTS if encoder.x.device.type == "cpu" else GPU_CHUNK_ELEMENTS
    _, W, b, *_ = encoder.operands.of_features(members)
    W = W.to(b.dtype)
    acts, columns = [], []
    for x in encoder.operands.x.split(max(1, elements // len(members))):
        a = torch.addmm(b, x, W.t())
        columns.append(largest(a, scale, k).sort(1).values)
        acts.append(a.gather(1, columns[-1]))
    tokens = torch.arange(encoder.shape[0], device=W.device).repeat_interleave(k)
    features = members[torch.cat(columns).flatten()]
    codes = parts.encode_at(encoder, Entries(torch.cat(acts).flatten(), tokens, features))
    return parts.decode(codes, W_dec, None, encoder.rows)


def largest(a: Tensor, scale: Tensor | None, k: int) -> Tensor:
    """int64 [B, k]: the columns of the k largest of each row of a * scale."""
    a = a.detach()
    return (a if scale is None else a * scale.to(a.dtype)).topk(k, dim=1, sorted=False).indices
