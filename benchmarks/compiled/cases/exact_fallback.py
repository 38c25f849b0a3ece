import torch

from benchmarks.compiled.case import Case
from sampled_sae.kernels import configs, exact_fallback

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def cases(arch: str) -> dict[str, Case]:
    return {
        "bf16 small d": refill(arch, "bf16", 768, False),
        "bf16 large d, pool": refill(arch, "bf16", 4096, True),
        "fp32 small d, pool": refill(arch, "fp32", 768, True),
    }


def refill(arch: str, operand: str, d: int, has_members: bool) -> Case:
    return Case(
        exact_fallback.refill_kernel,
        configs.exact_fallback_config(arch, DTYPES[operand]),
        {
            "x": f"*{operand}",
            "W": f"*{operand}",
            "b": "*fp32",
            "scale": "*fp32",
            "members": "*i64",
            "tau": "*fp32",
            "values": "*fp32",
            "keys": "*i64",
            "count": "*i64",
            "histograms": "*i64",
            "scratch": "*fp32",
        },
        ("B", "P", "F", "n", "cap", "i_pass", "token_digits", "feature_digits", "stride_x", "stride_W"),
        {
            "D": d,
            "HAS_BIAS": True,
            "HAS_SCALE": True,
            "HAS_MEMBERS": has_members,
            **({} if has_members else {"members": None}),
        },
        # IEEE fp32 products run on FMA units, but for AMD's matrix cores
        matrix=operand != "fp32" or arch == "gfx942",
        unaligned=("B", "P", "n", "cap", "i_pass", "token_digits", "feature_digits"),
    )
