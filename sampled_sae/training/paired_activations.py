"""`PairedActivations`: what a transcoder reads, and beside it what it is to reconstruct."""

from __future__ import annotations

from collections.abc import Hashable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .activations import Activations
from .opening import as_activations, as_part
from .same_settings import identity
from .same_tokens import check_same_tokens


class PairedActivations(Activations):
    """Two activations of the same tokens, such as the input and the output of an MLP, as one to train on.

    Both are multiplied by scales of their own, so that the mean squared length of each is its width.

    Args:
        x: what a transcoder reads: as `Trainer` takes activations, a store or the name of one, a tensor or a file.
        target: what it reconstructs, of the same tokens in the same order, in shards of the same sizes.
        holdout: of tensors and files, how many tokens, the last ones, are kept for evaluation.

    Raises:
        ValueError, TypeError: naming the argument; other tokens in the one than in the other.
    """

    def __init__(self, x: Any, target: Any, holdout: int | None = None) -> None:
        self.x = as_activations(x, holdout)
        self.target = as_part("target", target, holdout)
        for name, part in (("x", self.x), ("target", self.target)):
            if part.d_out is not None:
                raise ValueError(f"{name}: is a pair of activations already")
            if part.layers > 1:
                raise ValueError(f"{name}: is a stack of {part.layers} layers; a transcoder reads one, and writes one")
        check_same_tokens("target", self.target, self.x)
        shards = [{"x": a, "target": b} for a, b in zip(self.x.manifest["shards"], self.target.manifest["shards"])]
        about = {**identity(self.target.manifest), "scale": self.target.scale, "d_out": self.target.d_in}
        about |= {"max_norm": self.target.manifest["max_norm"]} if "max_norm" in self.target.manifest else {}
        self.manifest = {**self.x.manifest, "shards": shards, "target": about}

    @property
    def where(self) -> str:
        return f"{self.x.where} with {self.target.where}"

    @property
    def place(self) -> Hashable:
        return self.x.place, self.target.place

    @property
    def tokens(self) -> list[int]:
        return self.x.tokens

    @property
    def d_out(self) -> int:
        return self.target.d_in

    @property
    def output_scale(self) -> float:
        return self.target.layer_scale

    @cached_property
    def row_scale(self) -> Tensor:
        factors = [torch.full((part.d_in,), part.layer_scale, dtype=torch.float64) for part in (self.x, self.target)]
        return torch.cat(factors).float()

    def shard(self, i: int, start: int = 0, stop: int | None = None) -> Tensor:
        """Float32 [n, d_in + d_out]."""
        return torch.cat([part.shard(i, start, stop) for part in (self.x, self.target)], dim=1)

    def holdout(self) -> tuple[Tensor, Tensor | None]:
        """(float32 [n, d_in + d_out], the token rows of x)."""
        (x, rows), (target, _) = self.x.holdout(), self.target.holdout()
        return torch.cat([x, target], dim=1), rows
