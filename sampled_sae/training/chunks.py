"""Activations as users have them, a tensor, a numpy array or an iterator of either, checked and in pieces."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..support.argument_checks import FLOATS


def check_holdout(holdout: int, tokens: int) -> None:
    """ValueError unless some of the tokens are left to train on."""
    if holdout >= tokens > 0:
        raise ValueError(f"holdout={holdout}: must be less than {tokens}, the tokens of x")


def checked_pieces(x: Any, most: int) -> Iterator[Tensor]:
    """x in order as checked tensors [m, d] of 1 to `most` tokens."""
    width: int | None = None
    for name, chunk in _chunks(x):
        check_chunk(name, chunk)
        width = chunk.shape[1] if width is None else width
        if chunk.shape[1] != width:
            raise ValueError(f"{name}: shape={tuple(chunk.shape)}: must be [m, {width}], as wide as the first chunk")
        for start in range(0, len(chunk), most):
            piece = as_tensor(chunk[start : start + most])
            check_all_finite(name, piece, start)
            yield piece


def _chunks(x: Any) -> Iterator[tuple[str, Any]]:
    """(name for errors, chunk)."""
    if isinstance(x, (Tensor, np.ndarray)):
        yield "x", x
    elif isinstance(x, Iterable):
        yield from ((f"x, chunk {i}", only(chunk)) for i, chunk in enumerate(x))
    else:
        raise TypeError(f"x={type(x).__name__}: must be a tensor [n, d], a numpy array, or an iterator of either")


def only(chunk: Any) -> Any:
    """What a list or tuple of one holds, as a DataLoader of a TensorDataset gives them; else the chunk itself."""
    return chunk[0] if isinstance(chunk, (list, tuple)) and len(chunk) == 1 else chunk


def check_chunk(name: str, chunk: Any) -> None:
    if isinstance(chunk, Tensor):
        floating = chunk.dtype in FLOATS
    elif isinstance(chunk, np.ndarray):
        floating = chunk.dtype.kind == "f" and chunk.dtype.itemsize <= 8
    else:
        raise TypeError(f"{name}: {type(chunk).__name__}: must be a torch.Tensor or a numpy array")
    if isinstance(chunk, np.ma.MaskedArray):
        raise TypeError(f"{name}: a masked array: fill or leave out what is masked, which would be trained on")
    if isinstance(chunk, Tensor) and (chunk.layout != torch.strided or chunk.is_nested or chunk.is_meta):
        raise TypeError(f"{name}: a sparse, nested or meta tensor: must be a dense one [tokens, d] with values")
    if not floating:
        raise TypeError(f"{name}: dtype={chunk.dtype}: must be float16, bfloat16, float32 or float64")
    if chunk.ndim != 2 or chunk.shape[1] == 0:
        beside = "; of layers side by side give StackedActivations(x.unbind(1)), of an iterator chunks x.unbind(1)"
        layers = beside if chunk.ndim == 3 else ""
        raise ValueError(f"{name}: shape={tuple(chunk.shape)}: must be [tokens, d] with d >= 1{layers}")


def check_all_finite(name: str, x: Tensor, first: int = 0) -> None:
    """ValueError with the place of what is NaN or inf in x [n, d], whose tokens are counted from `first`."""
    finite = x.isfinite()
    if not finite.all():
        token, dimension = (~finite).nonzero()[0].tolist()
        value = float(x[token, dimension])
        raise ValueError(f"{name}: {value} at token {first + token}, dimension {dimension}: must be finite")


def as_tensor(piece: Tensor | np.ndarray) -> Tensor:
    # torch refuses arrays of foreign byte order or negative strides, and warns of arrays that are read-only
    if isinstance(piece, np.ndarray):
        return torch.from_numpy(np.array(piece, piece.dtype.newbyteorder("="), order="C"))
    return piece
