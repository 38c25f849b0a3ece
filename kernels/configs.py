"""The one blessed configuration of each kernel for each architecture, operand width and size of d.

They were chosen from compiled code (registers, spills, shared memory, blocks an SM), not by timing;
`benchmarks/gpu.py` times others against them.
"""

import functools
import sys

import torch
import triton

from sampled_sae.kernels.interpreter import INTERPRETED

SMALL_D = 1024
# bytes that stay in L2 when they are read again: of the GPUs here it has 40 MB or more
FITS_L2 = 32 << 20


def tile(BM: int, BN: int, BD: int, num_warps: int, num_stages: int) -> triton.Config:
    blocks = {"BM": BM, "BN": BN, "BD": BD, "GROUP": 8}
    return triton.Config(blocks, num_warps=num_warps, num_stages=num_stages)


# (architecture, operand bits) -> (d <= SMALL_D, larger d); tiles are BM features x BN tokens x BD of d.
# Where d is small the epilogue weighs more: on NVIDIA smaller tiles let a second block multiply meanwhile.
# fp32 products are IEEE, on FMA units (matrix cores on gfx942), which want small tiles.
# sm_89 stands for all GPUs with 99 KB of shared memory a block (sm_86, sm_89, sm_120).
COLUMN_SCORES = {
    ("sm_80", 16): (tile(128, 128, 32, 4, 4), tile(128, 256, 64, 8, 3)),
    ("sm_89", 16): (tile(128, 128, 32, 4, 3), tile(128, 128, 64, 8, 3)),
    ("sm_90", 16): (tile(128, 128, 64, 4, 3), tile(128, 256, 64, 8, 4)),
    ("sm_100", 16): (tile(128, 128, 64, 4, 3), tile(128, 256, 64, 8, 4)),
    ("gfx942", 16): (tile(128, 128, 64, 8, 2), tile(256, 128, 32, 8, 2)),
    ("sm_80", 32): (tile(64, 64, 32, 4, 3), tile(128, 128, 16, 8, 3)),
    ("sm_89", 32): (tile(64, 64, 32, 4, 3), tile(128, 128, 16, 8, 3)),
    ("sm_90", 32): (tile(64, 64, 32, 4, 3), tile(128, 128, 16, 8, 3)),
    ("sm_100", 32): (tile(64, 64, 32, 4, 3), tile(128, 128, 16, 8, 3)),
    ("gfx942", 32): (tile(64, 64, 32, 4, 2), tile(128, 128, 32, 8, 2)),
    ("interpreter", 16): (tile(16, 32, 16, 4, 1), tile(16, 32, 16, 4, 1)),
    ("interpreter", 32): (tile(16, 32, 16, 4, 1), tile(16, 32, 16, 4, 1)),
}
# partial sums, BT token tiles x BF features at a time: bound by memory, the same everywhere
FOLD = triton.Config({"BT": 32, "BF": 64}, num_warps=4, num_stages=1)
# Tokens of [B, d], BT at a time: whole rows BD by BD forward, a stripe of BD columns over STEPS tiles backward
ERRORS = {
    "nvidia": triton.Config({"BT": 4, "BD": 256}, num_warps=4, num_stages=1),
    "gfx942": triton.Config({"BT": 4, "BD": 512}, num_warps=4, num_stages=1),
    "interpreter": triton.Config({"BT": 4, "BD": 16}),
}
ERRORS_BACKWARD = {
    "nvidia": triton.Config({"BT": 8, "BD": 128, "STEPS": 16}, num_warps=4, num_stages=1),
    "gfx942": triton.Config({"BT": 8, "BD": 256, "STEPS": 16}, num_warps=4, num_stages=1),
    "interpreter": triton.Config({"BT": 4, "BD": 16, "STEPS": 2}),
}
# Rows of [N, d] that are rounded, BR at a time, BD by BD
ROUNDED_ROWS = {
    "nvidia": triton.Config({"BR": 4, "BD": 256}, num_warps=4, num_stages=1),
    "gfx942": triton.Config({"BR": 4, "BD": 512}, num_warps=4, num_stages=1),
    "interpreter": triton.Config({"BR": 16, "BD": 16}),
}
# Products with a bound on each entry, which takes more registers than the entry: small tiles.
FIRING = {
    "nvidia": tile(64, 64, 64, 4, 3),
    "gfx942": tile(64, 64, 64, 4, 2),
    "interpreter": tile(16, 32, 16, 4, 1),
}
# columns in fp32 where no scores are fused with whose bits they would have to agree
UNDECIDED = {"nvidia": tile(128, 64, 16, 8, 3), "gfx942": tile(64, 64, 32, 4, 2)}
# bounds, a number a feature or a token
SPECTRAL = triton.Config({"BLOCK": 1024}, num_warps=4)
# (architecture, operand bits) -> the largest d for which scores are fused into the product, where not SMALL_D
LARGEST_FUSED_D = {("interpreter", bits): sys.maxsize for bits in (16, 32)}
# One pass over a product [B, C] in memory, BT tokens x BF features at a time, STEPS times. Most programs of the filter
# have hits: one of a single warp needs no barriers for their slots.
CHUNK_SCORES = {
    "nvidia": triton.Config({"BT": 16, "BF": 128, "STEPS": 16}, num_warps=4, num_stages=2),
    "gfx942": triton.Config({"BT": 16, "BF": 128, "STEPS": 16}, num_warps=4, num_stages=2),
    "interpreter": triton.Config({"BT": 8, "BF": 32, "STEPS": 2}),
}
SCALAR = triton.Config({}, num_warps=1)
CHUNK_FILTER = {
    "nvidia": triton.Config({"BT": 8, "BF": 128, "STEPS": 4}, num_warps=1),
    "gfx942": triton.Config({"BT": 8, "BF": 256, "STEPS": 4}, num_warps=1),
    "interpreter": triton.Config({"BT": 8, "BF": 32, "STEPS": 2}),
}

# BE gathered rows x BD of d at a time: a warp reads BD at 16 bytes a lane. PIECE entries are summed by one program.
SEGMENT_SUM = {
    ("nvidia", 16): triton.Config({"BE": 8, "BD": 256, "PIECE": 256}, num_warps=1),
    ("nvidia", 32): triton.Config({"BE": 8, "BD": 128, "PIECE": 256}, num_warps=1),
    ("gfx942", 16): triton.Config({"BE": 8, "BD": 512, "PIECE": 256}, num_warps=1),
    ("gfx942", 32): triton.Config({"BE": 8, "BD": 256, "PIECE": 256}, num_warps=1),
    ("interpreter", 16): triton.Config({"BE": 4, "BD": 16, "PIECE": 16}),
    ("interpreter", 32): triton.Config({"BE": 4, "BD": 16, "PIECE": 16}),
}
ENTRY_DOTS = {
    ("nvidia", 16): triton.Config({"BE": 8, "BD": 256}, num_warps=4),
    ("nvidia", 32): triton.Config({"BE": 8, "BD": 128}, num_warps=4),
    ("gfx942", 16): triton.Config({"BE": 8, "BD": 512}, num_warps=4),
    ("gfx942", 32): triton.Config({"BE": 8, "BD": 256}, num_warps=4),
    ("interpreter", 16): triton.Config({"BE": 8, "BD": 16}),
    ("interpreter", 32): triton.Config({"BE": 8, "BD": 16}),
}
# A search in the tiles of a product, and its repair in the same ones, where registers are for BS features at a time.
SEARCH = {
    ("nvidia", 16): (tile(128, 128, 64, 8, 3), 16),
    ("nvidia", 32): (tile(128, 64, 16, 8, 3), 32),
    ("gfx942", 16): (tile(128, 128, 32, 8, 2), 8),
    ("gfx942", 32): (tile(64, 64, 32, 4, 2), 8),
    ("interpreter", 16): (tile(32, 32, 16, 4, 1), 16),
    ("interpreter", 32): (tile(32, 32, 16, 4, 1), 16),
}
# Flat selection by radix: tiles of BLOCK entries, at most SPANS programs, each with consecutive tiles.
RADIX = {
    "nvidia": triton.Config({"BLOCK": 2048, "SPANS": 2048}, num_warps=8),
    "gfx942": triton.Config({"BLOCK": 2048, "SPANS": 2048}, num_warps=8),
    "interpreter": triton.Config({"BLOCK": 64, "SPANS": 4}),
}
# Selection by rows: (longest row, warps) of a row that one program holds in registers, shortest first, and the tile
# of a longer one. A row within one warp needs no barrier; more than 32 entries a thread would spill.
ROWS = {
    "nvidia": ((512, 1), (2048, 4), (4096, 8), (8192, 16)),
    "gfx942": ((512, 1), (2048, 4), (4096, 8), (8192, 16)),
    "interpreter": ((64, 1),),
}
# the same for a chunk that is merged into the best of its row
MERGED_ROWS = ((2048, 4), (4096, 8), (8192, 16))
LONG_ROWS = {
    "nvidia": triton.Config({"BP": 2048}, num_warps=4),
    "gfx942": triton.Config({"BP": 2048}, num_warps=4),
    "interpreter": triton.Config({"BP": 32}),
}
# the entries of a token in a list, BE at a time
LISTED = {
    "nvidia": triton.Config({"BE": 128}, num_warps=1),
    "gfx942": triton.Config({"BE": 128}, num_warps=1),
    "interpreter": triton.Config({"BE": 16}),
}

# Adam on whole rows: (longest row, elements a program holds at once, warps), 8 or 16 elements a thread. On NVIDIA 16
# of them spill about 100 bytes beside a bf16 gradient, copy or moment, which asks for tiles of another layout.
ROW_ADAM = {
    "nvidia": ((1024, 1024, 4), (2048, 2048, 8), (4096, 4096, 16), (16384, 8192, 32)),
    "gfx942": ((1024, 1024, 4), (2048, 2048, 4), (4096, 4096, 8), (16384, 8192, 16)),
    "interpreter": ((16384, 64, 1),),
}
LONGEST_ADAM_ROW = 16384


def architecture(device: torch.device) -> str:
    """The name under which the tables list `device`."""
    if INTERPRETED.value:
        return "interpreter"
    if device.type != "cuda":
        raise ValueError(f"Triton kernels need tensors on a GPU, or TRITON_INTERPRET=1; these are on {device}")
    if torch.version.hip:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        raise ValueError(f"Triton kernels need compute capability 8.0 or newer, {device} has {major}.{minor}")
    if major >= 12 or (major == 8 and minor in (6, 9)):
        return "sm_89"
    return {8: "sm_80", 9: "sm_90"}.get(major, "sm_100")


def column_scores_config(arch: str, dtype: torch.dtype, d: int) -> triton.Config:
    """For x and W of this dtype and d."""
    small, large = COLUMN_SCORES[arch, 8 * dtype.itemsize]
    return small if d <= SMALL_D else large


def undecided_config(arch: str, d: int) -> triton.Config:
    """For operands in fp32 of this d: where scores are fused with the product, in their tiles."""
    fused = d <= largest_fused_d(arch, torch.float32)
    return column_scores_config(arch, torch.float32, d) if fused else UNDECIDED[family(arch)]


def needed_product_config(arch: str, dtype: torch.dtype) -> triton.Config:
    """For x and W of this dtype: for every d the tiles of a large one, since small tiles in a loop spill."""
    return COLUMN_SCORES[arch, 8 * dtype.itemsize][1]


def family(arch: str) -> str:
    """The name under which tables that hold for all of NVIDIA's architectures list `arch`."""
    return "nvidia" if arch.startswith("sm_") else arch


def of_family(table: dict[str, triton.Config], device: torch.device) -> triton.Config:
    """The entry of a table that holds for all of NVIDIA's architectures."""
    return table[family(architecture(device))]


def chunk_scores_config(arch: str) -> triton.Config:
    """For a product in fp32."""
    return CHUNK_SCORES[family(arch)]


def chunk_filter_config(arch: str) -> triton.Config:
    """For a product in fp32."""
    return CHUNK_FILTER[family(arch)]


def product_filter_config(arch: str, dtype: torch.dtype) -> triton.Config:
    """For x and W of this dtype."""
    return SEARCH[family(arch), 8 * dtype.itemsize][0]


def exact_fallback_config(arch: str, dtype: torch.dtype) -> triton.Config:
    """For x and W of this dtype: the tiles of `product_filter_config`."""
    config, BS = SEARCH[family(arch), 8 * dtype.itemsize]
    return triton.Config({**config.kwargs, "BS": BS}, num_warps=config.num_warps, num_stages=config.num_stages)


def multiprocessors(device: torch.device) -> int:
    """Of the device; as many programs walk over their tiles where each takes all of one."""
    return 3 if INTERPRETED.value else torch.cuda.get_device_properties(device).multi_processor_count


def resident_programs(device: torch.device) -> int:
    """How many programs that walk over their tiles the device holds at once, two a multiprocessor."""
    return 3 if INTERPRETED.value else 2 * multiprocessors(device)


def largest_fused_d(arch: str, dtype: torch.dtype) -> int:
    """Up to which d the product and what is made of it, column statistics or a list of entries, are one kernel."""
    return LARGEST_FUSED_D.get((arch, 8 * dtype.itemsize), SMALL_D)


def segment_sum_config(arch: str, dtype: torch.dtype) -> triton.Config:
    """For source rows of this dtype."""
    return SEGMENT_SUM[family(arch), 8 * dtype.itemsize]


def entry_dots_config(arch: str, dtype: torch.dtype) -> triton.Config:
    """For rows of W of this dtype."""
    return ENTRY_DOTS[family(arch), 8 * dtype.itemsize]


def radix_config(arch: str) -> triton.Config:
    return RADIX[family(arch)]


def rows_config(arch: str, length: int) -> triton.Config | None:
    """For rows of this length in registers, or None where they are too long."""
    for longest, warps in ROWS[family(arch)]:
        if length <= longest:
            return triton.Config({"BP": triton.next_power_of_2(length)}, num_warps=warps)
    return None


def merge_config(length: int) -> triton.Config:
    """For chunks of up to MERGED_ROWS[-1][0]: BC at a time to search in, BS to write."""
    warps = next(warps for longest, warps in MERGED_ROWS if length <= longest)
    BC = triton.next_power_of_2(length)
    return triton.Config({"BC": BC, "BS": min(BC, 128 * warps)}, num_warps=warps)


def row_adam_config(arch: str, d: int) -> triton.Config:
    """For rows of d <= LONGEST_ADAM_ROW: as many as make a program's share of elements, at least one."""
    elements, warps = next(row[1:] for row in ROW_ADAM[family(arch)] if d <= row[0])
    BD = triton.next_power_of_2(d)
    return triton.Config({"BR": max(1, elements // BD), "BD": BD}, num_warps=warps)


def given(**optional: torch.Tensor | None) -> dict[str, bool]:
    """Whether optional arguments are there, as a kernel asks: `given(bias=None)` is {"HAS_BIAS": False}."""
    return {_flag(name): argument is not None for name, argument in optional.items()}


@functools.cache
def _flag(name: str) -> str:
    """Made once: every launch asks for several."""
    return f"HAS_{name.upper()}"


def launch(kernel, config: triton.Config, grid, args, **constexprs) -> None:
    """Run `kernel` in this configuration, on the device of its first argument.

    Contraction to FMA is asked for by name, because Triton 3.10 changes its default.
    """
    with torch.cuda.device_of(args[0]):
        kernel[grid](*args, **constexprs, **config.all_kwargs(), enable_fp_fusion=True)
