import torch

from benchmarks.compiled.case import Case
from sampled_sae.kernels import configs, segment_sum

# operand type, d, and which of the optional arguments are there
OPERANDS = {
    "bf16 decode small d": ("bf16", 768, {"bias"}),
    "bf16 decode large d": ("bf16", 4096, {"bias"}),
    "bf16 gradient large d": ("bf16", 4096, {"order", "rows", "sums"}),
    "fp32 gradient small d": ("fp32", 768, {"order", "rows", "sums"}),
}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
POINTERS = {"weights": "*fp32", "indices": "*i32", "ends": "*i32", "partials": "*fp32", "partial_sums": "*fp32"}
OPTIONAL = {"order": "*i32", "bias": "*fp32", "rows": "*i64", "sums": "*fp32"}


def cases(arch: str) -> dict[str, Case]:
    return {f"rests {name}": rests(arch, *operands) for name, operands in OPERANDS.items()} | {
        f"segments {name}": segments(arch, *operands) for name, operands in OPERANDS.items()
    }


def rests(arch: str, operand: str, d: int, given: set[str]) -> Case:
    order = {"order": "*i32"} if "order" in given else {}
    absent = {} if order else {"order": None}
    return Case(
        segment_sum.rests_kernel,
        configs.segment_sum_config(arch, DTYPES[operand]),
        {**POINTERS, "ends_before": "*i32", "source": f"*{operand}", **order},
        ("R", "stride_source"),
        {"D": d, "HAS_ORDER": "order" in given, "HAS_SUMS": "sums" in given, **absent},
        unaligned=("R",),
    )


def segments(arch: str, operand: str, d: int, given: set[str]) -> Case:
    flags = {f"HAS_{name.upper()}": name in given for name in OPTIONAL}
    return Case(
        segment_sum.segments_kernel,
        configs.segment_sum_config(arch, DTYPES[operand]),
        {**POINTERS, "source": f"*{operand}", "out": "*fp32", **{name: OPTIONAL[name] for name in given}},
        ("stride_source",),
        {"D": d, **flags, **{name: None for name in OPTIONAL if name not in given}},
    )
