"""`ActivationStream`: activations that come once, in their order, and are stored nowhere."""

from __future__ import annotations

from collections.abc import Hashable
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ..support.argument_checks import check_integer
from .block_space import Room
from .blocks import Blocks, Source
from .same_settings import identity, side_by_side

BUFFER_TOKENS = 131_072


class Described(Source, Protocol):
    """A source that says what it reads."""

    @property
    def about(self) -> list[dict[str, Any]]:
        """Of each part what a store's manifest has: source, and where known model, layer, context, and settings."""


class ActivationStream:
    """What a training reads that keeps no activations but those of one block in memory, and those of the next.

    Args:
        source: an `IteratorSource`, or the `ModelSource` of `sampled_sae.lm`.
        buffer_tokens: tokens that are held and shuffled together; a block has that many, or a few more.
        buffer_on_disk: a folder for the blocks, which then take no memory: in files without names, which are gone with
            the process, however it ends. The batches are the same.

    Attributes:
        parts: what each SAE reads of it: one of an iterator, one a layer of a model.
        room: for its blocks.

    Raises:
        MemoryError: two blocks, and one while it is put together, are more than there is memory. Several processes ask
            when they begin to train, for what those of one machine hold together; of a disk, those that share it.
        ValueError: no such folder, or no room for two blocks on its disk.
    """

    def __init__(
        self, source: Described, buffer_tokens: int = BUFFER_TOKENS, buffer_on_disk: str | Path | None = None
    ) -> None:
        self.buffer_tokens = check_integer("buffer_tokens", buffer_tokens, 1)
        self.room = Room(self.buffer_tokens, source.widths, buffer_on_disk)
        if not (dist.is_initialized() and dist.get_world_size() > 1):
            self.room.check()
        self.blocks = Blocks(source, self.room)
        self._lanes: dict[tuple[int, int], Blocks] = {}
        self.parts = [StreamedActivations(self, i, about) for i, about in enumerate(source.about)]

    @property
    def divides(self) -> bool:
        """Whether its source gives shares of itself, by `lane`; of others each process is handed its own."""
        return hasattr(self.blocks.source, "lane")

    def lane(self, which: int, of: int, processes: int = 1) -> Blocks:
        """The blocks of one of so many shares of the source; one for all who ask.

        Raises:
            ValueError: another number of lanes than processes, where each is handed its own.
        """
        if not self.divides and of != processes:
            raise ValueError(
                f"lanes={of}: {self.parts[0].where} is read by the process that it was given to, here are {processes}; "
                "must be as many"
            )
        if of == 1 or not self.divides:
            return self.blocks
        if (which, of) not in self._lanes:
            self._lanes[which, of] = Blocks(self.blocks.source.lane(which, of), self.room)  # type: ignore[attr-defined]
        return self._lanes[which, of]

    @cached_property
    def held_out(self) -> tuple[list[Tensor], Tensor]:
        """(activations [n, d] of each part that are never trained on, their token rows), as the source gives them.

        Raises:
            ValueError: it holds out nothing.
        """
        if not hasattr(self.blocks.source, "holdout"):
            raise ValueError("the stream is of an iterator, which holds out nothing; evaluate on a store")
        found: tuple[list[Tensor], Tensor] = self.blocks.source.holdout()
        return found

    def pair(self, x: int = 0, target: int = 1) -> StreamedPair:
        """What a transcoder reads and reconstructs: two of the parts, by their numbers.

        Raises:
            ValueError: a number of no part, or the same twice.
        """
        chosen = [check_integer(name, i, 0) for name, i in (("x", x), ("target", target))]
        if max(chosen) >= len(self.parts) or chosen[0] == chosen[1]:
            raise ValueError(f"x={x}, target={target}: must be two of the {len(self.parts)} parts, by number from 0")
        return StreamedPair(self.parts[chosen[0]], self.parts[chosen[1]])

    def beside(self) -> StreamedStack:
        """All parts side by side, as a crosscoder reads them.

        Raises:
            ValueError: fewer than two, or parts of other widths than the first.
        """
        return StreamedStack(self.parts)


class StreamedActivations:
    """One part of a stream.

    Attributes:
        manifest: what is said of it, as that of a store; the scale is known once the first block is read.
        index: which part of the blocks.
        d_in: its width.
        width_in, layers, d_out: those of `Activations`; a stream has one layer but as a stack, and targets
            only as a pair.
    """

    layers = 1
    d_out: int | None = None

    def __init__(self, stream: ActivationStream, index: int, about: dict[str, Any]) -> None:
        self.stream, self.index = stream, index
        self.d_in = self.width_in = stream.blocks.source.widths[index]
        settings = {**about.get("settings", {}), "buffer_tokens": stream.buffer_tokens}
        self.manifest = {**about, "d_in": self.d_in, "shards": [], "settings": settings}

    @property
    def widths(self) -> list[int]:
        """Of what stands side by side in a token's row."""
        return [self.stream.blocks.source.widths[i] for i in self.indices]

    @property
    def source(self) -> Any:
        """Where the stream comes from."""
        return self.stream.blocks.source

    @property
    def buffer_tokens(self) -> int:
        return self.stream.buffer_tokens

    def holdout(self) -> tuple[Tensor, Tensor]:
        """(float32 [n, d_in], of a pair [n, d_in + d_out]; token rows int64 [N, context]), as `Activations` has them.

        Raises:
            ValueError: nothing is held out.
        """
        parts, rows = self.stream.held_out
        return torch.cat([parts[i] for i in self.indices], dim=1), rows

    @property
    def where(self) -> str:
        """As errors name it."""
        layer, point = self.manifest.get("layer"), self.manifest.get("point")
        at = f" at {point}" if point else "" if layer is None else f" at layer {layer}"
        return (self.manifest.get("source") or "the iterator") + at

    @cached_property
    def place(self) -> Hashable:
        return id(self)

    @property
    def indices(self) -> list[int]:
        """Which parts of a block stand side by side in a token's row."""
        return [self.index]


class StreamedPair(StreamedActivations):
    """Two parts of a stream, of which a transcoder reads the one and reconstructs the other."""

    def __init__(self, x: StreamedActivations, target: StreamedActivations) -> None:
        super().__init__(x.stream, x.index, x.manifest)
        self.target, self.d_out = target, target.d_in
        self.manifest["target"] = {**identity(target.manifest), "d_out": target.d_in}

    @property
    def where(self) -> str:
        return f"{super().where} with {self.target.where}"

    @property
    def indices(self) -> list[int]:
        return [self.index, self.target.index]


class StreamedStack(StreamedActivations):
    """Several parts of a stream, the layers that a crosscoder reads."""

    def __init__(self, parts: list[StreamedActivations]) -> None:
        widths = [part.d_in for part in parts]
        if len(parts) < 2 or len(set(widths)) > 1:
            raise ValueError(f"parts: of widths {widths}; must be at least 2, all of one width")
        super().__init__(parts[0].stream, parts[0].index, parts[0].manifest)
        self.parts, self.layers = parts, len(parts)
        self.width_in = self.layers * self.d_in
        self.manifest |= side_by_side([part.manifest for part in parts])

    @property
    def where(self) -> str:
        return " beside ".join(part.where for part in self.parts)

    @property
    def indices(self) -> list[int]:
        return [part.index for part in self.parts]
