"""How a device multiplies float32 matrices: what torch's switches say, and a choice of one's own for a while.

There are old switches (`allow_tf32`, `set_float32_matmul_precision`) and new ones (`fp32_precision`, of all backends,
of one, and of one's products). Products follow the new ones, which the old ones write; the old getters raise where they
differ.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

# whose type hints do not know the new switches
backends: Any = torch.backends


def tf32_allowed() -> bool:
    """Whether float32 products on a GPU take TF32 operands, by whichever switch."""
    return bool(backends.cuda.matmul.fp32_precision == "tf32")


def are_as_set(precision: str, device: torch.device) -> bool:
    """Whether products of float32 matrices on the device are of this precision already, as the switches stand."""
    before = _switch(device).fp32_precision
    return bool(before == precision or (before, precision) == ("none", "ieee"))


@contextmanager
def float32_products(precision: str, device: torch.device) -> Iterator[None]:
    """Products of float32 matrices on the device are "ieee" or "tf32"; afterwards every switch is as before.

    The switches are torch's, one for the process: other threads see the choice meanwhile.
    """
    if are_as_set(precision, device):
        yield
        return
    switch, before = _switch(device), _set_itself(_switches(device))
    switch.fp32_precision = precision
    try:
        yield
    finally:
        switch.fp32_precision = before


def _switch(device: torch.device) -> Any:
    return (backends.cuda if device.type == "cuda" else backends.mkldnn).matmul


def _switches(device: torch.device) -> list[Any]:
    """That of products, of the device's backend, of all: one that is "none" says what the next one says."""
    # the backend's as torch makes those of products: by `backends.mkldnn` itself one sets that of all backends
    backend = type(backends.mkldnn.matmul)("cuda" if device.type == "cuda" else "mkldnn", "all")
    return [_switch(device), backend, backends]


def _set_itself(switches: list[Any]) -> str:
    """What the first of the switches was set to itself, not what it says because the next one does."""
    value: str = switches[0].fp32_precision
    if len(switches) == 1 or value != switches[1].fp32_precision:
        return value
    before, other = _set_itself(switches[1:]), "tf32" if value == "ieee" else "ieee"
    try:
        switches[1].fp32_precision = other
        return "none" if switches[0].fp32_precision == other else value
    finally:
        switches[1].fp32_precision = before
