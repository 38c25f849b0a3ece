"""What is asked of the tensors in a file, whatever its format."""

from __future__ import annotations

from collections.abc import Container
from pathlib import Path

import torch
from torch import Tensor

from ..support.argument_checks import FLOATS, bad_values


def check_tensors(
    path: Path, tensors: dict[str, Tensor], shapes: dict[str, tuple[int, ...]], infinite: Container[str] = ()
) -> None:
    """Exactly the tensors of `shapes`, floating and finite; those named in `infinite` may hold inf, but no NaN.

    Raises:
        ValueError: naming the file and the tensor.
    """
    if set(tensors) != set(shapes):
        missing, foreign = sorted(set(shapes) - set(tensors)), sorted(set(tensors) - set(shapes))
        raise ValueError(f"{path}: tensors missing {missing}, unknown {foreign}; must hold {sorted(shapes)}")
    for name, shape in shapes.items():
        t = tensors[name]
        if tuple(t.shape) != shape:
            raise ValueError(f"{path}: {name} is {tuple(t.shape)}, must be {shape} by the configuration")
        if t.dtype not in FLOATS or t.layout != torch.strided:
            found = t.dtype if t.layout == torch.strided else f"{t.layout} of {t.dtype}"
            raise ValueError(f"{path}: {name} is {found}, must be dense, of {', '.join(map(str, FLOATS))}")
        if bad_values(t, name in infinite):
            raise ValueError(f"{path}: {name} holds {'NaN' if name in infinite else 'NaN or inf'}")


def narrowed(value: Tensor, dtype: torch.dtype) -> Tensor:
    """In `dtype` where that loses nothing, else as it is."""
    return value.to(dtype) if torch.equal(value.to(dtype).double(), value.double()) else value
