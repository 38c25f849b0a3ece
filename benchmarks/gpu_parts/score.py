"""The score kernel against cuBLAS's product, with its epilogue and without, at the widths of real models.

Decides up to which d scores are fused into the product (LARGEST_FUSED_D of kernels/configs.py).
"""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.gpu_parts.ceilings import DTYPES, widths
from benchmarks.gpu_parts.compiling import Named, compile_all, small
from benchmarks.gpu_parts.plain_product import plain_product
from benchmarks.gpu_parts.visit import Row, Visit, dtype_name, failure, operands
from benchmarks.kernels.operation import some
from benchmarks.measure import product
from benchmarks.workloads import Workload
from sampled_sae.impl.triton.scores import chunked_statistics
from sampled_sae.kernels.column_scores import column_statistics
from sampled_sae.support.timing import Call, interleaved, spread
from sampled_sae.testing import relative_error

SCORES = ("l2", "entropy")
# float32 sums of bf16 products in another order
TOLERANCE = 1e-3
CHECKED_FEATURES = 256
# for a check and a round
LEAST_SECONDS = 2
FLOOR = "cuBLAS product"


def run(visit: Visit) -> None:
    compile_all(visit, kernels, [(w, visit.device, dtype) for dtype in DTYPES for w in small(visit, widths(visit))])
    cases = [(w, dtype) for dtype in DTYPES for w in widths(visit)]
    for i, (w, dtype) in enumerate(cases):
        row = {"dtype": dtype_name(dtype), **w.columns()}
        visit.attempt({"name": "all", **row}, compared, visit, row, w, dtype, len(cases) - i, least=LEAST_SECONDS)


def compared(visit: Visit, same: Row, w: Workload, dtype: torch.dtype, of: int) -> list[Row]:
    """The rows of one width and dtype, the first of so many; a form whose result is wrong has a note and no figures."""
    x, W = operands(w, visit.device, dtype)
    exact = exact_results(x, W)
    calls: dict[str, Call] = {FLOOR: product(x, W)}
    rows = []
    for name, call in forms(x, W).items():
        try:
            check(name, call(), exact)
            calls[name] = call
        except Exception as error:
            rows.append({"name": name, **same, "note": failure(error)})
    samples = interleaved(calls, visit.device, visit.rounds, visit.share(of), queued=True)
    for name, own in samples.items():
        ratio = spread([a / f for a, f in zip(own, samples[FLOOR])]).ms
        rows.append({"name": name, **same, **vars(spread(own)), "of product": ratio})
    return rows


def kernels(w: Workload, device: str, dtype: torch.dtype) -> list[Named]:
    """To be compiled."""
    x, W = operands(w, device, dtype)
    return [(f"{name}, {w.name}, {dtype_name(dtype)}", call) for name, call in forms(x, W).items()]


def forms(x: torch.Tensor, W: torch.Tensor) -> dict[str, Call]:
    b = torch.zeros(len(W), device=W.device)
    return {
        "Triton product, written": partial(plain_product, x, W, True),
        "Triton product, summed": partial(plain_product, x, W, False),
        **{f"fused {score}": partial(column_statistics, x, W, b, score) for score in SCORES},
        **{f"chunked {score}": partial(chunked_statistics, x, W, b, score) for score in SCORES},
    }


def exact_results(x: torch.Tensor, W: torch.Tensor) -> dict[str, torch.Tensor]:
    """In float64 for some of all features, by the last word of a form's name."""
    z = x.double() @ W[checked(len(W), x)].double().t()
    a = z.relu()
    return {
        "written": z.t(),
        "summed": z.sum(0),
        "l2": a.square().sum(0, keepdim=True),
        "entropy": torch.stack((a.sum(0), torch.xlogy(a, a).sum(0))),
    }


def check(name: str, result: torch.Tensor, exact: dict[str, torch.Tensor]) -> None:
    """Raises ValueError unless what a form returned is right for some of all features."""
    kind = name.rsplit(" ", 1)[1]
    if kind == "written":
        pairs = [(result[checked(len(result), result)], exact[kind])]
    elif kind == "summed":
        pairs = [(result.sum(0)[checked(result.shape[1], result)], exact[kind])]
    else:
        pairs = list(zip(result[:, checked(result.shape[1], result)], exact[kind]))
    for found, right in pairs:
        error = relative_error(found, right)
        allowed = TOLERANCE + 4 * torch.finfo(found.dtype).eps
        if not error <= allowed:
            raise ValueError(f"error {error:.3g}, allowed are {allowed:.3g}")


def checked(n_features: int, like: torch.Tensor) -> torch.Tensor:
    return some(n_features, CHECKED_FEATURES, str(like.device))
