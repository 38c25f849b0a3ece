"""A store made from activations in memory: a tensor, a numpy array, or an iterator of either."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..support.atomic_files import read_json
from ..support.output_folder import check_output_folder, is_leftover, locked
from .chunks import check_chunk, check_holdout, checked_pieces
from .store_writer import FORMAT, MANIFEST, StoreWriter, as_stored, new_manifest


def write_tensors(folder: Path, x: Any, holdout: int, shard_tokens: int, dtype: str, source: str) -> None:
    """Writes the store that `ActivationStore.write` describes; its arguments, with the numbers checked.

    Holds in memory the held-out tokens, a shard and a chunk at most.
    """
    check_output_folder(folder)
    if folder.exists():
        _check_free(folder)
    if isinstance(x, (Tensor, np.ndarray)):
        check_chunk("x", x)
        check_holdout(holdout, len(x))
    pieces = checked_pieces(x, shard_tokens)
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
    check_holdout(holdout, tokens)
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
