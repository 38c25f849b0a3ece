from benchmarks.compiled.case import Case
from sampled_sae.kernels import configs, row_adam

# d, mode, element type of the gradient and of the moments, whether there is a copy; the rest goes with mode and d
OPERANDS = {
    "dense d=768": (768, "dense", "fp32", "fp32", False),
    "dense d=768 bf16 moments": (768, "dense", "fp32", "bf16", True),
    "dense d=4096": (4096, "dense", "fp32", "fp32", True),
    "dense vector": (1, "dense", "fp32", "fp32", False),
    "lazy d=768 bf16 gradient": (768, "lazy", "bf16", "fp32", False),
    "decayed d=768": (768, "decayed", "fp32", "fp32", False),
    "decayed d=4096 bf16 moments": (4096, "decayed", "fp32", "bf16", True),
    "decayed d=8192 bf16 moments": (8192, "decayed", "fp32", "bf16", True),
    "dense longest row": (configs.LONGEST_ADAM_ROW, "dense", "fp32", "fp32", False),
}
OPTIONAL = {"features": "*i64", "positions": "*i32", "last": "*i32", "copy": "*bf16", "factor": "*fp32"}
FLOATS = ("lr", "alpha1", "alpha2", "log_beta1", "log_beta2", "eps", "weight_decay")


def cases(arch: str) -> dict[str, Case]:
    return {name: step(arch, *operands) for name, operands in OPERANDS.items()}


def step(arch: str, d: int, mode: str, grad: str, moments: str, has_copy: bool) -> Case:
    """A decoder row where d > 1, with all that may be done to it, or a vector."""
    lists = {"dense": {"positions"}, "lazy": {"features"}, "decayed": {"features", "last"}}[mode]
    given = lists | {"factor"} | ({"copy"} if has_copy else set())
    pointers = {"weight": "*fp32", "exp_avg": f"*{moments}", "exp_avg_sq": f"*{moments}", "grad": f"*{grad}"}
    return Case(
        row_adam.row_adam_kernel,
        configs.row_adam_config(arch, d),
        {**pointers, "step": "*fp32", **{name: OPTIONAL[name] for name in given}},
        ("R", "stride_weight", "stride_grad", "stride_copy", "seed"),
        {
            "D": d,
            "LAZY": mode != "dense",
            "PROJECT": d > 1,
            "RENORMALIZE": d > 1,
            **{f"HAS_{name.upper()}": name in given for name in OPTIONAL},
            **{name: None for name in OPTIONAL if name not in given},
        },
        unaligned=("R", "seed") if d > 1 else ("R", "seed", "stride_weight", "stride_grad", "stride_copy"),
        floats=FLOATS,
    )
