"""`Activations`: what trainings, sweeps and evaluations read, wherever it lies."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from ..support.argument_checks import check_integer


class Activations(ABC):
    """Activations of one kind that can be read again and in any order, and some that are held out.

    Attributes:
        manifest: what is said of them: d_in, scale, shards (tokens and a checksum each), where known model, layer,
            source and settings.
    """

    manifest: dict[str, Any]

    @property
    @abstractmethod
    def where(self) -> str:
        """As errors name them."""

    @property
    @abstractmethod
    def place(self) -> Hashable:
        """Equal where the activations are the same, so that several SAEs share what is read."""

    @property
    @abstractmethod
    def tokens(self) -> list[int]:
        """Training tokens in each shard."""

    @abstractmethod
    def shard(self, i: int, start: int = 0, stop: int | None = None) -> Tensor:
        """Activations of one shard, or its tokens from start to stop: float32 [n, d_in] on the CPU, not scaled."""

    @abstractmethod
    def holdout(self) -> tuple[Tensor, Tensor | None]:
        """(held-out activations float32 [n, d_in], their token rows int64 [N, context] or None without text).

        Raises:
            ValueError: nothing is held out.
        """

    @property
    def d_in(self) -> int:
        return int(self.manifest["d_in"])

    @property
    def layers(self) -> int:
        """How many layers stand one behind the other in a row; above 1 for a crosscoder."""
        return 1

    @property
    def width_in(self) -> int:
        """How many numbers of a row are read: layers * d_in."""
        return self.layers * self.d_in

    @property
    def d_out(self) -> int | None:
        """Width of the targets that stand behind the activations of each token; None where there are none."""
        return None

    @property
    def output_scale(self) -> float:
        """That of the targets; 1 where there are none."""
        return 1.0

    @property
    def row_scale(self) -> float | Tensor:
        """What a token's row is multiplied by: `scale`; with targets or layers a factor for each of its numbers."""
        return self.layer_scale

    @property
    def layer_scale(self) -> float:
        """`scale` where there is one layer."""
        return float(self.manifest["scale"])

    @property
    def scale(self) -> float | tuple[float, ...]:
        """Activations times this have mean ||x||^2 = d_in; training sets `SampledSAEConfig.input_scale` to it. One for
        each of several layers."""
        return self.layer_scale

    def first(self, n: int) -> Tensor:
        """The first n training activations, or all where there are fewer: [<= n, d], with targets behind them."""
        n = check_integer("n", n, 1)
        found: list[Tensor] = []
        for i in range(len(self.tokens)):
            if (missing := n - sum(map(len, found))) <= 0:
                break
            found.append(self.shard(i)[:missing])
        return torch.cat(found)

    @property
    def has_text(self) -> bool:
        """Whether there are held-out token rows to run a language model on."""
        return bool((self.manifest.get("holdout") or {}).get("rows"))

    def holdout_rows(self) -> Tensor:
        """Held-out token rows, int64 [N, context].

        Raises:
            ValueError: nothing is held out, or it is without text.
        """
        rows = self.holdout()[1]
        if rows is None:
            raise ValueError(
                f"{self.where}: has no token rows, being made from activations alone; evaluation in a language "
                "model needs a store that harvest wrote"
            )
        return rows
