"""What might be faster than a configuration: its neighbours, which differ in one thing by a factor of two."""

from __future__ import annotations

import triton

from sampled_sae.kernels.configs import INTERPRETED

# what has to stay, by the name of what chooses the configuration: the length of a row, the order of tiles,
# the bits of a word
FIXED = {
    "rows_config": {"BP"},
    "row_adam_config": {"BD"},
    "column_scores_config": {"GROUP"},
    "described_config": {"GROUP"},
    "product_filter_config": {"GROUP"},
    "chunk_filter_config": {"BT"},
}
# those whose loads are pipelined
STAGED = ("column_scores_config", "described_config", "product_filter_config")
MOST_WARPS = 32


def candidates(choice: str, current: triton.Config) -> dict[str, triton.Config]:
    """`current` first, and others, each as it would be written; in the interpreter one other."""
    k, warps, stages = current.kwargs, current.num_warps, current.num_stages
    names = [name for name in k if name not in FIXED.get(choice, ())]
    tried = [(k | {name: n}, warps, stages) for name in names for n in (2 * k[name], k[name] // 2)]
    tried += [(k, n, stages) for n in (2 * warps, warps // 2)]
    tried += [(k, warps, n) for n in (stages + 1, stages - 1) if choice in STAGED]
    possible = [(k, warps, stages) for k, warps, stages in tried if min(*k.values(), warps, stages) > 0]
    others = [triton.Config(k, num_warps=w, num_stages=s) for k, w, s in possible if w <= MOST_WARPS]
    return {written(config): config for config in (current, *(others[:1] if INTERPRETED.value else others))}


def written(config: triton.Config) -> str:
    """As it would stand in kernels/configs.py."""
    k = config.kwargs
    if {"BM", "BN", "BD", "GROUP"} == set(k):
        return f"tile({k['BM']}, {k['BN']}, {k['BD']}, {config.num_warps}, {config.num_stages})"
    blocks = ", ".join(f'"{name}": {value}' for name, value in k.items())
    return f"triton.Config({{{blocks}}}, num_warps={config.num_warps}, num_stages={config.num_stages})"
