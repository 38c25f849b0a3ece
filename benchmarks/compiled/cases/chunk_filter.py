from benchmarks.compiled.case import Case
from sampled_sae.kernels import chunk_filter, configs


def cases(arch: str) -> dict[str, Case]:
    first = Case(chunk_filter.first_threshold_kernel, configs.SCALAR, {"histograms": "*i64", "out": "*fp32"})
    threshold = Case(
        chunk_filter.next_threshold_kernel,
        configs.SCALAR,
        {"smallest": "*fp32", "tau": "*fp32", "count": "*i64", "out": "*fp32"},
        ("n",),
        unaligned=("n",),
    )
    return {
        "whole dictionary": append(arch, False),
        "pool": append(arch, True),
        "first threshold": first,
        "next threshold": threshold,
    }


def append(arch: str, has_features: bool) -> Case:
    return Case(
        chunk_filter.append_above_kernel,
        configs.chunk_filter_config(arch),
        {
            "z": "*fp32",
            "b": "*fp32",
            "scale": "*fp32",
            "features": "*i64",
            "tau": "*fp32",
            "values": "*fp32",
            "keys": "*i64",
            "count": "*i64",
        },
        ("B", "C", "F", "first", "cap", "stride_z"),
        {
            "HAS_BIAS": True,
            "HAS_SCALE": True,
            "HAS_FEATURES": has_features,
            **({} if has_features else {"features": None}),
        },
        unaligned=("B", "first", "cap"),
    )
