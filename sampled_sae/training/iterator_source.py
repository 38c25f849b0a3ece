"""`IteratorSource`: an iterator of activations as the source of a stream, with a place to go on from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..support.atomic_files import field
from ..support.checksums import tensors_crc32
from .chunks import as_tensor, check_all_finite, check_chunk
from .store_writer import as_stored

_END = object()
_PLAIN = (bool, int, float, str, bytes, Tensor, type(None))


class IteratorSource:
    """Chunks [n, d] of any sizes, in their order.

    - What can be iterated over again (a list, a DataLoader) begins anew at its end; an iterator ends the stream.
    - With `state_dict` and `load_state_dict` (a StatefulDataLoader) it is asked for its place, and set to it.
    - Without them a training that goes on reads as many chunks again as were read before, and compares the last one's
      checksum: something that gives others, or an iterator that has been read from, is an error.
    - A chunk that is a list or tuple has a part of the stream in each place, of the same tokens: what a transcoder
      reads and its targets, or the layers of a crosscoder.

    Args:
        chunks: of float16, bfloat16, float32 or float64, tensors on any device or numpy arrays, or lists of them, as a
            DataLoader of a TensorDataset gives them.
        source: where they come from, as recorded; also their name in errors.

    Raises:
        TypeError, ValueError: no iterable, no chunk in it, a first one of another shape or dtype.
    """

    def __init__(self, chunks: Iterable[Any], source: str = "") -> None:
        if isinstance(chunks, (str, bytes, dict)) or not isinstance(chunks, Iterable):
            raise TypeError(f"x={type(chunks).__name__}: must give activations [n, d] when iterated over")
        self._chunks, self._source = chunks, str(source)
        self._saves = all(callable(getattr(chunks, name, None)) for name in ("state_dict", "load_state_dict"))
        self._again = iter(chunks) is not chunks
        self.widths: list[int] = []
        self._pending: list[Tensor] | None = None  # read for its widths, and given by the next `read`
        self._count = self._tokens = 0  # chunks and tokens since the beginning, or since it began anew
        self._last: str | None = None
        self._begin()
        self._inner = self._place()
        self._pending = self._next()
        if self._pending is None:
            raise ValueError("x: holds no activations; at least one chunk [n, d] is needed")

    @property
    def about(self) -> list[dict[str, Any]]:
        return [{"source": self._source, "settings": {}} for _ in self.widths]

    def read(self) -> list[Tensor] | None:
        parts = self._next()
        if parts is None:
            return None
        named = {"chunk": parts[0]} | {f"chunk, part {i}": x for i, x in enumerate(parts) if i}
        self._count, self._last = self._count + 1, tensors_crc32(named)
        self._tokens += len(parts[0])
        return parts

    def state_dict(self) -> dict[str, Any]:
        inner = self._place() if self._pending is None else self._inner
        return {"epoch": self._epoch, "count": self._count, "crc32": self._last, "inner": inner}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        where = "the place in the iterator"
        epoch, count = field(where, state, "epoch", int, 0), field(where, state, "count", int, 0)
        if self._saves:
            self._chunks.load_state_dict(state.get("inner"))  # type: ignore[attr-defined]
        elif not self._again and (self._pending is None or self._count):
            raise ValueError(
                f"{self._name}: has been read from, and has no state_dict and load_state_dict to go back with; give an "
                "iterator that begins anew, or one that has them"
            )
        if self._saves or self._again:
            self._pending = None
            self._begin(epoch)
        if self._saves:
            self._count, self._last = count, state.get("crc32")
            return
        for _ in range(count):
            if self.read() is None:
                break
        if (self._count, self._last) != (count, state.get("crc32")):
            raise ValueError(
                f"{self._name}: does not give the activations that it gave before: chunk {count - 1} is another, or "
                "none; a training goes on with the same alone. state_dict and load_state_dict let an iterator say "
                "itself where it is"
            )

    def _begin(self, epoch: int = 0) -> None:
        self._iterator: Iterator[Any] = iter(self._chunks)
        self._epoch, self._count, self._tokens, self._last = epoch, 0, 0, None

    def _place(self) -> Any:
        """What the iterator itself says of its place."""
        return _plain(self._chunks.state_dict()) if self._saves else None  # type: ignore[attr-defined]

    def _next(self) -> list[Tensor] | None:
        if self._pending is not None:
            parts, self._pending = self._pending, None
            return parts
        chunk = next(self._iterator, _END)
        if chunk is _END and self._again and self._tokens:
            self._begin(self._epoch + 1)
            chunk = next(self._iterator, _END)
        return None if chunk is _END else self._checked(chunk)

    @property
    def _name(self) -> str:
        return self._source or "the iterator"

    def _checked(self, chunk: Any) -> list[Tensor]:
        """The parts of a chunk, float32 [n, d] each."""
        chunk_name = f"x, chunk {self._count}"
        parts = list(chunk) if isinstance(chunk, (list, tuple)) else [chunk]
        expected = len(self.widths) or max(1, len(parts))
        if len(parts) != expected:
            raise ValueError(f"{chunk_name}: {len(parts)} parts: must be {expected}, as in the first chunk")
        found: list[Tensor] = []
        for i, part in enumerate(parts):
            name = f"{chunk_name}, part {i}" if expected > 1 else chunk_name
            check_chunk(name, part)
            width = self.widths[i] if self.widths else part.shape[1]
            if part.shape[1] != width:
                raise ValueError(f"{name}: shape={tuple(part.shape)}: must be [n, {width}], as wide as the first chunk")
            if len(part) != len(parts[0]):
                raise ValueError(f"{name}: {len(part)} tokens: must be those of part 0, which has {len(parts[0])}")
            x = as_tensor(part)
            check_all_finite(name, x)
            found.append(as_stored(x, "float32"))
        self.widths = self.widths or [x.shape[1] for x in found]
        return found


def _plain(state: Any) -> Any:
    """A copy of what an iterator says of its place; TypeError for what no checkpoint can hold."""
    if isinstance(state, Tensor):
        return state.detach().cpu().clone()
    if isinstance(state, np.ndarray):
        return torch.from_numpy(state.copy())
    if isinstance(state, np.generic):
        return state.item()
    if isinstance(state, _PLAIN):
        return state
    if isinstance(state, dict):
        return {key: _plain(value) for key, value in state.items()}
    if type(state) in (list, tuple):
        return type(state)(map(_plain, state))
    raise TypeError(
        f"state_dict() of the iterator holds a {type(state).__name__}: must be tensors, numbers, strings, None, and "
        "lists and dicts of them"
    )
