"""Calls of the launchers, by file and name, each with the kernel whose launch in it is meant.

Tensors have no memory. What varies from batch to batch is odd, so that the code may not count on multiples of 16.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor, bfloat16, float16, float32, int32, int64

from sampled_sae.kernels.arguments import Spread
from sampled_sae.kernels.configs import LONGEST_ADAM_ROW

# tokens, features, features of a chunk and of a pool, kept entries, slots of a list
B, F, C, P, KEPT, SLOTS = 1001, 32768, 4096, 2001, 32033, 40001
# of a call; behind them, in a dictionary, those that it takes by name
Arguments = tuple[Any, ...]


class Case(NamedTuple):
    """A call and, of its launches of the kernel, the one that is meant; an architecture may have another kernel."""

    kernel: Any
    call: Callable[[], Any]
    which: int


def new(*shape: int, dtype: torch.dtype = float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def vectors(length: int) -> tuple[Tensor, Tensor]:
    """b and scale."""
    return new(length), new(length)


def encoder(dtype: torch.dtype, d: int, tokens: int = B) -> tuple[Tensor, Tensor]:
    """x and W, whose rows begin at multiples of 16."""
    stride = -(-d // 16) * 16
    return new(tokens, stride, dtype=dtype)[:, :d], new(F, stride, dtype=dtype)[:, :d]


def adam(d: int, mode: str, grad: torch.dtype, moments: torch.dtype, has_copy: bool) -> Arguments:
    """Of a decoder row where d > 1, with all that may be done to it, or of a vector."""
    shape = () if d == 1 else (d,)
    weight, moment = new(F + 1, *shape), new(F + 1, *shape, dtype=moments)
    tensors = (weight, moment, moment, new(P, *shape, dtype=grad), new(P, dtype=int64), new(1))
    optional = {
        "factor": new(1),
        "last": new(F + 1, dtype=int32) if mode == "decayed" else None,
        "copy": torch.empty_like(weight, dtype=bfloat16) if has_copy else None,
    }
    numbers = {"lr": new(1) if mode == "decayed" else 0.1, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8}
    how = {"weight_decay": 0.1, "seed": 1001, "mode": mode, "project": d > 1, "renormalize": d > 1}
    return *tensors, {**optional, **numbers, **how}


def fires(d: int) -> Arguments:
    """x, W, each with its norms and errors, and b."""
    x, W = encoder(bfloat16, d)
    return x, new(B), new(B), W, new(F), new(F), new(F)


def undecided(d: int) -> Arguments:
    return *encoder(float32, d), *vectors(F), "l2", new(F), new(F), new(F), P


def decode(dtype: torch.dtype, d: int) -> Arguments:
    return new(KEPT), FEATURES, TOKEN_ENDS, new(F, d, dtype=dtype), new(d)


def gradient(dtype: torch.dtype, d: int) -> Arguments:
    lists = (new(KEPT), TOKENS, ORDER, FEATURE_ENDS, new(B, d, dtype=dtype), new(P, dtype=int64))
    return *lists, F, {"with_sums": True, "norm": new()}


def kept_rows(length: int) -> Arguments:
    return new(B, length), 32, *vectors(length), new(B, length, dtype=bfloat16)


def merged_rows(length: int, k: int, **optional: Any) -> Arguments:
    return new(B, k), new(B, k, dtype=int32), new(B, length), length + 1, *vectors(length), optional


def spread(length: int) -> Spread:
    return Spread(new(B), new(B), new(length), new(length), new(length))


TAU, COUNT, MEMBERS = new(1), new(1, dtype=int64), new(P, dtype=int64)
LIST = (TAU, new(SLOTS), new(SLOTS, dtype=int64), COUNT)
OF_TOKENS = (new(B), *LIST[1:])
TOKENS, FEATURES, ORDER = (new(KEPT, dtype=int32) for _ in range(3))
TOKEN_ENDS, FEATURE_ENDS = new(B + 1, dtype=int32), new(P + 1, dtype=int32)
BLOCK, CHUNK, ENTRIES = new(B, F), (new(B, C), *vectors(C)), (TOKENS, FEATURES, TOKEN_ENDS)
LARGE, NARROW, WIDE = new(1 << 16, F), new(1 << 16), new(1 << 23)
CUT = (BLOCK, KEPT, *vectors(F))
SUMS: dict[str, dict[str, Arguments]] = {
    "gather_decode.gather_sum": {
        "bf16 decode small d": decode(bfloat16, 768),
        "bf16 decode large d": decode(bfloat16, 4096),
    },
    "segment_sum": {
        "bf16 gradient large d": gradient(bfloat16, 4096),
        "fp32 gradient small d": gradient(float32, 768),
    },
}

# by file of kernels/; by launcher, of that file unless another is named, kernel, and which of its launches, where not
# the last; by name
CALLS: dict[str, dict[tuple[Any, ...], dict[str, Arguments]]] = {
    "batch_topk": {
        ("keep_largest_", "write_pool_kernel"): {
            "pool": (BLOCK, B),
            "pool, bf16 copy and smallest": (LARGE, B, {"copy": LARGE.bfloat16(), "least": new(1)}),
        },
        ("largest_indices", "write_indices_kernel"): {"indices": (new(F), P)},
        ("compact_largest", "write_entries_kernel"): {
            "entries": (NARROW, NARROW.long(), KEPT, B, F),
            "entries, wide keys": (WIDE, WIDE.long(), KEPT, B, 1 << 22),
        },
    },
    "block_gradient": {
        ("block_gradient", "block_gradient_kernel"): {
            "to bf16": (new(B, P), new(B, P), None, bfloat16),
            "to fp32, scaled": (new(B, P), new(B, P), new(P), float32),
        },
    },
    "candidates": {
        ("compute_candidates_", "compute_candidates_kernel"): {
            "fp32 small d": (*encoder(float32, 768), *vectors(F), new(B), False, *LIST[1:]),
            "fp32 large d, floors": (*encoder(float32, 4096), *vectors(F), new(F), True, *LIST[1:]),
            "fp32 by bf16": (new(B, 720), new(F, 720, dtype=bfloat16), *vectors(F), new(F), True, *LIST[1:]),
        },
    },
    "chunk_filter": {
        ("append_above_", "append_above_kernel"): {
            "whole dictionary": (*CHUNK, C + 1, F, *LIST),
            "pool": (*CHUNK, new(C, dtype=int64), F, *LIST),
            "floors": (*CHUNK, C + 1, F, *LIST, new(C)),
            "candidates": (*CHUNK, C + 1, F, *OF_TOKENS, None, spread(C)),
            "candidates of floors": (*CHUNK, C + 1, F, *LIST, new(C), spread(C)),
        },
        ("first_threshold", "first_threshold_kernel"): {"first threshold": (*CHUNK, KEPT)},
        ("next_threshold", "next_threshold_kernel"): {"next threshold": (new(1), TAU, COUNT, KEPT)},
    },
    "chunk_scores": {
        ("chunk_statistics", "chunk_partials_kernel"): {
            f"partials {score}": (*CHUNK, score) for score in ("entropy", "l2")
        },
    },
    "column_bounds": {
        ("column_bounds", "column_bounds_kernel"): {
            "sums of squares": (*(new(F) for _ in range(5)), new(2), new(2), B, 768),
        },
    },
    "column_scores": {
        ("column_statistics", "column_partials_kernel"): {
            "bf16 small d": (*encoder(bfloat16, 768), new(F), "entropy", new(F)),
            "bf16 large d": (*encoder(bfloat16, 4096), new(F), "entropy", new(F)),
            "fp16 tail of d": (*encoder(float16, 500), None, "l2", None),
            "fp32 small d": (*encoder(float32, 768), new(F), "entropy", new(F)),
            "fp32 large d": (*encoder(float32, 4096), new(F), "entropy", new(F)),
        },
        ("column_statistics", "described_partials_kernel"): {
            "descriptors bf16 l2": (*encoder(bfloat16, 4096, tokens=1024), new(F), "l2", None),
            "descriptors bf16 entropy": (*encoder(bfloat16, 768), new(F), "entropy", new(F)),
            "descriptors fp16 tail of d": (*encoder(float16, 500), None, "uniform", None),
            "descriptors bf16 d of one tile": (*encoder(bfloat16, 64), None, "l2", None),
        },
        ("fold_partials", "fold_partials_kernel"): {"fold": (new(2 * 50 * F), 2, 50, F)},
    },
    "exact_fallback": {
        ("refill_exactly_", "refill_kernel"): {
            "bf16 small d": (*encoder(bfloat16, 768), *vectors(F), None, KEPT, *LIST),
            "bf16 large d, pool": (*encoder(bfloat16, 4096), *vectors(F), MEMBERS, KEPT, *LIST),
            "fp32 small d, pool": (*encoder(float32, 768), *vectors(F), MEMBERS, KEPT, *LIST),
        },
    },
    "firing_bounds": {
        ("firing_bounds", "firing_partials_kernel"): {"small d": fires(768), "large d": fires(4096)},
    },
    "gather_decode": {
        ("entry_dots", "entry_dots_kernel"): {
            "dots bf16 small d": (*encoder(bfloat16, 768), *ENTRIES),
            "dots bf16 large d": (*encoder(bfloat16, 4096), *ENTRIES),
            "dots fp32 by bf16": (new(B, 768), new(F, 768, dtype=bfloat16), *ENTRIES),
            "dots fp32 tail of d": (*encoder(float32, 720), *ENTRIES),
        },
    },
    "merge_rows": {
        ("merge_rows_", "merge_rows_kernel"): {
            **{f"merge {n} into {k}": merged_rows(n, k) for n, k in ((1024, 32), (4096, 64), (8192, 512))},
            "at least, 4096 into 64": merged_rows(C, 64, spread=spread(C)),
            "at least, 8192 into 512": merged_rows(8192, 512, spread=spread(8192)),
            "where needed": merged_rows(C, 64, needed=COUNT),
        },
    },
    "needed_product": {
        ("product_if_", "needed_product_kernel"): {
            "fp32 small d": (COUNT, *encoder(float32, 768), 1001, new(B, C)),
            "fp32 large d, pool": (COUNT, *encoder(float32, 4096), MEMBERS, new(B, P)),
            "fp32 above floors": (COUNT, *encoder(float32, 768), 0, BLOCK, *vectors(F), new(F)),
        },
    },
    "product_filter": {
        ("append_products_above_", "append_products_kernel"): {
            "bf16 small d": (*encoder(bfloat16, 768), new(F), None, None, *LIST),
            "bf16 pool": (*encoder(bfloat16, 768), *vectors(F), MEMBERS, *LIST),
            "fp16 floors, tail of d": (*encoder(float16, 500), *vectors(F), None, *LIST, new(F)),
        },
    },
    "radix": {
        ("find_cut", "count_digits_kernel", 0): {"activate": CUT},
        ("find_cut", "count_digits_kernel", 1): {"second pass": CUT},
        ("find_cut", "count_digits_kernel"): {"last pass, beyond 2^31": (new(1 << 32), (1 << 31) + 1)},
        ("find_cut", "count_cut_kernel"): {"counts at the cut": CUT},
    },
    "reconstruction": {
        ("squared_errors", "errors_kernel"): {
            "errors": (new(B, 768), new(768), new(B, 768)),
            "errors of bf16": (new(B, 720), None, new(B, 720, dtype=bfloat16)),
        },
        ("squared_errors_backward", "errors_backward_kernel"): {
            "backward": (new(B), new(B, 768), new(B, 768), new(B, 768)),
            "backward and bf16 copy": (new(B), None, *(new(B, 768) for _ in range(2)), new(B, 768, dtype=bfloat16)),
        },
    },
    "rounded_rows": {
        ("rounded_rows", "round_rows_kernel"): {
            "rows of 768": (new(F, 768),),
            "rows of 768, scaled": (new(768, 768), new(1)),
            "rows of 4096": (new(F, 4096),),
        },
    },
    "row_adam": {
        ("row_adam_", "row_adam_kernel"): {
            "dense d=768": adam(768, "dense", float32, float32, False),
            "dense d=768 bf16 moments": adam(768, "dense", float32, bfloat16, True),
            "dense d=4096": adam(4096, "dense", float32, float32, True),
            "dense vector": adam(1, "dense", float32, float32, False),
            "lazy d=768 bf16 gradient": adam(768, "lazy", bfloat16, float32, False),
            "decayed d=768": adam(768, "decayed", float32, float32, False),
            "decayed d=4096 bf16 moments": adam(4096, "decayed", float32, bfloat16, True),
            "decayed d=8192 bf16 moments": adam(8192, "decayed", float32, bfloat16, True),
            "dense longest row": adam(LONGEST_ADAM_ROW, "dense", float32, float32, False),
        },
    },
    "segment_sum": {
        (launcher, f"{part}_kernel"): {f"{part} {name}": arguments for name, arguments in calls.items()}
        for part in ("rests", "segments")
        for launcher, calls in SUMS.items()
    },
    "spectral_bound": {
        ("trace_bound", "trace_kernel"): {"trace": (new(B), new(B))},
        ("spectral_bound", "spectral_bound_kernel"): {"bound": (new(2), *(new(768) for _ in range(5)), B, new(B))},
    },
    "token_topk": {
        ("keep_rows_", "keep_rows_kernel"): {f"rows of {n}": kept_rows(n) for n in (512, 2048, 4096, 8192)},
        ("keep_rows_", "keep_long_rows_kernel"): {"longer rows": kept_rows(32768)},
        ("keep_listed_", "keep_listed_kernel"): {"of a list": (NARROW, new(B + 1, dtype=int64), 33)},
    },
    "undecided_columns": {
        ("settled_statistics", "list_undecided_kernel"): {"list": undecided(768)},
        ("settled_statistics", "undecided_partials_kernel"): {
            "fp32 small d": undecided(768),
            "fp32 large d": undecided(4096),
        },
        ("settled_statistics", "settle_kernel"): {"settle": undecided(768)},
    },
}


def case(file: str, arguments: Arguments, launcher: str, kernel: str, which: int = -1) -> Case:
    plain = [argument for argument in arguments if not isinstance(argument, dict)]
    named = arguments[-1] if len(plain) < len(arguments) else {}
    call = of_kernels(launcher if "." in launcher else f"{file}.{launcher}")
    return Case(of_kernels(f"{file}.{kernel}"), partial(call, *plain, **named), which)


def of_kernels(name: str) -> Any:
    """What has this name, as "file.name", in kernels/."""
    file, _, attribute = name.partition(".")
    return getattr(import_module(f"sampled_sae.kernels.{file}"), attribute)


CASES = {
    file: {name: case(file, of, *meant) for meant, calls in groups.items() for name, of in calls.items()}
    for file, groups in CALLS.items()
}
