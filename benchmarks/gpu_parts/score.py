"""The score kernel against cuBLAS's product, with its epilogue and without, at the widths of real models.

Decides up to which d scores are fused into the product (LARGEST_FUSED_D of kernels/configs.py).
"""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.gpu_parts.ceilings import widths
from benchmarks.gpu_parts.plain_product import plain_product
from benchmarks.gpu_parts.visit import Visit, operands
from benchmarks.measure import product
from sampled_sae.kernels.column_scores import column_statistics
from sampled_sae.testing import relative_error
from sampled_sae.timing import interleaved, spread
from sampled_sae.triton_impl.scores import chunked_statistics

# float32 sums of bf16 products in another order
TOLERANCE = 1e-3


def run(visit: Visit) -> None:
    for w in widths(visit):
        for dtype in (torch.bfloat16, torch.float32):
            x, W = operands(w, visit.device, dtype)
            b = torch.zeros(w.F, device=visit.device)
            check(x, W, b)
            calls = {
                "cuBLAS product": product(x, W),
                "Triton product, written": partial(plain_product, x, W, True),
                "Triton product, summed": partial(plain_product, x, W, False),
                **{f"fused {score}": partial(column_statistics, x, W, b, score) for score in ("l2", "entropy")},
                "chunked l2": partial(chunked_statistics, x, W, b, "l2"),
                "chunked entropy": partial(chunked_statistics, x, W, b, "entropy"),
            }
            samples = interleaved(calls, visit.device, visit.rounds)
            floor = samples["cuBLAS product"]
            for name, own in samples.items():
                ratio = spread([a / f for a, f in zip(own, floor)]).ms
                kind = str(dtype).removeprefix("torch.")
                visit.add({"name": name, "dtype": kind, **w.columns(), **vars(spread(own)), "of product": ratio})
            visit.release()


def check(x: torch.Tensor, W: torch.Tensor, b: torch.Tensor) -> None:
    """Raises unless all forms agree on some features."""
    some = slice(0, 256)
    z = x.double() @ W[some].double().t()
    for name, value, exact in (
        ("product, written", plain_product(x, W[some], True), z.t()),
        ("product, summed", plain_product(x, W[some], False).sum(0), z.sum(0)),
        ("fused", column_statistics(x, W[some], b[some], "l2")[0], z.relu().square().sum(0)),
        ("chunked", chunked_statistics(x, W[some], b[some], "l2")[0], z.relu().square().sum(0)),
    ):
        error = relative_error(value, exact)
        allowed = TOLERANCE + 4 * torch.finfo(value.dtype).eps
        if not error <= allowed:
            raise RuntimeError(f"{name}: error {error:.3g} at d={x.shape[1]}, {x.dtype}; allowed are {allowed:.3g}")
