"""What might be faster than the configurations of kernels/configs.py, by the name of what chooses them there."""

from __future__ import annotations

import triton

from sampled_sae.kernels.configs import INTERPRETED, tile

# names of blocks; then on a GPU, and in the interpreter, their values, warps and stages
TRIED = {
    "FOLD": ("BT BF", [(16, 64, 4, 1), (32, 128, 4, 1), (64, 64, 4, 1)], (16, 32, 4, 1)),
    "chunk_scores_config": (
        "BT BF STEPS",
        [(16, 128, 8, 4, 2), (32, 128, 8, 4, 3), (16, 256, 16, 8, 2), (8, 256, 32, 4, 3)],
        (4, 64, 2, 4, 3),
    ),
    "chunk_filter_config": ("BT BF", [(8, 128, 1, 3), (4, 256, 1, 3), (8, 256, 4, 3), (16, 128, 4, 3)], (4, 64, 4, 3)),
    "segment_sum_config": (
        "BE BD PIECE",
        [(4, 256, 256, 1, 3), (16, 256, 256, 2, 3), (8, 512, 256, 2, 3), (8, 256, 128, 1, 3), (8, 256, 512, 1, 3)],
        (8, 16, 32, 4, 3),
    ),
    "entry_dots_config": ("BE BD", [(4, 256, 4, 3), (16, 256, 4, 3), (8, 512, 4, 3), (8, 256, 8, 3)], (4, 16, 4, 3)),
    "radix_config": (
        "BLOCK SPANS",
        [(1024, 2048, 4, 3), (2048, 1024, 8, 3), (4096, 1024, 8, 3), (4096, 2048, 16, 3)],
        (128, 4, 4, 3),
    ),
}
TILES = [(128, 128, 64, 4, 3), (128, 128, 64, 4, 4), (128, 128, 64, 8, 3), (128, 256, 64, 8, 3)]
TILES += [(128, 256, 64, 8, 4), (256, 128, 64, 8, 3), (64, 256, 64, 4, 4), (128, 128, 32, 4, 5)]
WARPS = (1, 2, 4, 8, 16)
# elements that a program holds at once, and warps
ADAM_SHAPES = ((1024, 4), (2048, 4), (2048, 8), (4096, 8), (4096, 16), (8192, 32))


def candidates(choice: str, current: triton.Config) -> dict[str, triton.Config]:
    """`current` first, and others, each as it would be written; of a row its length stays."""
    if choice == "column_scores_config":
        others = [tile(*blocks) for blocks in ([(32, 32, 16, 4, 1)] if INTERPRETED.value else TILES)]
    elif choice == "rows_config":
        others = [triton.Config(current.kwargs, num_warps=warps) for warps in WARPS]
    elif choice == "row_adam_config":
        BD = current.kwargs["BD"]
        others = [triton.Config({"BR": max(1, n // BD), "BD": BD}, num_warps=warps) for n, warps in ADAM_SHAPES]
    else:
        names, on_a_gpu, interpreted = TRIED[choice]
        others = [
            triton.Config(dict(zip(names.split(), blocks)), num_warps=warps, num_stages=stages)
            for *blocks, warps, stages in ([interpreted] if INTERPRETED.value else on_a_gpu)
        ]
    return {written(config): config for config in (current, *others)}


def written(config: triton.Config) -> str:
    """As it would stand in kernels/configs.py."""
    k = config.kwargs
    if {"BM", "BN", "BD", "GROUP"} == set(k):
        return f"tile({k['BM']}, {k['BN']}, {k['BD']}, {config.num_warps}, {config.num_stages})"
    blocks = ", ".join(f'"{name}": {value}' for name, value in k.items())
    return f"triton.Config({{{blocks}}}, num_warps={config.num_warps}, num_stages={config.num_stages})"
