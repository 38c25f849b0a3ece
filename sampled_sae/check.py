"""`sampled-sae check`: every operation on this machine against float64, beside eager PyTorch's rounding."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import functional as F
from . import reference, testing
from .config import SampledSAEConfig
from .impl.adam_step import rows_first
from .impl.row_gradients import RowGradient
from .optim import MODES, RowAdam
from .sae import SampledSAE

Shape = tuple[int, int, int]
Compared = list[testing.Comparison]
RULES: dict[str, dict[str, Any]] = {
    "l=1": {"k": 2, "l": 1},
    "l=4": {"k": 2, "l": 4},
    "l=4 entropy": {"k": 2, "l": 4, "score": "entropy"},
    "l=4 token": {"k": 2, "l": 4, "select": "token"},
    "l=None": {"k": 2, "l": None},
    "l=None token": {"k": 2, "l": None, "select": "token"},
}
SHAPES = ((1, 3, 9), (33, 17, 252), (70, 40, 507))
LARGE = (512, 768, 8192)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class CheckResult:
    """One line of the table; errors are relative, of the worst tensor."""

    op: str
    inputs: str
    dtype: str
    shape: Shape
    error: float
    eager_error: float
    failure: str = ""


def run_checks(impl: str, device: str, quick: bool = False) -> Iterator[CheckResult]:
    """The rows of the suite for one implementation, as they come.

    Args:
        impl: "triton", "torch" or "reference".
        device: where the tensors go.
        quick: two shapes, float32 and bfloat16.
    """
    dtypes = DTYPES[:2] if quick else DTYPES
    shapes = SHAPES[:2] if quick else SHAPES
    if torch.device(device).type == "cuda" and not quick:
        shapes = (*shapes, LARGE)
    for shape in shapes:
        for dtype in dtypes:
            for score in ("l2", "entropy", "uniform"):
                check = partial(scores_check, impl, device, score)
                yield checked("column_scores " + score, "normal", dtype, shape, check)
            for name, rule in RULES.items():
                for kind in testing.MAKERS:
                    # entropies of whole numbers tie only up to rounding
                    if kind != "whole numbers" or rule.get("score") != "entropy":
                        check = partial(step_check, impl, device, kind, rule)
                        yield checked("step " + name, kind, dtype, shape, check)
            yield checked("threshold", "normal", dtype, shape, partial(threshold_check, impl, device))
            if shape[0] > 1:  # the residual of one token has no variance
                for aux_pool in (None, 8):
                    check = partial(aux_check, impl, device, aux_pool)
                    yield checked(f"aux loss, aux_pool={aux_pool}", "normal", dtype, shape, check)
        yield checked("candidate pool", "whole numbers", torch.float32, shape, partial(pool_check, impl, device))
        for mode in MODES:
            check = partial(optimizer_check, impl, device, mode)
            yield checked(f"RowAdam {mode}", "normal", torch.float32, shape, check)


def checked(op: str, kind: str, dtype: torch.dtype, shape: Shape, check: Callable) -> CheckResult:
    """The row of one check; what it raises is its failure."""
    row = CheckResult(op, kind, str(dtype).removeprefix("torch."), shape, 0.0, 0.0)
    try:
        comparisons = check(shape, dtype)
    except Exception as error:
        return dataclasses.replace(row, failure=f"{type(error).__name__}: {error}")
    worst = max(comparisons, key=lambda c: c.error / c.allowed, default=None)
    if worst is None:
        return row
    failure = "" if worst.passed else f"{worst.name}: allowed are {worst.allowed:.3g}"
    return dataclasses.replace(row, error=worst.error, eager_error=worst.eager_error, failure=failure)


def scores_check(impl: str, device: str, score: str, shape: Shape, dtype: torch.dtype) -> Compared:
    t = testing.normal(*shape, dtype)
    x, W_enc, b_enc = (t[name].to(device) for name in ("x", "W_enc", "b_enc"))
    exact = reference.column_scores(reference.encode(x.double(), W_enc.double(), b_enc.double()), score)
    eager = reference.column_scores(torch.relu(x @ W_enc + b_enc).float(), score)
    return [testing.comparison("scores", F.column_scores(x, W_enc, b_enc, score, impl=impl), eager, exact)]


def pool_check(impl: str, device: str, shape: Shape, dtype: torch.dtype) -> Compared:
    pool: Callable[[Tensor, int], Tensor] = F.candidate_pool
    if impl == "triton":
        from .impl.triton.pool import top_pool

        pool = top_pool
    scores = testing.whole_numbers(*shape)["b_enc"].abs().to(device)
    for size in (1, len(scores) // 2, len(scores)):
        if not torch.equal(pool(scores, size), reference.candidate_pool(scores, size)):
            raise AssertionError(f"another pool of {size} than the specification's")
    return []


def step_check(impl: str, device: str, kind: str, rule: dict[str, Any], shape: Shape, dtype: torch.dtype) -> Compared:
    def step(x: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor) -> tuple[object, Tensor]:
        codes = F.sampled_topk(x - b_dec, W_enc, b_enc, impl=impl, **rule)
        return codes, F.decode(codes, W_dec, b_dec, impl=impl)

    maker = testing.MAKERS[kind]
    if kind == "whole numbers":
        tensors = maker(*shape, dtype)
    else:
        tensors = testing.separated(maker, shape, dtype, least=3e-6, **rule)
    tensors = {name: t.to(device) for name, t in tensors.items()}
    return testing.assert_matches_reference(step, tensors, **rule)


def small_sae(impl: str, device: str, shape: Shape, dtype: torch.dtype) -> SampledSAE:
    tensors = testing.normal(*shape, dtype)
    cfg = SampledSAEConfig(d_in=shape[1], d_sae=shape[2], k=2, l=None, impl=impl, aux_coefficient=0.0)
    sae = SampledSAE(cfg, dtype=dtype, device=device)
    with torch.no_grad():
        for name in testing.NAMES[1:]:
            sae.get_parameter(name).copy_(tensors[name])
    return sae


def threshold_check(impl: str, device: str, shape: Shape, dtype: torch.dtype) -> Compared:
    sae = small_sae(impl, device, shape, dtype).eval()
    x = testing.normal(*shape, dtype)["x"].to(device)
    a = testing.exact_activations({"x": x, **{n: sae.get_parameter(n).detach() for n in testing.NAMES[1:]}})
    ordered = a.flatten().sort(descending=True).values
    at = len(ordered) // 10 + 1
    sae.threshold.fill_((ordered[at - 1] + ordered[at]) / 2)
    with torch.no_grad():
        codes = sae.encode_sparse(x)
    exact = torch.where(a > sae.threshold, a, 0)
    if not torch.equal(codes.to_dense() != 0, exact != 0):
        raise AssertionError("other entries than those above the threshold")
    return [testing.comparison("codes", codes.to_dense(), exact.to(dtype), exact)]


def aux_check(impl: str, device: str, aux_pool: int | None, shape: Shape, dtype: torch.dtype) -> Compared:
    x = testing.normal(*shape, dtype, seed=1)["x"].to(device)
    found = []
    for name, kind in ((impl, dtype), ("reference", dtype), ("reference", torch.float64)):
        sae = small_sae("reference", device, shape, dtype).to(kind)
        aux: dict[str, Any] = {"aux_coefficient": 1.0, "dead_after": 5, "k_aux": 3, "aux_pool": aux_pool}
        sae.cfg = dataclasses.replace(sae.cfg, impl=name, **aux)
        sae.tokens_since_active[::2] = 5
        sae(x.to(kind)).aux.backward()
        found.append({n: p.grad for n, p in sae.named_parameters() if p.grad is not None})
    ours, eager, exact = found
    return [testing.comparison(f"grad {n}", ours[n], eager[n], exact[n]) for n in ("W_enc", "b_enc", "W_dec")]


def optimizer_check(impl: str, device: str, mode: str, shape: Shape, dtype: torch.dtype) -> Compared:
    """Three steps with gradients of other features each time; exact are those of impl="torch" in float64."""
    found = []
    for name, kind in ((impl, dtype), ("torch", torch.float64)):
        sae = small_sae("reference", device, shape, dtype).to(kind)
        sae.normalize_decoder()
        sae.cfg = dataclasses.replace(sae.cfg, impl=name)
        optimizer = RowAdam(sae, lr=0.01, mode=mode, weight_decay=0.1)
        for step in range(3):
            slopes = testing.normal(*shape, dtype, seed=step + 1)
            features = torch.arange(step % shape[2], shape[2], 2, device=device)
            for parameter in ("W_enc", "b_enc", "W_dec"):
                slope = rows_first(parameter, slopes[parameter]).to(device, kind)[features]
                rows = torch.zeros_like(slope)
                rows.grad = slope
                sae.row_grads.append(RowGradient(parameter, features, rows))
            sae.b_dec.grad = slopes["b_dec"].to(device, kind)
            optimizer.step()
            optimizer.zero_grad()
        found.append({n: p.detach() for n, p in sae.named_parameters()})
    ours, exact = found
    return [testing.comparison(n, ours[n], value.to(dtype), value) for n, value in exact.items()]


HEADING = (
    "| impl | op | inputs | dtype | (B, d, F) | error | eager PyTorch | verdict |\n|---|---|---|---|---|---:|---:|---|"
)


def line(impl: str, row: CheckResult) -> str:
    """The row in the table under HEADING."""
    verdict = f"FAILED: {row.failure}" if row.failure else "ok"
    columns = (impl, row.op, row.inputs, row.dtype, row.shape, f"{row.error:.1e}", f"{row.eager_error:.1e}", verdict)
    return "| " + " | ".join(map(str, columns)) + " |"
