from benchmarks.compiled.case import Case
from sampled_sae.kernels import configs, radix

POINTERS = {"values": "*fp32", "histograms": "*i64", "counts": "*i32"}


def cases(arch: str) -> dict[str, Case]:
    config = configs.radix_config(arch)
    cut = Case(radix.count_cut_kernel, config, POINTERS, ("N",), {"TILES": 16})
    return {
        "activate": digits(config, 0, True, {"b": "*fp32", "scale": "*fp32"}, "i32"),
        "second pass": digits(config, 1, False, {}, "i32"),
        "last pass, beyond 2^31": digits(config, 3, False, {}, "i64"),
        "counts at the cut": cut,
    }


def digits(config, i: int, activate: bool, vectors: dict[str, str], integer: str) -> Case:
    return Case(
        radix.count_digits_kernel,
        config,
        POINTERS | vectors,
        {"N": integer, "P": "i32", "n": integer},
        {
            "PASS": i,
            "ACTIVATE": activate,
            "HAS_BIAS": activate,
            "HAS_SCALE": activate,
            "TILES": 16,
            **({} if vectors else {"b": None, "scale": None}),
        },
        unaligned=("n",),
    )
