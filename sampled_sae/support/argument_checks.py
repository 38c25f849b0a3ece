"""Checks of arguments: each error names the argument, its value and what is allowed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from decimal import Decimal
from itertools import pairwise
from numbers import Integral, Real
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

SCORES = ("l2", "l2_squared", "entropy", "uniform")
HALF = (torch.float16, torch.bfloat16)
FLOATS = (*HALF, torch.float32, torch.float64)
LARGEST_INTEGER = 2**63 - 1
# values of a tensor that are looked at together
PIECE = 1 << 24
Choice = TypeVar("Choice")
Number = TypeVar("Number", int, float)


def check_choice(name: str, value: Any, allowed: Sequence[Choice]) -> Choice:
    """That of `allowed` which equals `value`: a str of numpy comes back as Python's."""
    for choice in allowed:
        if isinstance(value, type(choice)) and value == choice:
            return choice
    raise ValueError(f"{name}={value!r}: must be one of {', '.join(map(repr, allowed))}")


def check_flag(name: str, value: Any) -> bool:
    """`value` as a bool; numpy's are taken too, 0 and 1 are not."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name}={value!r}: must be True or False")
    return bool(value)


def plain_number(value: Any) -> int | float | None:
    """`value` as an int or a float, be it of Python, numpy, torch (0-dim), decimal or fractions.

    None for whatever is no real number, bools and strings among it; inf for what no float can hold.
    """
    if isinstance(value, (Tensor, np.ndarray)) and value.ndim == 0:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, (Real, Decimal)):
        return None
    try:
        number = float(value)
    except (OverflowError, ValueError):  # too large, or a signalling NaN
        return math.inf
    return int(value) if isinstance(value, Integral) else number


def check_integer(name: str, value: Any, least: int) -> int:
    """`value` as an int; whole numbers of numpy, torch and the like are taken too, and floats without a fraction."""
    allowed = f"{name}={value!r}: must be a whole number >= {least}"
    number = plain_number(value)
    if isinstance(value, bool):
        raise ValueError(allowed)
    if number is None or (math.isfinite(number) and number != int(number)):
        raise TypeError(allowed)
    if not math.isfinite(number) or number > LARGEST_INTEGER:
        raise ValueError(f"{allowed} and below 2**63")
    if number < least:
        raise ValueError(allowed)
    return int(number)


def check_groups(groups: Any, n_features: int) -> tuple[int, ...]:
    """Numbers of features as ints, ascending from 1, the last of them F."""
    allowed = f"groups={groups!r}: must be whole numbers that ascend from 1 to d_sae={n_features}, the last of them"
    found = _each(groups, lambda size: check_integer("groups", size, 1), allowed)
    if not found or found[-1] != n_features or any(a >= b for a, b in pairwise(found)):
        raise ValueError(allowed)
    return found


def check_device(device: torch.device | str) -> torch.device:
    """The CPU or a CUDA device that is there."""
    try:
        found = torch.device(device)
    except RuntimeError:
        found = None
    if found is None or found.type not in ("cpu", "cuda"):
        raise ValueError(f"device={str(device)!r}: must be 'cpu', 'cuda' or 'cuda:N'")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device={str(device)!r}: torch {torch.__version__} sees {torch.cuda.device_count()} GPUs here"
        )
    return found


def check_number(name: str, value: Any, least: float, most: float | None) -> float:
    """`value` as an int or a float; numbers of numpy, torch, decimal and fractions are taken too."""
    allowed = f">= {least}" + ("" if most is None else f" and <= {most}")
    return _finite(name, value, allowed, lambda number: least <= number <= (math.inf if most is None else most))


def check_positive(name: str, value: Any, most: float | None = None) -> float:
    """As `check_number`, without 0."""
    allowed = "> 0" if most is None else f"in (0, {most}]"
    return _finite(name, value, allowed, lambda number: 0 < number <= (math.inf if most is None else most))


def _finite(name: str, value: Any, allowed: str, holds: Callable[[float], bool]) -> float:
    number = plain_number(value)
    message = f"{name}={value!r}: must be a finite number {allowed}"
    if number is None:
        raise TypeError(message)
    if not math.isfinite(number) or not holds(number):
        raise ValueError(message)
    return number


def check_scales(name: str, value: Any, layers: int) -> float | tuple[float, ...]:
    """A positive number, or of several layers a sequence of as many."""
    if layers == 1 or plain_number(value) is not None:
        return check_positive(name, value)
    allowed = f"{name}={value!r}: must be a number > 0, or a sequence of {layers}, one a layer"
    found = _each(value, lambda number: float(check_positive(name, number)), allowed)
    if len(found) != layers:
        raise ValueError(allowed)
    return found


def _each(values: Any, check: Callable[[Any], Number], allowed: str) -> tuple[Number, ...]:
    """What `check` makes of each in a sequence; whatever is wrong is said as `allowed`."""
    if isinstance(values, (str, bytes, dict, set)) or not isinstance(values, Iterable):
        raise TypeError(allowed)
    try:
        return tuple(check(value) for value in values)
    except (TypeError, ValueError) as error:
        raise type(error)(allowed) from None


def check_budget(k: Any, l: Any, n_features: int, select: str) -> tuple[float, float | None]:
    """(k, l) as plain numbers: k in (0, F], whole when each token has its own budget; l >= 1 or None."""
    number = plain_number(k)
    if number is None:
        raise TypeError(f"k={k!r}: must be a number in (0, {n_features}]")
    if not 0 < number <= n_features:
        raise ValueError(f"k={k!r}: must be in (0, {n_features}], the number of features")
    if select == "token" and number != int(number):
        raise ValueError(f"k={k!r}: select='token' keeps a whole number of features in each token")
    return number, None if l is None else check_number("l", l, 1, None)


def check_activations(x: Any, d_in: int, name: str = "x", may_be_empty: bool = False) -> None:
    """[..., d_in], floating, at least one token unless it `may_be_empty`. Finiteness is `check_finite`'s."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}={type(x).__name__}: must be a torch.Tensor of shape [..., {d_in}]")
    if x.dtype not in FLOATS:
        raise TypeError(f"{name}.dtype={x.dtype}: must be one of {', '.join(map(str, FLOATS))}")
    if x.layout != torch.strided:
        raise TypeError(f"{name}.layout={x.layout}: must be torch.strided, a dense tensor")
    if x.dim() < 1 or x.shape[-1] != d_in:
        raise ValueError(f"{name}.shape={tuple(x.shape)}: the last dimension must be d_in={d_in}")
    if x.numel() == 0 and not may_be_empty:
        raise ValueError(f"{name}.shape={tuple(x.shape)}: the batch is empty; at least one token is needed")


def check_finite(x: Tensor, name: str = "x", where: str = "") -> None:
    """One pass over x: the sum is NaN or inf where an entry is; the exact check runs only then."""
    if torch.isfinite(x.detach().sum(dtype=torch.float64)):
        return
    finite = torch.isfinite(x)
    if not finite.all():
        first = tuple((~finite).nonzero()[0].tolist())
        count = int((~finite).sum())
        raise ValueError(f"{name}{where}: {count} of {x.numel()} values are NaN or inf, the first at {first}")


def bad_values(t: Tensor, may_be_infinite: bool = False) -> int:
    """How many values are NaN, or inf where they may not be; a piece after another, which needs little memory."""
    # of a matrix that is read the other way round no copy is made
    flat = (t.t() if t.dim() == 2 and not t.is_contiguous() else t).reshape(-1)
    return sum(int((part.isnan() if may_be_infinite else ~part.isfinite()).sum()) for part in flat.split(PIECE))


def check_encoder(x: Any, W_enc: Any, b_enc: Any, scale: Any = None) -> None:
    """x [..., d], W_enc [d, F], b_enc [F], scale [F] or None, on one device and of one dtype."""
    if not isinstance(W_enc, Tensor) or W_enc.dim() != 2 or W_enc.numel() == 0:
        raise ValueError(f"W_enc={describe(W_enc)}: must be a tensor of shape [d_in, d_sae]")
    check_activations(x, W_enc.shape[0])
    n_features = W_enc.shape[1]
    vectors = {"b_enc": b_enc, **({} if scale is None else {"scale": scale})}
    for name, value in vectors.items():
        if not isinstance(value, Tensor) or value.shape != (n_features,):
            raise ValueError(f"{name}={describe(value)}: must be a tensor of shape [{n_features}]")
    check_same(x=x, W_enc=W_enc, **vectors)
    check_finite(x)
    if scale is not None and not bool((scale > 0).all()):
        raise ValueError(f"scale: must be > 0 everywhere, its smallest value is {float(scale.min())}")


def check_same(**tensors: Tensor) -> None:
    """One device and one dtype for all."""
    for attribute in ("device", "dtype"):
        seen = {name: getattr(t, attribute) for name, t in tensors.items()}
        if len(set(seen.values())) > 1:
            listed = ", ".join(f"{name} {value}" for name, value in seen.items())
            raise ValueError(f"mixed {attribute}s: {listed}; all must share one {attribute}")


def describe(value: Any) -> str:
    """A value in a message: what may hold many numbers by its kind and shape."""
    if isinstance(value, (Tensor, np.ndarray)):
        kind = "tensor" if isinstance(value, Tensor) else "array"
        return f"{kind} {tuple(value.shape)}"
    return repr(value) if value is None or isinstance(value, (str, Real)) else type(value).__name__


def set_fields(instance: Any, values: dict[str, Any]) -> None:
    """Of a frozen dataclass that is being made."""
    for name, value in values.items():
        object.__setattr__(instance, name, value)


def check_field_names(values: dict[str, Any], config: type, required: set[str]) -> None:
    """ValueError unless `values` are fields of a dataclass, those `required` among them: no silent default."""
    known = {f.name for f in fields(config)}
    unknown, missing = sorted(set(values) - known), sorted(required - set(values))
    if unknown or missing:
        raise ValueError(f"config: unknown fields {unknown}, missing fields {missing}; known: {sorted(known)}")
