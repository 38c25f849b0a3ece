"""What the calls of `cases.py` are made of: tensors without memory, and launchers with all their arguments."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, bfloat16, float32, int32, int64

from sampled_sae.kernels import (
    gather_decode,
    merge_rows,
    radix,
    row_adam,
    segment_sum,
    token_topk,
    undecided_columns,
)
from sampled_sae.kernels.arguments import Spread

# tokens, features, features of a chunk and of a pool, kept entries, slots of a list
B, F, C, P, KEPT, SLOTS = 1001, 32768, 4096, 2001, 32033, 40001


class Case(NamedTuple):
    """A call and, of its launches of the kernel, the one that is meant; an architecture may have another kernel."""

    kernel: Any
    call: Callable[[], Any]
    which: int = -1


def new(*shape: int, dtype: torch.dtype = float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def vectors(length: int) -> tuple[Tensor, Tensor]:
    """b and scale."""
    return new(length), new(length)


def encoder(dtype: torch.dtype, d: int, tokens: int = B) -> tuple[Tensor, Tensor]:
    """x and W, whose rows begin at multiples of 16."""
    stride = -(-d // 16) * 16
    return new(tokens, stride, dtype=dtype)[:, :d], new(F, stride, dtype=dtype)[:, :d]


def several(launcher: Callable[..., Any], kernel: Any, tried: dict[str, tuple[Any, ...]]) -> dict[str, Case]:
    return {name: Case(kernel, partial(launcher, *arguments)) for name, arguments in tried.items()}


def adam(d: int, mode: str, grad: torch.dtype, moments: torch.dtype, has_copy: bool) -> Case:
    """Of a decoder row where d > 1, with all that may be done to it, or of a vector."""
    shape = () if d == 1 else (d,)
    weight, moment = new(F + 1, *shape), new(F + 1, *shape, dtype=moments)
    tensors = (weight, moment, moment, new(P, *shape, dtype=grad), new(P, dtype=int64), new(1))
    optional = {
        "factor": new(1),
        "last": new(F + 1, dtype=int32) if mode == "decayed" else None,
        "copy": torch.empty_like(weight, dtype=bfloat16) if has_copy else None,
    }
    numbers = {
        "lr": new(1) if mode == "decayed" else 0.1,
        "beta1": 0.9,
        "beta2": 0.99,
        "eps": 1e-8,
        "weight_decay": 0.1,
        "seed": 1001,
    }
    how = {**optional, **numbers, "mode": mode, "project": d > 1, "renormalize": d > 1}
    return Case(row_adam.row_adam_kernel, partial(row_adam.row_adam_, *tensors, **how))


def fires(d: int) -> tuple[Tensor, ...]:
    """x, W, each with its norms and errors, and b."""
    x, W = encoder(bfloat16, d)
    return x, new(B), new(B), W, new(F), new(F), new(F)


def undecided(d: int) -> Callable[[], Any]:
    arguments = (*encoder(float32, d), *vectors(F), "l2", new(F), new(F), new(F))
    return partial(undecided_columns.settled_statistics, *arguments, P)


def decode(dtype: torch.dtype, d: int) -> Callable[[], Any]:
    return partial(gather_decode.gather_sum, new(KEPT), FEATURES, TOKEN_ENDS, new(F, d, dtype=dtype), new(d))


def gradient(dtype: torch.dtype, d: int) -> Callable[[], Any]:
    lists = (new(KEPT), TOKENS, ORDER, FEATURE_ENDS, new(B, d, dtype=dtype), new(P, dtype=int64))
    return partial(segment_sum.segment_sum, *lists, F, with_sums=True, norm=new())


def kept_rows(kernel: Any, length: int) -> Case:
    copy = new(B, length, dtype=bfloat16)
    return Case(kernel, partial(token_topk.keep_rows_, new(B, length), 32, *vectors(length), copy))


def merged_rows(length: int, k: int, **optional: Any) -> Case:
    arguments = (new(B, k), new(B, k, dtype=int32), new(B, length), length + 1, *vectors(length))
    return Case(merge_rows.merge_rows_kernel, partial(merge_rows.merge_rows_, *arguments, **optional))


def spread(length: int) -> Spread:
    return Spread(new(B), new(B), new(length), new(length), new(length))


TAU, COUNT, MEMBERS = new(1), new(1, dtype=int64), new(P, dtype=int64)
LIST = (TAU, new(SLOTS), new(SLOTS, dtype=int64), COUNT)
OF_TOKENS = (new(B), *LIST[1:])
TOKENS, FEATURES, ORDER = (new(KEPT, dtype=int32) for _ in range(3))
TOKEN_ENDS, FEATURE_ENDS = new(B + 1, dtype=int32), new(P + 1, dtype=int32)
BLOCK, CHUNK, ENTRIES = new(B, F), (new(B, C), *vectors(C)), (TOKENS, FEATURES, TOKEN_ENDS)
LARGE, NARROW, WIDE = new(1 << 16, F), new(1 << 16), new(1 << 23)
CUT = partial(radix.find_cut, BLOCK, KEPT, *vectors(F))
SUMS = {
    "bf16 decode small d": decode(bfloat16, 768),
    "bf16 decode large d": decode(bfloat16, 4096),
    "bf16 gradient large d": gradient(bfloat16, 4096),
    "fp32 gradient small d": gradient(float32, 768),
}
