"""Some features of all: what a caller may name, and what sparse codes hold of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..codes import SparseCodes
from ..support.argument_checks import FLOATS, describe


def check_features(features: Sequence[int] | Tensor, n_features: int, device: torch.device) -> Tensor:
    """Distinct features int64 [P], in the caller's order.

    Raises:
        ValueError, TypeError: no list of whole numbers in [0, n_features), an empty one, one feature twice.
    """
    allowed = f"must be distinct whole numbers from 0 to {n_features - 1}, at least one"
    try:
        chosen = torch.as_tensor(features)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise TypeError(f"features={features!r}: {allowed}") from None
    if chosen.dim() != 1 or len(chosen) == 0:
        raise ValueError(f"features={describe(chosen)}: {allowed}")
    if chosen.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise TypeError(f"features.dtype={chosen.dtype}: {allowed}")
    chosen = chosen.long()
    outside = chosen[(chosen < 0) | (chosen >= n_features)]
    if len(outside):
        raise ValueError(f"features: {int(outside[0])} is among them; {allowed}")
    if len(chosen.unique()) != len(chosen):
        raise ValueError(f"features: one of them stands twice; {allowed}")
    return chosen.to(device)


def check_dense_codes(codes: Tensor, width: int) -> None:
    """Dense codes [..., width] of a float dtype.

    Raises:
        ValueError, TypeError: naming what is wrong with them.
    """
    if not isinstance(codes, Tensor):
        raise TypeError(f"codes={type(codes).__name__}: must be SparseCodes or a torch.Tensor")
    if codes.dtype not in FLOATS or codes.layout != torch.strided:
        allowed = ", ".join(map(str, FLOATS))
        raise TypeError(f"codes: {codes.layout} of {codes.dtype}: must be SparseCodes or dense, of {allowed}")
    if codes.shape[-1:] != (width,):
        raise ValueError(f"codes={describe(codes)}: the last dimension must be {width}")


def codes_of_features(codes: SparseCodes, features: Tensor) -> SparseCodes:
    """The kept entries of these features int64 [P] alone, [B, F] as before; differentiable in the values."""
    wanted = torch.zeros(codes.shape[1], dtype=torch.bool, device=features.device).index_fill_(0, features, True)
    at = wanted.index_select(0, codes.features).nonzero().squeeze(1)
    return SparseCodes(*codes.entries().at(at), codes.shape)


def dense_columns(codes: SparseCodes, features: Tensor) -> Tensor:
    """The columns of these features int64 [P], dense [B, P]; equivalent to `codes.to_dense()[:, features]`."""
    values, tokens, of = codes_of_features(codes, features).entries()
    place = torch.zeros(codes.shape[1], dtype=torch.int64, device=features.device)
    place[features] = torch.arange(len(features), device=features.device)
    return values.new_zeros(codes.shape[0], len(features)).index_put((tokens, place.index_select(0, of)), values)
