"""The one blessed configuration of each kernel for each architecture, operand width and size of d.

Rows were chosen from compiled code (registers, spills, shared memory, blocks an SM), not by timing.
SAMPLED_SAE_AUTOTUNE=1, read at import, times all rows of the architecture instead (not in the interpreter).
"""

import functools
import os
from collections.abc import Callable

import torch
import triton

from sampled_sae.kernels.interpreter import INTERPRETED

AUTOTUNE = os.environ.get("SAMPLED_SAE_AUTOTUNE") == "1" and not INTERPRETED.value
SMALL_D = 1024


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


def architecture(device: torch.device) -> str:
    """The name under which the tables hold the rows for `device`."""
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


def column_scores_configs(arch: str, dtype: torch.dtype, d: int) -> tuple[triton.Config, ...]:
    """The blessed configuration alone, or every row of the architecture when autotuning."""
    small, large = COLUMN_SCORES[arch, 8 * dtype.itemsize]
    if AUTOTUNE:
        return small, large
    return (small,) if d <= SMALL_D else (large,)


@functools.cache
def autotuner(kernel: Callable, configs: tuple[triton.Config, ...], key: tuple[str, ...]):
    return triton.autotune(list(configs), key=list(key))(kernel)


def launch(kernel, configs, key, grid, args, **constexprs) -> triton.Config:
    """Run `kernel` with the only configuration, or the fastest for these values of the arguments in `key`.

    Contraction to FMA is asked for by name, because Triton 3.10 changes its default.
    """
    if len(configs) == 1:
        kernel[grid](*args, **constexprs, **configs[0].all_kwargs(), enable_fp_fusion=True)
        return configs[0]
    tuner = autotuner(kernel, configs, key)
    tuner[grid](*args, **constexprs, enable_fp_fusion=True)
    return tuner.best_config
