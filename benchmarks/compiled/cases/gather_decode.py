import torch

from benchmarks.compiled.case import Case
from sampled_sae.kernels import configs, gather_decode

# type of left and of W, d
OPERANDS = {
    "dots bf16 small d": ("bf16", "bf16", 768),
    "dots bf16 large d": ("bf16", "bf16", 4096),
    "dots fp32 by bf16": ("fp32", "bf16", 768),
    "dots fp32 tail of d": ("fp32", "fp32", 720),
}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
ENTRIES = {"tokens": "*i32", "features": "*i32", "token_ends": "*i32"}


def cases(arch: str) -> dict[str, Case]:
    return {name: dots(arch, *operands) for name, operands in OPERANDS.items()}


def dots(arch: str, left: str, operand: str, d: int) -> Case:
    return Case(
        gather_decode.entry_dots_kernel,
        configs.entry_dots_config(arch, DTYPES[operand]),
        {"left": f"*{left}", "W": f"*{operand}", **ENTRIES, "out": "*fp32"},
        ("B", "n", "stride_left", "stride_W"),
        {"D": d},
        unaligned=("B", "n"),
    )
