"""`StackedActivations`: several layers or models of the same tokens, side by side, as a crosscoder reads them."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .activations import Activations
from .opening import as_part
from .same_settings import side_by_side
from .same_tokens import check_same_tokens


class StackedActivations(Activations):
    """Activations of the same tokens in several layers of a model, or in several models, as one to train on.

    Each is multiplied by a scale of its own, so that its mean squared length is its width and none outweighs another.

    Args:
        layers: at least two, as `Trainer` takes activations: stores or the names of some, tensors or files; of equal
            width, of the same tokens in the same order, in shards of the same sizes.
        holdout: of tensors and files, how many tokens, the last ones, are kept for evaluation.

    Raises:
        ValueError, TypeError: naming the argument; other tokens or another width in the one than in the other, the same
            one twice.
    """

    def __init__(self, layers: Sequence[Any], holdout: int | None = None) -> None:
        if isinstance(layers, (str, bytes, Tensor)) or not isinstance(layers, Sequence):
            raise TypeError(f"layers={type(layers).__name__}: must be a sequence of activations, one a layer")
        if len(layers) < 2:
            raise ValueError(f"layers: {len(layers)} given; must be at least 2, of the same tokens")
        self.parts = [as_part(f"layers[{i}]", layer, holdout) for i, layer in enumerate(layers)]
        first, *others = self.parts
        for i, part in enumerate(self.parts):
            if part.d_out is not None or part.layers > 1:
                raise ValueError(f"layers[{i}]={part.where}: is a pair or a stack of activations already")
            if part.d_in != first.d_in:
                raise ValueError(
                    f"layers[{i}]={part.where}: has width {part.d_in}, must have that of {first.where}, {first.d_in}"
                )
        for i, part in enumerate(others, 1):
            if any(_same(part, before) for before in self.parts[:i]):
                raise ValueError(f"layers[{i}]={part.where}: is there twice")
            check_same_tokens(f"layers[{i}]", part, first)
        self.manifest = {**first.manifest, **self._about()}

    def _about(self) -> dict[str, Any]:
        """What is not that of the first layer alone."""
        shards = [list(of_all) for of_all in zip(*(part.manifest["shards"] for part in self.parts))]
        about = side_by_side([part.manifest for part in self.parts])
        layers = [
            {**each, "scale": part.layer_scale, "max_norm": part.manifest.get("max_norm")}
            for each, part in zip(about["layers"], self.parts)
        ]
        return {**about, "scale": list(self.scale), "shards": shards, "layers": layers}

    @property
    def where(self) -> str:
        return " beside ".join(part.where for part in self.parts)

    @property
    def place(self) -> Hashable:
        return tuple(part.place for part in self.parts)

    @property
    def tokens(self) -> list[int]:
        return self.parts[0].tokens

    @property
    def layers(self) -> int:
        return len(self.parts)

    @property
    def scale(self) -> tuple[float, ...]:
        return tuple(part.layer_scale for part in self.parts)

    @cached_property
    def row_scale(self) -> Tensor:
        return torch.tensor(self.scale, dtype=torch.float64).repeat_interleave(self.d_in).float()

    def shard(self, i: int, start: int = 0, stop: int | None = None) -> Tensor:
        """Float32 [n, layers * d_in], the layers one behind the other."""
        return torch.cat([part.shard(i, start, stop) for part in self.parts], dim=1)

    def holdout(self) -> tuple[Tensor, Tensor | None]:
        """(float32 [n, layers * d_in], the token rows of the first)."""
        found = [part.holdout() for part in self.parts]
        return torch.cat([x for x, _ in found], dim=1), found[0][1]


def _same(one: Activations, other: Activations) -> bool:
    """Whether two are of one place, or hold the same numbers, by the checksums of their shards, and no model says that
    they are of two, whose first layers may be the same."""
    marks, others = ([shard.get("crc32") for shard in each.manifest["shards"]] for each in (one, other))
    named = any(each.manifest.get("model") for each in (one, other))
    return one.place == other.place or (not named and None not in marks and marks == others)
