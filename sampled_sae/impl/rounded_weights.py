"""Weights in the 16 bits that products take, kept from step to step: the optimizer writes them as it moves a row."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version


class RoundedCopy(NamedTuple):
    """values: `of` rounded, when it was of this version. Memory that is kept is no other tensor's meanwhile."""

    values: Tensor
    of: Tensor
    version: int


class RoundedWeights:
    """Copies by name of a parameter, each made when it is first asked for and `kept` is set.

    A copy serves while its weights are the same memory and autograd knows of no change to them but those that
    `moved` has told; else it is made again. What is written through `.data` is not seen.
    """

    def __init__(self, kept: bool = False) -> None:
        self.kept = kept
        self._copies: dict[str, RoundedCopy] = {}

    def of(self, name: str, W: Tensor, dtype: torch.dtype) -> Tensor:
        """`W.detach().to(dtype).contiguous()`, to be read alone."""
        W = W.detach()
        narrower = W.dtype == torch.float32 and dtype.itemsize < W.dtype.itemsize
        if not self.kept or not narrower or torch.compiler.is_compiling() or W.is_inference():
            return W.to(dtype).contiguous()
        found = self.following(name, W)
        if found is None or found.dtype != dtype:
            found = W.to(dtype).contiguous()
            self._copies[name] = RoundedCopy(found, W, W._version)
        return found

    def following(self, name: str, W: Tensor) -> Tensor | None:
        """The copy of W that is up to date, for its optimizer to write what it moves; None where there is none."""
        copy = self._copies.get(name)
        if copy is None or W.is_inference() or copy.version != W._version:
            return None
        same = copy.of.data_ptr() == W.data_ptr() and (copy.of.shape, copy.of.stride()) == (W.shape, W.stride())
        return copy.values if same else None

    def moved(self, name: str, W: Tensor, followed: bool) -> None:
        """The optimizer has moved W, and where it `followed` the copy too; a graph that saved the copy is void then."""
        copy = self._copies.pop(name, None)
        if copy is not None and followed:
            increment_version(copy.values)
            self._copies[name] = copy._replace(version=W._version)

    def forget(self) -> None:
        self._copies.clear()

    # of a copy too
    def __reduce__(self) -> tuple[type[RoundedWeights], tuple[bool]]:
        return RoundedWeights, (self.kept,)
