"""Checks of arguments: each error names the argument, its value and what is allowed."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

SCORES = ("l2", "l2_squared", "entropy", "uniform")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_choice(name: str, value: Any, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r}: must be one of {', '.join(map(repr, allowed))}")


def check_integer(name: str, value: Any, least: int) -> int:
    """`value` as an int; whole numbers of numpy and torch are taken too."""
    try:
        whole = not isinstance(value, bool) and operator.index(value) >= least
    except TypeError:
        raise TypeError(f"{name}={value!r}: must be a whole number >= {least}") from None
    if not whole:
        raise ValueError(f"{name}={value!r}: must be a whole number >= {least}")
    return int(operator.index(value))


def check_device(device: torch.device | str) -> torch.device:
    """The CPU or a CUDA device that is there."""
    try:
        found = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device={device!r}: must be 'cpu', 'cuda' or 'cuda:N'") from None
    if found.type not in ("cpu", "cuda"):
        raise ValueError(f"device={str(device)!r}: must be 'cpu', 'cuda' or 'cuda:N'")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device={str(device)!r}: torch {torch.__version__} sees {torch.cuda.device_count()} GPUs here"
        )
    return found


def check_number(name: str, value: Any, least: float, most: float | None) -> None:
    allowed = f"a finite number >= {least}" + ("" if most is None else f" and <= {most}")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}={value!r}: must be {allowed}")
    if not math.isfinite(value) or value < least or (most is not None and value > most):
        raise ValueError(f"{name}={value!r}: must be {allowed}")


def check_budget(k: Any, l: Any, n_features: int, select: str) -> None:
    """k in (0, F], whole when each token has its own budget; l >= 1 or None."""
    if isinstance(k, bool) or not isinstance(k, (int, float)):
        raise TypeError(f"k={k!r}: must be a number in (0, {n_features}]")
    if not math.isfinite(k) or not 0 < k <= n_features:
        raise ValueError(f"k={k!r}: must be in (0, {n_features}], the number of features")
    if select == "token" and k != int(k):
        raise ValueError(f"k={k!r}: select='token' keeps a whole number of features in each token")
    if l is not None:
        check_number("l", l, 1, None)


def check_activations(x: Any, d_in: int, name: str = "x") -> None:
    """[..., d_in], floating, at least one token. Finiteness is `check_finite`'s."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}={type(x).__name__}: must be a torch.Tensor of shape [..., {d_in}]")
    if x.dtype not in FLOATS:
        raise TypeError(f"{name}.dtype={x.dtype}: must be one of {', '.join(map(str, FLOATS))}")
    if x.dim() < 1 or x.shape[-1] != d_in:
        raise ValueError(f"{name}.shape={tuple(x.shape)}: the last dimension must be d_in={d_in}")
    if x.numel() == 0:
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


def check_encoder(x: Any, W_enc: Any, b_enc: Any, scale: Any = None) -> None:
    """x [..., d], W_enc [d, F], b_enc [F], scale [F] or None, on one device and of one dtype."""
    if not isinstance(W_enc, Tensor) or W_enc.dim() != 2 or W_enc.numel() == 0:
        raise ValueError(f"W_enc={describe(W_enc)}: must be a tensor of shape [d_in, d_sae]")
    check_activations(x, W_enc.shape[0])
    n_features = W_enc.shape[1]
    for name, value in (("b_enc", b_enc), ("scale", scale)):
        if name == "scale" and value is None:
            continue
        if not isinstance(value, Tensor) or value.shape != (n_features,):
            raise ValueError(f"{name}={describe(value)}: must be a tensor of shape [{n_features}]")
    check_same(x=x, W_enc=W_enc, b_enc=b_enc, **({} if scale is None else {"scale": scale}))
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
    return f"tensor {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
