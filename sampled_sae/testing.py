"""Checks for any SAE layer: inputs that find mistakes, and the rule "no worse than eager PyTorch".

A project that computes BatchTopK, TopK or Sampled-SAE with kernels of its own checks a training step like this:

    from sampled_sae import testing

    def step(x, W_enc, b_enc, W_dec, b_dec):
        ...
        return codes, x_hat  # dense [B, F] or SparseCodes, and [B, d]

    rule = {"k": 4, "l": None}
    for shape in testing.ODD_SHAPES:
        testing.assert_matches_reference(step, testing.whole_numbers(*shape), **rule)
        testing.assert_matches_reference(step, testing.normal(*shape, dtype=torch.bfloat16), **rule)

Every maker returns x [B, d], W_enc [d, F], b_enc [F], W_dec [F, d], b_dec [d] by name. A step computes
relu((x - b_dec) W_enc + b_enc), selects, and decodes with b_dec added.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import reference
from .codes import SparseCodes
from .config import batch_budget, pool_size

NAMES = ("x", "W_enc", "b_enc", "W_dec", "b_dec")
# (B, d, F): one of each; primes; tails of every power of two; more features than a tile
ODD_SHAPES = ((1, 1, 5), (7, 5, 37), (33, 17, 252), (123, 50, 507))

Problem = dict[str, Tensor]
Step = Callable[..., tuple[Any, Tensor]]


def normal(B: int, d: int, F: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Problem:
    """Gaussian, rounded to `dtype`; about half of the activations are positive.

    In 16 bits b_dec is 0, so that x - b_dec has one value whatever it is computed in.
    """
    g = torch.Generator().manual_seed(seed)
    widths = (1.0, d**-0.5, 0.3, d**-0.5, 0.3)
    made = (w * torch.randn(s, generator=g, dtype=torch.float64) for s, w in zip(shapes_of(B, d, F), widths))
    tensors = {name: t.to(dtype) for name, t in zip(NAMES, made)}
    if dtype.itemsize == 2:
        tensors["b_dec"].zero_()
    return tensors


def whole_numbers(
    B: int, d: int, F: int, dtype: torch.dtype = torch.float32, seed: int = 0, largest: int = 2
) -> Problem:
    """Small whole numbers: every sum is exact in any order and ties abound; codes must be equal bit for bit."""
    g = torch.Generator().manual_seed(seed)
    made = (torch.randint(-largest, largest + 1, s, generator=g).to(dtype) for s in shapes_of(B, d, F))
    return dict(zip(NAMES, made))


def dead_columns(B: int, d: int, F: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Problem:
    """Gaussian, but three features in four never fire: by their bias, or because their weights are zero."""
    made = normal(B, d, F, dtype, seed)
    every = torch.arange(F)
    made["b_enc"][every % 4 == 1] = -100.0
    made["W_enc"][:, every % 4 == 2] = 0
    made["b_enc"][every % 4 == 2] = 0
    made["b_enc"][every % 4 == 3] = -50.0
    return made


def heavy_tails(B: int, d: int, F: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Problem:
    """Gaussian with norms spread over two orders of magnitude, tokens and features: some take most of the budget."""
    made = normal(B, d, F, torch.float64, seed)
    g = torch.Generator().manual_seed(seed + 1)
    made["x"] *= 10 ** (2 * torch.rand(B, 1, generator=g, dtype=torch.float64) - 1)
    made["W_enc"] *= 10 ** (2 * torch.rand(F, generator=g, dtype=torch.float64) - 1)
    tensors = {name: t.to(dtype) for name, t in made.items()}
    if dtype.itemsize == 2:
        tensors["b_dec"].zero_()
    return tensors


MAKERS: dict[str, Callable[..., Problem]] = {
    "normal": normal,
    "whole numbers": whole_numbers,
    "dead columns": dead_columns,
    "heavy tails": heavy_tails,
}


def shapes_of(B: int, d: int, F: int) -> tuple[tuple[int, ...], ...]:
    """The shapes of NAMES."""
    return (B, d), (d, F), (F,), (F, d), (d,)


def separated(
    maker: Callable[..., Problem],
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    scale: Tensor | None = None,
    least: float = 2e-5,
    **rule: Any,
) -> Problem:
    """The first problem by seed whose pool and selection no rounding below `least` can change.

    Raises:
        ValueError: none among 200 seeds.
    """
    for seed in range(200):
        tensors = maker(*shape, dtype, seed)
        if margin(exact_activations(tensors, scale), **rule) > least:
            return tensors
    raise ValueError(f"shape={shape}: no problem with a margin above {least} among 200 seeds; take a smaller one")


def exact_activations(tensors: Problem, scale: Tensor | None = None) -> Tensor:
    """relu((x - b_dec) W_enc + b_enc) * scale in float64."""
    t = {name: value.double() for name, value in tensors.items()}
    return reference.encode(t["x"] - t["b_dec"], t["W_enc"], t["b_enc"], scale)


def margin(
    a: Tensor, k: float, l: float | None = None, score: str = "l2", pool: str = "top", select: str = "batch"
) -> float:
    """Smallest relative gap between what is kept of a [B, F] and what is not, in the pool and in the selection."""
    gaps = []
    size = pool_size(k, l, a.shape[1])
    if size < a.shape[1]:
        scores = reference.column_scores(a, score)
        if score != "uniform":  # 0 or 1, without rounding
            gaps.append(scores.sort(descending=True).values[size - 1 : size + 1])
        a = a[:, reference.candidate_pool(scores, size)]
    if select == "batch":
        n = batch_budget(a.shape[0], k)
        gaps.append(a.flatten().sort(descending=True).values[n - 1 : n + 1])
    elif k < a.shape[1]:
        gaps += list(a.sort(dim=1, descending=True).values[:, int(k) - 1 : int(k) + 1])
    smallest = min(((g[0] - g[1]) / g[0] for g in gaps if len(g) == 2 and g[0] > 0), default=1.0)
    positive = a[a > 0]
    return min(float(smallest), float(positive.min()) if len(positive) else 1.0)


@dataclass(frozen=True)
class Comparison:
    """One tensor of a step against float64.

    Attributes:
        name: "codes", "x_hat" or the parameter whose gradient it is.
        error, eager_error: ||value - exact|| / ||exact||, of the step and of eager PyTorch in the same dtype.
        allowed: 2 * eager_error and a rounding of the result.
    """

    name: str
    error: float
    eager_error: float
    allowed: float

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed


def comparison(name: str, ours: Tensor, eager: Tensor, exact: Tensor) -> Comparison:
    """Of one tensor computed by us, by eager PyTorch and in float64."""
    error, eager_error = relative_error(ours, exact), relative_error(eager, exact)
    return Comparison(name, error, eager_error, 2 * eager_error + 4 * torch.finfo(ours.dtype).eps)


def assert_matches_reference(step: Step, tensors: Problem, gradients: bool = True, **rule: Any) -> list[Comparison]:
    """Holds a training step to the specification, and its rounding to that of eager PyTorch.

    Args:
        step: (x, W_enc, b_enc, W_dec, b_dec) -> (codes, x_hat); differentiable where `gradients` is True.
        tensors: from one of the makers; for others than `whole_numbers` best from `separated`.
        rule: k, l, score, pool, select, scale of `sampled_sae.functional.sampled_topk`.

    Returns:
        The comparisons made; the loss whose gradients are compared is mean ||x - x_hat||^2.

    Raises:
        AssertionError: other entries than the specification's are kept, or an error is larger than allowed.
        ValueError: float32 rounding alone could change what these tensors keep.
    """
    scale = rule.pop("scale", None)
    whole = all(bool((t == t.round()).all()) for t in tensors.values()) and scale is None
    a = exact_activations(tensors, None if scale is None else scale.double())
    if not whole and margin(a, **rule) <= 2e-6:
        raise ValueError("tensors: float32 rounding alone could change what is kept; make them with `separated`")

    exact = outcome(reference_step(rule, scale), {name: t.double() for name, t in tensors.items()}, gradients)
    eager = outcome(eager_step(rule, scale), tensors, gradients)
    ours = outcome(step, tensors, gradients)
    kept, expected = ours["codes"] != 0, exact["codes"] != 0
    wrong = (kept != expected).nonzero()
    if len(wrong):
        i, j = wrong[0].tolist()
        verb = "kept" if kept[i, j] else "dropped"
        raise AssertionError(
            f"{len(wrong)} of {int(expected.sum())} entries differ; the first: token {i}, feature {j} is {verb}, "
            f"its activation is {float(a[i, j]):.9g}"
        )
    if whole and not torch.equal(ours["codes"].double(), exact["codes"]):
        raise AssertionError("codes: whole numbers must come out exactly")
    comparisons = [comparison(name, ours[name], eager[name], value) for name, value in exact.items()]
    for c in comparisons:
        if not c.passed:
            raise AssertionError(
                f"{c.name}: error {c.error:.3g} against float64, eager PyTorch has {c.eager_error:.3g}, "
                f"allowed are {c.allowed:.3g}"
            )
    return comparisons


def reference_step(rule: dict[str, Any], scale: Tensor | None = None) -> Step:
    """The specification, in the dtype of its inputs."""

    def step(x: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor) -> tuple[Tensor, Tensor]:
        factor = None if scale is None else scale.to(x.dtype)
        codes = reference.sampled_topk(x - b_dec, W_enc, b_enc, scale=factor, **rule)
        return codes, reference.decode(codes, W_dec, b_dec)

    return step


def eager_step(rule: dict[str, Any], scale: Tensor | None = None) -> Step:
    """The step as eager PyTorch rounds it in the dtype of its inputs, keeping the entries that float64 keeps."""

    def step(x: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor) -> tuple[Tensor, Tensor]:
        exact = (t.detach().double() for t in (x, W_enc, b_enc, W_dec, b_dec))
        kept = reference_step(rule, scale)(*exact)[0] != 0
        a = torch.relu((x - b_dec) @ W_enc + b_enc)
        codes = torch.where(kept, a if scale is None else a * scale.to(a.dtype), 0)
        return codes, codes @ W_dec + b_dec

    return step


def outcome(step: Step, tensors: Problem, gradients: bool) -> dict[str, Tensor]:
    """Dense codes, x_hat and gradients of a step, by name."""
    leaves = {name: t.clone().requires_grad_(gradients) for name, t in tensors.items()}
    codes, x_hat = step(*leaves.values())
    codes = codes.to_dense() if isinstance(codes, SparseCodes) else codes
    found = {"codes": codes.detach(), "x_hat": x_hat.detach()}
    if gradients:
        x = leaves["x"].to(x_hat.dtype) if x_hat.dtype != leaves["x"].dtype else leaves["x"]
        reference.reconstruction_loss(x, x_hat).backward()
        found |= {f"grad {name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return found


def relative_error(value: Tensor, exact: Tensor) -> float:
    """||value - exact|| / ||exact||; the plain norm where exact is zero."""
    scale = float(exact.norm())
    return float((value.double() - exact.to(value.device)).norm()) / (scale if scale > 0 else 1.0)
