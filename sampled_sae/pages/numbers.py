"""Numbers on their way into a page: short, or many at once."""

from __future__ import annotations

import base64

import torch
from torch import Tensor

LITTLE = {torch.float32: "<f4", torch.int32: "<i4"}


def short(value: float) -> float:
    """With four significant digits."""
    return float(f"{value:.4g}")


def packed(column: Tensor) -> str:
    """float32 or int32 values of any shape as base64 of their little-endian bytes."""
    return base64.b64encode(column.contiguous().numpy().astype(LITTLE[column.dtype]).tobytes()).decode()
