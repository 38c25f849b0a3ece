"""Calls of the launchers, by file and name, each with the kernel whose launch in it is meant.

What varies from batch to batch is odd, so that the code may not count on multiples of 16.
"""

from __future__ import annotations

from functools import partial

from torch import bfloat16, float16, float32, int64

from benchmarks.compiled.calls import (
    BLOCK,
    CHUNK,
    COUNT,
    CUT,
    ENTRIES,
    KEPT,
    LARGE,
    LIST,
    MEMBERS,
    NARROW,
    OF_TOKENS,
    SUMS,
    TAU,
    WIDE,
    B,
    C,
    Case,
    F,
    P,
    adam,
    encoder,
    fires,
    kept_rows,
    merged_rows,
    new,
    several,
    spread,
    undecided,
    vectors,
)
from sampled_sae.kernels import (
    batch_topk,
    block_gradient,
    candidates,
    chunk_filter,
    chunk_scores,
    column_bounds,
    column_scores,
    configs,
    exact_fallback,
    firing_bounds,
    gather_decode,
    needed_product,
    product_filter,
    radix,
    reconstruction,
    rounded_rows,
    segment_sum,
    spectral_bound,
    token_topk,
    undecided_columns,
)

# by file of kernels/
CASES: dict[str, dict[str, Case]] = {
    "batch_topk": {
        "pool": Case(batch_topk.write_pool_kernel, partial(batch_topk.keep_largest_, BLOCK, B)),
        "pool, bf16 copy and smallest": Case(
            batch_topk.write_pool_kernel,
            partial(batch_topk.keep_largest_, LARGE, B, copy=LARGE.bfloat16(), least=new(1)),
        ),
        "indices": Case(batch_topk.write_indices_kernel, partial(batch_topk.largest_indices, new(F), P)),
        **several(
            batch_topk.compact_largest,
            batch_topk.write_entries_kernel,
            {
                "entries": (NARROW, NARROW.long(), KEPT, B, F),
                "entries, wide keys": (WIDE, WIDE.long(), KEPT, B, 1 << 22),
            },
        ),
    },
    "block_gradient": several(
        block_gradient.block_gradient,
        block_gradient.block_gradient_kernel,
        {
            "to bf16": (new(B, P), new(B, P), None, bfloat16),
            "to fp32, scaled": (new(B, P), new(B, P), new(P), float32),
        },
    ),
    "candidates": several(
        candidates.compute_candidates_,
        candidates.compute_candidates_kernel,
        {
            "fp32 small d": (*encoder(float32, 768), *vectors(F), new(B), False, *LIST[1:]),
            "fp32 large d, floors": (*encoder(float32, 4096), *vectors(F), new(F), True, *LIST[1:]),
            "fp32 by bf16": (new(B, 720), new(F, 720, dtype=bfloat16), *vectors(F), new(F), True, *LIST[1:]),
        },
    ),
    "chunk_filter": {
        **several(
            chunk_filter.append_above_,
            chunk_filter.append_above_kernel,
            {
                "whole dictionary": (*CHUNK, C + 1, F, *LIST),
                "pool": (*CHUNK, new(C, dtype=int64), F, *LIST),
                "floors": (*CHUNK, C + 1, F, *LIST, new(C)),
                "candidates": (*CHUNK, C + 1, F, *OF_TOKENS, None, spread(C)),
                "candidates of floors": (*CHUNK, C + 1, F, *LIST, new(C), spread(C)),
            },
        ),
        "first threshold": Case(
            chunk_filter.first_threshold_kernel, partial(chunk_filter.first_threshold, *CHUNK, KEPT)
        ),
        "next threshold": Case(
            chunk_filter.next_threshold_kernel, partial(chunk_filter.next_threshold, new(1), TAU, COUNT, KEPT)
        ),
    },
    "chunk_scores": several(
        chunk_scores.chunk_statistics,
        chunk_scores.chunk_partials_kernel,
        {f"partials {score}": (*CHUNK, score) for score in ("entropy", "l2")},
    ),
    "column_bounds": several(
        column_bounds.column_bounds,
        column_bounds.column_bounds_kernel,
        {"sums of squares": (*(new(F) for _ in range(5)), new(2), new(2), B, 768)},
    ),
    "column_scores": {
        **several(
            column_scores.column_statistics,
            column_scores.column_partials_kernel,
            {
                "bf16 small d": (*encoder(bfloat16, 768), new(F), "entropy", new(F)),
                "bf16 large d": (*encoder(bfloat16, 4096), new(F), "entropy", new(F)),
                "fp16 tail of d": (*encoder(float16, 500), None, "l2", None),
                "fp32 small d": (*encoder(float32, 768), new(F), "entropy", new(F)),
                "fp32 large d": (*encoder(float32, 4096), new(F), "entropy", new(F)),
            },
        ),
        **several(
            column_scores.column_statistics,
            column_scores.described_partials_kernel,
            {
                "descriptors bf16 l2": (*encoder(bfloat16, 4096, tokens=1024), new(F), "l2", None),
                "descriptors bf16 entropy": (*encoder(bfloat16, 768), new(F), "entropy", new(F)),
                "descriptors fp16 tail of d": (*encoder(float16, 500), None, "uniform", None),
                "descriptors bf16 d of one tile": (*encoder(bfloat16, 64), None, "l2", None),
            },
        ),
        "fold": Case(
            column_scores.fold_partials_kernel, partial(column_scores.fold_partials, new(2 * 50 * F), 2, 50, F)
        ),
    },
    "exact_fallback": several(
        exact_fallback.refill_exactly_,
        exact_fallback.refill_kernel,
        {
            "bf16 small d": (*encoder(bfloat16, 768), *vectors(F), None, KEPT, *LIST),
            "bf16 large d, pool": (*encoder(bfloat16, 4096), *vectors(F), MEMBERS, KEPT, *LIST),
            "fp32 small d, pool": (*encoder(float32, 768), *vectors(F), MEMBERS, KEPT, *LIST),
        },
    ),
    "firing_bounds": several(
        firing_bounds.firing_bounds,
        firing_bounds.firing_partials_kernel,
        {"small d": fires(768), "large d": fires(4096)},
    ),
    "gather_decode": several(
        gather_decode.entry_dots,
        gather_decode.entry_dots_kernel,
        {
            "dots bf16 small d": (*encoder(bfloat16, 768), *ENTRIES),
            "dots bf16 large d": (*encoder(bfloat16, 4096), *ENTRIES),
            "dots fp32 by bf16": (new(B, 768), new(F, 768, dtype=bfloat16), *ENTRIES),
            "dots fp32 tail of d": (*encoder(float32, 720), *ENTRIES),
        },
    ),
    "merge_rows": {
        **{f"merge {n} into {k}": merged_rows(n, k) for n, k in ((1024, 32), (4096, 64), (8192, 512))},
        "at least, 4096 into 64": merged_rows(C, 64, spread=spread(C)),
        "at least, 8192 into 512": merged_rows(8192, 512, spread=spread(8192)),
        "where needed": merged_rows(C, 64, needed=COUNT),
    },
    "needed_product": several(
        needed_product.product_if_,
        needed_product.needed_product_kernel,
        {
            "fp32 small d": (COUNT, *encoder(float32, 768), 1001, new(B, C)),
            "fp32 large d, pool": (COUNT, *encoder(float32, 4096), MEMBERS, new(B, P)),
            "fp32 above floors": (COUNT, *encoder(float32, 768), 0, BLOCK, *vectors(F), new(F)),
        },
    ),
    "product_filter": several(
        product_filter.append_products_above_,
        product_filter.append_products_kernel,
        {
            "bf16 small d": (*encoder(bfloat16, 768), new(F), None, None, *LIST),
            "bf16 pool": (*encoder(bfloat16, 768), *vectors(F), MEMBERS, *LIST),
            "fp16 floors, tail of d": (*encoder(float16, 500), *vectors(F), None, *LIST, new(F)),
        },
    ),
    "radix": {
        "activate": Case(radix.count_digits_kernel, CUT, 0),
        "second pass": Case(radix.count_digits_kernel, CUT, 1),
        "last pass, beyond 2^31": Case(radix.count_digits_kernel, partial(radix.find_cut, new(1 << 32), (1 << 31) + 1)),
        "counts at the cut": Case(radix.count_cut_kernel, CUT),
    },
    "reconstruction": {
        "errors": Case(
            reconstruction.errors_kernel,
            partial(reconstruction.squared_errors, new(B, 768), new(768), new(B, 768)),
        ),
        "errors of bf16": Case(
            reconstruction.errors_kernel,
            partial(reconstruction.squared_errors, new(B, 720), None, new(B, 720, dtype=bfloat16)),
        ),
        "backward": Case(
            reconstruction.errors_backward_kernel,
            partial(reconstruction.squared_errors_backward, new(B), new(B, 768), new(B, 768), new(B, 768)),
        ),
        "backward and bf16 copy": Case(
            reconstruction.errors_backward_kernel,
            partial(
                reconstruction.squared_errors_backward,
                *(new(B), None, new(B, 768), new(B, 768)),
                new(B, 768, dtype=bfloat16),
            ),
        ),
    },
    "rounded_rows": several(
        rounded_rows.rounded_rows,
        rounded_rows.round_rows_kernel,
        {
            "rows of 768": (new(F, 768),),
            "rows of 768, scaled": (new(768, 768), new(1)),
            "rows of 4096": (new(F, 4096),),
        },
    ),
    "row_adam": {
        "dense d=768": adam(768, "dense", float32, float32, False),
        "dense d=768 bf16 moments": adam(768, "dense", float32, bfloat16, True),
        "dense d=4096": adam(4096, "dense", float32, float32, True),
        "dense vector": adam(1, "dense", float32, float32, False),
        "lazy d=768 bf16 gradient": adam(768, "lazy", bfloat16, float32, False),
        "decayed d=768": adam(768, "decayed", float32, float32, False),
        "decayed d=4096 bf16 moments": adam(4096, "decayed", float32, bfloat16, True),
        "decayed d=8192 bf16 moments": adam(8192, "decayed", float32, bfloat16, True),
        "dense longest row": adam(configs.LONGEST_ADAM_ROW, "dense", float32, float32, False),
    },
    "segment_sum": {f"rests {name}": Case(segment_sum.rests_kernel, call) for name, call in SUMS.items()}
    | {f"segments {name}": Case(segment_sum.segments_kernel, call) for name, call in SUMS.items()},
    "spectral_bound": {
        "trace": Case(spectral_bound.trace_kernel, partial(spectral_bound.trace_bound, new(B), new(B))),
        "bound": Case(
            spectral_bound.spectral_bound_kernel,
            partial(spectral_bound.spectral_bound, new(2), *(new(768) for _ in range(5)), B, new(B)),
        ),
    },
    "token_topk": {
        **{f"rows of {n}": kept_rows(token_topk.keep_rows_kernel, n) for n in (512, 2048, 4096, 8192)},
        "longer rows": kept_rows(token_topk.keep_long_rows_kernel, 32768),
        "of a list": Case(
            token_topk.keep_listed_kernel, partial(token_topk.keep_listed_, NARROW, new(B + 1, dtype=int64), 33)
        ),
    },
    "undecided_columns": {
        "list": Case(undecided_columns.list_undecided_kernel, undecided(768)),
        "fp32 small d": Case(undecided_columns.undecided_partials_kernel, undecided(768)),
        "fp32 large d": Case(undecided_columns.undecided_partials_kernel, undecided(4096)),
        "settle": Case(undecided_columns.settle_kernel, undecided(768)),
    },
}
