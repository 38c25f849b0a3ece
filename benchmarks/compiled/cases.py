"""Calls of the launchers, by file and name, each with the kernel whose launch in it is meant.

What varies from batch to batch is odd, so that the code may not count on multiples of 16.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, bfloat16, float16, float32, int32, int64

from sampled_sae.kernels import (
    batch_topk,
    chunk_filter,
    chunk_scores,
    column_scores,
    configs,
    exact_fallback,
    gather_decode,
    radix,
    row_adam,
    segment_sum,
    token_topk,
)

# tokens, features, features of a chunk and of a pool, kept entries, slots of a list
B, F, C, P, KEPT, SLOTS = 1001, 32768, 4096, 2001, 32033, 40001


class Case(NamedTuple):
    """A call and, of its launches of the kernel, the one that is meant."""

    kernel: Any
    call: Callable[[], Any]
    which: int = -1


def new(*shape: int, dtype: torch.dtype = float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def vectors(length: int) -> tuple[Tensor, Tensor]:
    """b and scale."""
    return new(length), new(length)


def encoder(dtype: torch.dtype, d: int) -> tuple[Tensor, Tensor]:
    """x and W, whose rows begin at multiples of 16."""
    stride = -(-d // 16) * 16
    return new(B, stride, dtype=dtype)[:, :d], new(F, stride, dtype=dtype)[:, :d]


TAU, COUNT = new(1), new(1, dtype=int64)
LIST = (TAU, new(SLOTS), new(SLOTS, dtype=int64), COUNT)
TOKENS, FEATURES, ORDER = (new(KEPT, dtype=int32) for _ in range(3))
TOKEN_ENDS, FEATURE_ENDS = new(B + 1, dtype=int32), new(P + 1, dtype=int32)


def batch_topk_cases() -> dict[str, Case]:
    z, large = new(B, F), new(1 << 16, F)
    copied = partial(batch_topk.keep_largest_, large, B, copy=torch.empty_like(large, dtype=bfloat16))
    narrow, wide = (new(n) for n in (1 << 16, 1 << 23))
    entries, write = batch_topk.write_entries_kernel, batch_topk.compact_largest
    return {
        "pool": Case(batch_topk.write_pool_kernel, partial(batch_topk.keep_largest_, z, B)),
        "pool and bf16 copy": Case(batch_topk.write_pool_kernel, copied),
        "indices": Case(batch_topk.write_indices_kernel, partial(batch_topk.largest_indices, new(F), P)),
        "entries": Case(entries, partial(write, narrow, narrow.long(), KEPT, B, F)),
        "entries, wide keys": Case(entries, partial(write, wide, wide.long(), KEPT, B, 1 << 22)),
    }


def chunk_filter_cases() -> dict[str, Case]:
    append, z = partial(chunk_filter.append_above_, new(B, C), *vectors(C)), new(B, C)
    first = partial(chunk_filter.first_threshold, z, *vectors(C), KEPT)
    following = partial(chunk_filter.next_threshold, new(1), TAU, COUNT, KEPT)
    return {
        "whole dictionary": Case(chunk_filter.append_above_kernel, partial(append, C + 1, F, *LIST)),
        "pool": Case(chunk_filter.append_above_kernel, partial(append, new(C, dtype=int64), F, *LIST)),
        "first threshold": Case(chunk_filter.first_threshold_kernel, first),
        "next threshold": Case(chunk_filter.next_threshold_kernel, following),
    }


def chunk_scores_cases() -> dict[str, Case]:
    statistics = partial(chunk_scores.chunk_statistics, new(B, C), *vectors(C))
    scores = ("entropy", "l2")
    return {f"partials {s}": Case(chunk_scores.chunk_partials_kernel, partial(statistics, s)) for s in scores}


def column_scores_cases() -> dict[str, Case]:
    b, scale = vectors(F)
    tried = {
        "bf16 small d": (*encoder(bfloat16, 768), b, "entropy", scale),
        "bf16 large d": (*encoder(bfloat16, 4096), b, "entropy", scale),
        "fp16 tail of d": (*encoder(float16, 500), None, "l2", None),
        "fp32 small d": (*encoder(float32, 768), b, "entropy", scale),
        "fp32 large d": (*encoder(float32, 4096), b, "entropy", scale),
    }
    kernel, statistics = column_scores.column_partials_kernel, column_scores.column_statistics
    found = {name: Case(kernel, partial(statistics, *arguments)) for name, arguments in tried.items()}
    fold = partial(column_scores.fold_partials, new(2 * 50 * F), 2, 50, F)
    return {**found, "fold": Case(column_scores.fold_partials_kernel, fold)}


def exact_fallback_cases() -> dict[str, Case]:
    members = new(P, dtype=int64)
    tried = {
        "bf16 small d": (*encoder(bfloat16, 768), *vectors(F), None),
        "bf16 large d, pool": (*encoder(bfloat16, 4096), *vectors(F), members),
        "fp32 small d, pool": (*encoder(float32, 768), *vectors(F), members),
    }
    kernel, refill = exact_fallback.refill_kernel, exact_fallback.refill_exactly_
    return {name: Case(kernel, partial(refill, *arguments, KEPT, *LIST)) for name, arguments in tried.items()}


def gather_decode_cases() -> dict[str, Case]:
    tried = {
        "dots bf16 small d": (new(B, 768, dtype=bfloat16), new(F, 768, dtype=bfloat16)),
        "dots bf16 large d": (new(B, 4096, dtype=bfloat16), new(F, 4096, dtype=bfloat16)),
        "dots fp32 by bf16": (new(B, 768), new(F, 768, dtype=bfloat16)),
        "dots fp32 tail of d": (new(B, 720), new(F, 720)),
    }
    kernel, dots = gather_decode.entry_dots_kernel, gather_decode.entry_dots
    entries = (TOKENS, FEATURES, TOKEN_ENDS)
    return {name: Case(kernel, partial(dots, *matrices, *entries)) for name, matrices in tried.items()}


def radix_cases() -> dict[str, Case]:
    activated = partial(radix.find_cut, new(B, F), KEPT, *vectors(F))
    beyond = partial(radix.find_cut, new(1 << 32), (1 << 31) + 1)
    return {
        "activate": Case(radix.count_digits_kernel, activated, 0),
        "second pass": Case(radix.count_digits_kernel, activated, 1),
        "last pass, beyond 2^31": Case(radix.count_digits_kernel, beyond),
        "counts at the cut": Case(radix.count_cut_kernel, activated),
    }


def row_adam_cases() -> dict[str, Case]:
    bf16, rows = {"moments": bfloat16}, new(P, dtype=int64)
    tried: dict[str, tuple[int, str, dict[str, torch.dtype], bool]] = {
        "dense d=768": (768, "dense", {}, False),
        "dense d=768 bf16 moments": (768, "dense", bf16, True),
        "dense d=4096": (4096, "dense", {}, True),
        "dense vector": (1, "dense", {}, False),
        "lazy d=768 bf16 gradient": (768, "lazy", {"grad": bfloat16}, False),
        "decayed d=768": (768, "decayed", {}, False),
        "decayed d=4096 bf16 moments": (4096, "decayed", bf16, True),
        "decayed d=8192 bf16 moments": (8192, "decayed", bf16, True),
        "dense longest row": (configs.LONGEST_ADAM_ROW, "dense", {}, False),
    }
    numbers = {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1, "seed": 1001}

    def step(d: int, mode: str, dtypes: dict[str, torch.dtype], has_copy: bool) -> None:
        """A decoder row where d > 1, with all that may be done to it, or a vector."""
        shape = () if d == 1 else (d,)
        weight, moments = new(F + 1, *shape), new(F + 1, *shape, dtype=dtypes.get("moments", float32))
        grad = new(P, *shape, dtype=dtypes.get("grad", float32))
        row_adam.row_adam_(
            *(weight, moments, moments, grad, rows, new(1)),
            factor=new(1),
            mode=mode,
            last=new(F + 1, dtype=int32) if mode == "decayed" else None,
            project=d > 1,
            renormalize=d > 1,
            copy=torch.empty_like(weight, dtype=bfloat16) if has_copy else None,
            **numbers,
        )

    return {name: Case(row_adam.row_adam_kernel, partial(step, *how)) for name, how in tried.items()}


def segment_sum_cases() -> dict[str, Case]:
    weights = new(KEPT)

    def decode(dtype: torch.dtype, d: int) -> Any:
        return gather_decode.gather_sum(weights, FEATURES, TOKEN_ENDS, new(F, d, dtype=dtype), new(d))

    def gradient(dtype: torch.dtype, d: int) -> Any:
        lists = (weights, TOKENS, ORDER, FEATURE_ENDS, new(B, d, dtype=dtype), new(P, dtype=int64))
        return segment_sum.segment_sum(*lists, F, with_sums=True)

    calls = {
        "bf16 decode small d": partial(decode, bfloat16, 768),
        "bf16 decode large d": partial(decode, bfloat16, 4096),
        "bf16 gradient large d": partial(gradient, bfloat16, 4096),
        "fp32 gradient small d": partial(gradient, float32, 768),
    }
    kernels = {"rests": segment_sum.rests_kernel, "segments": segment_sum.segments_kernel}
    return {f"{part} {name}": Case(kernels[part], call) for part in kernels for name, call in calls.items()}


def token_topk_cases() -> dict[str, Case]:
    def kept(length: int) -> Callable[[], Any]:
        copy = new(B, length, dtype=bfloat16)
        return partial(token_topk.keep_rows_, new(B, length), 32, *vectors(length), copy)

    def merged(length: int, k: int) -> Callable[[], Any]:
        best = (new(B, k), new(B, k, dtype=int32))
        return partial(token_topk.merge_rows_, *best, new(B, length), length + 1, *vectors(length))

    found = {f"rows of {n}": Case(token_topk.keep_rows_kernel, kept(n)) for n in (512, 2048, 4096, 8192)}
    found["longer rows"] = Case(token_topk.keep_long_rows_kernel, kept(32768))
    sizes = ((1024, 32), (4096, 64), (8192, 512))
    return found | {f"merge {n} into {k}": Case(token_topk.merge_rows_kernel, merged(n, k)) for n, k in sizes}


# by file of kernels/
CASES: dict[str, Callable[[], dict[str, Case]]] = {
    "batch_topk": batch_topk_cases,
    "chunk_filter": chunk_filter_cases,
    "chunk_scores": chunk_scores_cases,
    "column_scores": column_scores_cases,
    "exact_fallback": exact_fallback_cases,
    "gather_decode": gather_decode_cases,
    "radix": radix_cases,
    "row_adam": row_adam_cases,
    "segment_sum": segment_sum_cases,
    "token_topk": token_topk_cases,
}
