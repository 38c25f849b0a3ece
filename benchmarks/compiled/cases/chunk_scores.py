from benchmarks.compiled.case import Case
from sampled_sae.kernels import chunk_scores, configs


def cases(arch: str) -> dict[str, Case]:
    return {f"partials {score}": partials(arch, score) for score in ("entropy", "l2")}


def partials(arch: str, score: str) -> Case:
    return Case(
        chunk_scores.chunk_partials_kernel,
        configs.chunk_scores_config(arch),
        {"z": "*fp32", "b": "*fp32", "scale": "*fp32", "partials": "*fp32"},
        ("B", "C", "stride_z"),
        {"SCORE": score, "HAS_BIAS": True, "HAS_SCALE": True, "FAST_LOG": arch != "gfx942"},
        unaligned=("B",),
    )
