from benchmarks.compiled.case import Case
from sampled_sae.kernels import batch_topk, configs

CUT = {"histograms": "*i64", "counts": "*i32"}


def cases(arch: str) -> dict[str, Case]:
    config = configs.radix_config(arch)
    pool = {"z": "*fp32", **CUT}
    kept = {"kept_values": "*fp32", "tokens": "*i32", "features": "*i32"}
    entries = {"values": "*fp32", "keys": "*i64", **kept, **CUT}
    integers = ("N", "n", "n_tokens", "n_features")
    free = ("n", "n_tokens")
    return {
        "pool": Case(
            batch_topk.write_pool_kernel, config, pool, ("N",), {"copy": None, "HAS_COPY": False, "TILES": 16}
        ),
        "pool and bf16 copy": Case(
            batch_topk.write_pool_kernel,
            config,
            pool | {"copy": "*bf16"},
            {"N": "i64"},
            {"HAS_COPY": True, "TILES": 16},
        ),
        "indices": Case(
            batch_topk.write_indices_kernel, config, {"scores": "*fp32", "indices": "*i64", **CUT}, ("N",), {"TILES": 1}
        ),
        "entries": Case(
            batch_topk.write_entries_kernel, config, entries, integers, {"NARROW": True, "TILES": 1}, unaligned=free
        ),
        "entries, wide keys": Case(
            batch_topk.write_entries_kernel, config, entries, integers, {"NARROW": False, "TILES": 2}, unaligned=free
        ),
    }
