"""`ActivationStream`: activations that come once, in their order, and are stored nowhere."""

from __future__ import annotations

from collections.abc import Hashable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..support.argument_checks import check_integer
from .block_space import Room
from .blocks import Blocks, Source
from .same_settings import identity, side_by_side

BUFFER_TOKENS = 131_072


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
        self, source: Source, buffer_tokens: int = BUFFER_TOKENS, buffer_on_disk: str | Path | None = None
    ) -> None:
        self.buffer_tokens = check_integer("buffer_tokens", buffer_tokens, 1)
        self.room = Room(self.buffer_tokens, source.widths, buffer_on_disk)
        if not (dist.is_initialized() and dist.get_world_size() > 1):
            self.room.check()
        self.blocks = Blocks(source, self.room)
        self._lanes: dict[tuple[int, int], Blocks] = {}
        self.parts = [self._part(i, about) for i, about in enumerate(source.about)]

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

    def pair(self, x: int = 0, target: int = 1) -> StreamedActivations:
        """What a transcoder reads and reconstructs: two of the parts, by their numbers.

        Raises:
            ValueError: a number of no part, or the same twice.
        """
        chosen = [check_integer(name, i, 0) for name, i in (("x", x), ("target", target))]
        if max(chosen) >= len(self.parts) or chosen[0] == chosen[1]:
            raise ValueError(f"x={x}, target={target}: must be two of the {len(self.parts)} parts, by number from 0")
        read, made = (self.parts[i] for i in chosen)
        manifest = {**read.manifest, "target": {**identity(made.manifest), "d_out": made.d_in}}
        return StreamedActivations(self, chosen, manifest, f"{read.where} with {made.where}", is_pair=True)

    def beside(self) -> StreamedActivations:
        """All parts side by side, as a crosscoder reads them.

        Raises:
            ValueError: fewer than two, or parts of other widths than the first.
        """
        widths = [part.d_in for part in self.parts]
        if len(widths) < 2 or len(set(widths)) > 1:
            raise ValueError(f"parts: of widths {widths}; must be at least 2, all of one width")
        manifest = {**self.parts[0].manifest, **side_by_side([part.manifest for part in self.parts])}
        where = " beside ".join(part.where for part in self.parts)
        return StreamedActivations(self, list(range(len(widths))), manifest, where)

    def _part(self, index: int, about: dict[str, Any]) -> StreamedActivations:
        settings = {**about.get("settings", {}), "buffer_tokens": self.buffer_tokens}
        manifest = {**about, "d_in": self.blocks.source.widths[index], "shards": [], "settings": settings}
        layer, point = about.get("layer"), about.get("point")
        at = f" at {point}" if point else "" if layer is None else f" at layer {layer}"
        return StreamedActivations(self, [index], manifest, (about.get("source") or "the iterator") + at)


class StreamedActivations:
    """What an SAE reads of a stream: one part of it; a transcoder two, a crosscoder several, side by side.

    Attributes:
        indices: which parts of a block stand side by side in a token's row.
        manifest: what is said of them, as that of a store; the scale is known once the first block is read.
        where: as errors name them.
        widths: of the parts.
        d_in, width_in, layers, d_out: those of `Activations`.
    """

    def __init__(
        self, stream: ActivationStream, indices: list[int], manifest: dict[str, Any], where: str, is_pair: bool = False
    ) -> None:
        self.stream, self.indices, self.manifest, self.where = stream, indices, manifest, where
        self.widths = [self.source.widths[i] for i in indices]
        self.d_in, self.d_out = self.widths[0], self.widths[1] if is_pair else None
        self.layers = 1 if is_pair else len(indices)
        self.width_in = self.layers * self.d_in

    @property
    def source(self) -> Any:
        """Where the stream comes from."""
        return self.stream.blocks.source

    @property
    def place(self) -> Hashable:
        return id(self)

    def holdout(self) -> tuple[Tensor, Tensor]:
        """(float32 [n, d_in], of a pair [n, d_in + d_out]; token rows int64 [N, context]), as `Activations` has them.

        Raises:
            ValueError: nothing is held out.
        """
        parts, rows = self.stream.held_out
        return torch.cat([parts[i] for i in self.indices], dim=1), rows
