"""`ActivationStream`: activations that come once, in their order, and are stored nowhere."""

from __future__ import annotations

from collections.abc import Hashable
from functools import cached_property
from typing import Any, Protocol

from ..support.argument_checks import check_integer
from ..support.timing import check_memory
from .blocks import Blocks, Source

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

    Attributes:
        parts: what each SAE reads of it: one of an iterator, one a layer of a model.

    Raises:
        MemoryError: two blocks, and one while it is put together, are more than there is memory.
    """

    def __init__(self, source: Described, buffer_tokens: int = BUFFER_TOKENS) -> None:
        self.buffer_tokens = check_integer("buffer_tokens", buffer_tokens, 1)
        check_memory(f"buffer_tokens={self.buffer_tokens}", 12 * self.buffer_tokens * sum(source.widths))
        self.blocks = Blocks(source)
        self.parts = [StreamedActivations(self, i, about) for i, about in enumerate(source.about)]


class StreamedActivations:
    """One part of a stream.

    Attributes:
        manifest: what is said of it, as that of a store; the scale is known once the first block is read.
        index: which part of the blocks.
        d_in: its width.
        width_in, layers, d_out, output_scale: those of `Activations`; a stream has one layer and no targets.
    """

    layers = 1
    d_out: int | None = None
    output_scale = 1.0

    def __init__(self, stream: ActivationStream, index: int, about: dict[str, Any]) -> None:
        self.stream, self.index = stream, index
        self.d_in = self.width_in = stream.blocks.source.widths[index]
        settings = {**about.get("settings", {}), "buffer_tokens": stream.buffer_tokens}
        self.manifest = {**about, "d_in": self.d_in, "shards": [], "settings": settings}

    @property
    def blocks(self) -> Blocks:
        return self.stream.blocks

    @property
    def buffer_tokens(self) -> int:
        return self.stream.buffer_tokens

    @property
    def where(self) -> str:
        """As errors name it."""
        layer = self.manifest.get("layer")
        return (self.manifest.get("source") or "the iterator") + ("" if layer is None else f" at layer {layer}")

    @cached_property
    def place(self) -> Hashable:
        return id(self)
