"""Activations of the same tokens side by side: what a transcoder reads and reconstructs, the layers of a crosscoder."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .activations import Activations
from .opening import as_activations, as_part
from .same_settings import identity, side_by_side


class Joined(Activations):
    """Activations of the same tokens, those of each token one behind the other in a row.

    Attributes:
        parts: what is joined.
    """

    parts: list[Activations]

    @property
    def place(self) -> Hashable:
        return tuple(part.place for part in self.parts)

    @property
    def tokens(self) -> list[int]:
        return self.parts[0].tokens

    @cached_property
    def row_scale(self) -> Tensor:
        factors = [torch.full((part.d_in,), part.layer_scale, dtype=torch.float64) for part in self.parts]
        return torch.cat(factors).float()

    def shard(self, i: int, start: int = 0, stop: int | None = None) -> Tensor:
        """Float32 [n, d], d the sum of the parts' widths."""
        return torch.cat([part.shard(i, start, stop) for part in self.parts], dim=1)

    def holdout(self) -> tuple[Tensor, Tensor | None]:
        """(float32 [n, d], the token rows of the first part)."""
        found = [part.holdout() for part in self.parts]
        return torch.cat([x for x, _ in found], dim=1), found[0][1]


class PairedActivations(Joined):
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
        self.x, self.target = as_activations(x, holdout), as_part("target", target, holdout)
        self.parts = [self.x, self.target]
        for name, part in (("x", self.x), ("target", self.target)):
            if part.d_out is not None:
                raise ValueError(f"{name}: is a pair of activations already")
            if part.layers > 1:
                raise ValueError(f"{name}: is a stack of {part.layers} layers; a transcoder reads one, and writes one")
        _check_same_tokens("target", self.target, self.x)
        shards = [{"x": a, "target": b} for a, b in zip(self.x.manifest["shards"], self.target.manifest["shards"])]
        about = {**identity(self.target.manifest), "scale": self.target.scale, "d_out": self.target.d_in}
        about |= {"max_norm": self.target.manifest["max_norm"]} if "max_norm" in self.target.manifest else {}
        self.manifest = {**self.x.manifest, "shards": shards, "target": about}

    @property
    def where(self) -> str:
        return f"{self.x.where} with {self.target.where}"

    @property
    def d_out(self) -> int:
        return self.target.d_in

    @property
    def output_scale(self) -> float:
        return self.target.layer_scale


class StackedActivations(Joined):
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
            _check_same_tokens(f"layers[{i}]", part, first)
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
    def layers(self) -> int:
        return len(self.parts)

    @property
    def scale(self) -> tuple[float, ...]:
        return tuple(part.layer_scale for part in self.parts)


def _same(one: Activations, other: Activations) -> bool:
    """Whether two are of one place, or hold the same numbers, by the checksums of their shards, and no model says that
    they are of two, whose first layers may be the same."""
    marks, others = ([shard.get("crc32") for shard in each.manifest["shards"]] for each in (one, other))
    named = any(each.manifest.get("model") for each in (one, other))
    return one.place == other.place or (not named and None not in marks and marks == others)


def _check_same_tokens(name: str, part: Activations, first: Activations) -> None:
    """ValueError where `part`, which was given as the argument `name`, has other tokens than `first`.

    Shards and held-out parts have the same sizes. Where both were harvested, the rows of token ids are the same too,
    and in each part the tokens that were left out of them.
    """
    held_out = [(each.manifest.get("holdout") or {}).get("tokens") for each in (part, first)]
    if part.tokens != first.tokens or held_out[0] != held_out[1]:
        shown = " and ".join(f"{sum(each.tokens)} in {len(each.tokens)} shards" for each in (part, first))
        raise ValueError(
            f"{name}={part.where}: must have the tokens of {first.where} in shards of the same sizes, and as many held "
            f"out; they have {shown}, held out {held_out[0]} and {held_out[1]}"
        )
    texts = [each.manifest.get("settings", {}).get("rows_sha256") for each in (part, first)]
    if _differ(*texts):
        raise ValueError(f"{name}={part.where}: was harvested from other token rows than {first.where}; take the same")
    for i, (one, other) in enumerate(zip(*(map(_places, _files(each)) for each in (part, first)))):
        if _differ(one, other):
            where = f"shard {i}" if i < len(first.tokens) else "the held-out part"
            raise ValueError(
                f"{name}={part.where}: has other tokens than {first.where} in {where}, since others were left out for "
                "their norms; harvest both in one pass, which leaves out the same"
            )


def _files(each: Activations) -> list[dict[str, Any]]:
    """What the manifest says of every shard, and of the held-out part where there is one."""
    found = each.manifest.get("holdout")
    return [*each.manifest["shards"], *([found] if found else [])]


def _places(entry: Any) -> Any:
    return entry.get("places_crc32") if isinstance(entry, dict) else None


def _differ(one: Any, other: Any) -> bool:
    return None not in (one, other) and one != other
