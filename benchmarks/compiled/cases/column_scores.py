import torch

from benchmarks.compiled.case import Case
from sampled_sae.kernels import column_scores, configs

# operand type, d, score, whether bias and scale are there
OPERANDS = {
    "bf16 small d": ("bf16", 768, "entropy", True),
    "bf16 large d": ("bf16", 4096, "entropy", True),
    "fp16 tail of d": ("fp16", 500, "l2", False),
    "fp32 small d": ("fp32", 768, "entropy", True),
    "fp32 large d": ("fp32", 4096, "entropy", True),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def cases(arch: str) -> dict[str, Case]:
    fold = Case(
        column_scores.fold_partials_kernel,
        configs.FOLD,
        {"partials": "*fp32", "statistics": "*fp32"},
        ("T", "F"),
        {"CEIL_T": 64},
        unaligned=("T",),
    )
    return {name: partials(arch, *operands) for name, operands in OPERANDS.items()} | {"fold": fold}


def partials(arch: str, operand: str, d: int, score: str, has_vectors: bool) -> Case:
    config = configs.column_scores_config(arch, DTYPES[operand], d)
    return Case(
        column_scores.column_partials_kernel,
        config,
        {"x": f"*{operand}", "W": f"*{operand}", "b": "*fp32", "scale": "*fp32", "partials": "*fp32"},
        ("B", "F", "stride_x", "stride_W"),
        {
            "D": d,
            "SCORE": score,
            "HAS_BIAS": has_vectors,
            "HAS_SCALE": has_vectors,
            "FAST_LOG": arch != "gfx942",
            **({} if has_vectors else {"b": None, "scale": None}),
        },
        # IEEE fp32 products run on FMA units, but for AMD's matrix cores
        matrix=operand != "fp32" or arch == "gfx942",
        unaligned=("B",),
    )
