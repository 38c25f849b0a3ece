"""A store made from activations in memory: a tensor, a numpy array, or an iterator of either."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..support.argument_checks import FLOATS
from ..support.atomic_files import read_json
from ..support.output_folder import check_output_folder, is_leftover, locked
from .store_writer import FORMAT, MANIFEST, StoreWriter, as_stored, new_manifest


def write_tensors(folder: Path, x: Any, holdout: int, shard_tokens: int, dtype: str, source: str) -> None:
    """Writes the store that `ActivationStore.write` describes; its arguments, with the numbers checked.

    Holds in memory the held-out tokens, a shard and a chunk at most.
    """
    check_output_folder(folder)
    if folder.exists():
        _check_free(folder)
    if isinstance(x, (Tensor, np.ndarray)):
        _check_chunk("x", x)
        _check_holdout(holdout, len(x))
    pieces = _pieces(x, shard_tokens)
    first = next(pieces, None)
    if first is None:
        raise ValueError("x: holds no tokens; at least one is needed")
    settings = {"holdout": holdout, "shard_tokens": shard_tokens, "dtype": dtype}
    writer = StoreWriter(folder, new_manifest(first.shape[1], dtype, settings, source=source))
    with locked(folder, "a write of activations"):
        _check_free(folder)  # still: another may have written there since
        try:
            _write_files(writer, chain([first], pieces), holdout, shard_tokens)
        except BaseException:
            writer.delete_files()
            raise


def _write_files(writer: StoreWriter, pieces: Iterable[Tensor], holdout: int, shard_tokens: int) -> None:
    waiting: deque[Tensor] = deque()  # the last tokens so far: whether they are held out is not known yet
    tokens = written = shards = 0
    for piece in pieces:
        waiting.append(as_stored(piece, writer.manifest["dtype"]))
        tokens += len(piece)
        while tokens - written - holdout >= shard_tokens:
            writer.write_shard(shards, _take(waiting, shard_tokens))
            written, shards = written + shard_tokens, shards + 1
    _check_holdout(holdout, tokens)
    if tokens - written > holdout:
        writer.write_shard(shards, _take(waiting, tokens - written - holdout))
    if holdout:
        writer.write_holdout(_take(waiting, holdout))
    writer.write_manifest(complete=True)


def _check_free(folder: Path) -> None:
    """Only an empty folder is written to: nothing in it can be overwritten or taken for a part of the store."""
    if all(is_leftover(entry.name) for entry in folder.iterdir()):
        return
    manifest: dict[str, Any] = {}
    if (folder / MANIFEST).exists():
        manifest = read_json(folder / MANIFEST)
    if manifest.get("format") != FORMAT:
        found = "files, but no store of activations; a write that was killed leaves such shards"
    elif manifest.get("complete"):
        found = "a complete store of activations; open it with ActivationStore.open"
    else:
        found = "a harvest that has not finished; the same harvest command finishes it"
    raise ValueError(f"folder={str(folder)!r}: must be new or empty, holds {found}")


def _check_holdout(holdout: int, tokens: int) -> None:
    if holdout >= tokens > 0:
        raise ValueError(f"holdout={holdout}: must be less than {tokens}, the tokens of x")


def _pieces(x: Any, most: int) -> Iterator[Tensor]:
    """x in order as checked tensors [m, d] of 1 to `most` tokens."""
    width: int | None = None
    for name, chunk in _chunks(x):
        _check_chunk(name, chunk)
        width = chunk.shape[1] if width is None else width
        if chunk.shape[1] != width:
            raise ValueError(f"{name}: shape={tuple(chunk.shape)}: must be [m, {width}], as wide as the first chunk")
        for start in range(0, len(chunk), most):
            piece = _as_tensor(chunk[start : start + most])
            finite = piece.isfinite()
            if not finite.all():
                token, dimension = (~finite).nonzero()[0].tolist()
                value = float(piece[token, dimension])
                raise ValueError(f"{name}: {value} at token {start + token}, dimension {dimension}: must be finite")
            yield piece


def _chunks(x: Any) -> Iterator[tuple[str, Any]]:
    """(name for errors, chunk)."""
    if isinstance(x, (Tensor, np.ndarray)):
        yield "x", x
    elif isinstance(x, Iterable):
        yield from ((f"x, chunk {i}", chunk) for i, chunk in enumerate(x))
    else:
        raise TypeError(f"x={type(x).__name__}: must be a tensor [n, d], a numpy array, or an iterator of either")


def _check_chunk(name: str, chunk: Any) -> None:
    if isinstance(chunk, Tensor):
        floating = chunk.dtype in FLOATS
    elif isinstance(chunk, np.ndarray):
        floating = chunk.dtype.kind == "f" and chunk.dtype.itemsize <= 8
    else:
        raise TypeError(f"{name}: {type(chunk).__name__}: must be a torch.Tensor or a numpy array")
    if not floating:
        raise TypeError(f"{name}: dtype={chunk.dtype}: must be float16, bfloat16, float32 or float64")
    if chunk.ndim != 2 or chunk.shape[1] == 0:
        raise ValueError(f"{name}: shape={tuple(chunk.shape)}: must be [tokens, d] with d >= 1")


def _as_tensor(piece: Tensor | np.ndarray) -> Tensor:
    # torch refuses arrays of foreign byte order or negative strides, and warns of arrays that are read-only
    if isinstance(piece, np.ndarray):
        return torch.from_numpy(np.array(piece, piece.dtype.newbyteorder("="), order="C"))
    return piece


def _take(waiting: deque[Tensor], n: int) -> Tensor:
    """The first n tokens, removed from `waiting`."""
    taken: list[Tensor] = []
    while n > 0:
        part = waiting.popleft()
        if len(part) > n:
            waiting.appendleft(part[n:])
        taken.append(part[:n])
        n -= len(taken[-1])
    return torch.cat(taken)
