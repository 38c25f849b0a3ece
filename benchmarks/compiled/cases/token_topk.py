from benchmarks.compiled.case import Case
from sampled_sae.kernels import configs, token_topk

VECTORS = {"b": "*fp32", "scale": "*fp32"}
ROWS = {"z": "*fp32", "copy": "*bf16", **VECTORS}
MERGED = {"best_values": "*fp32", "best_features": "*i32", "z": "*fp32", **VECTORS}
ALL = {"HAS_BIAS": True, "HAS_SCALE": True}


def cases(arch: str) -> dict[str, Case]:
    found = {f"rows of {P}": rows(arch, P) for P in (512, 2048, 4096, 8192)}
    found["longer rows"] = Case(
        token_topk.keep_long_rows_kernel,
        configs.long_rows_config(arch),
        ROWS,
        ("k",),
        {"P": 32768, "HAS_COPY": True, **ALL},
    )
    return found | {f"merge {C} into {k}": merge(C, k) for C, k in ((1024, 32), (4096, 64), (8192, 512))}


def rows(arch: str, P: int) -> Case:
    constexprs = {"HAS_COPY": True, **ALL}
    return Case(token_topk.keep_rows_kernel, configs.rows_config(arch, P), ROWS, ("P", "k"), constexprs)


def merge(C: int, k: int) -> Case:
    return Case(
        token_topk.merge_rows_kernel,
        configs.merge_config(C),
        MERGED,
        ("C", "k", "first"),
        {"features": None, "HAS_FEATURES": False, "BK": k, **ALL},
        unaligned=("first",),
    )
