"""The files of a store of codes: `manifest.json` and `codes_00000.safetensors`, ....

A shard holds the active entries of its tokens, sorted by feature, then token:

- `values` [n], `tokens` int32 [n], the token's number in the shard
- `features`, `counts` int32 [A]: the features that occur, ascending, and how many of the n entries each has
- `rows`, `token_rows`, `positions`: the `TokenPlaces` of the tokens, where there is text

A file becomes visible only when whole, and counts only once the manifest lists it, with its checksum.
"""

from __future__ import annotations

from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..codes import Entries
from ..support.atomic_files import field, read_json, read_json_of, write_json
from ..support.listed_files import DTYPES, ListedFilesWriter
from ..support.token_places import TokenPlaces

FORMAT = "sampled-sae codes"
VERSION = 1
MANIFEST = "manifest.json"


class CodesOfShard(NamedTuple):
    """See the module: entries by feature."""

    values: Tensor
    tokens: Tensor
    features: Tensor
    counts: Tensor

    @classmethod
    def of(cls, entries: Entries, dtype: torch.dtype) -> CodesOfShard:
        """From entries by token."""
        features, order = entries.features.sort(stable=True)
        occurring, counts = features.unique_consecutive(return_counts=True)
        values = entries.values[order].to(dtype)
        return cls(values, entries.tokens[order].int(), occurring.int(), counts.int())


def new_manifest(d_sae: int, dtype: str, settings: dict[str, Any], about: dict[str, Any]) -> dict[str, Any]:
    """The manifest of a store without files; `about` says what the codes are of, for a reader."""
    return {
        "format": FORMAT,
        "version": VERSION,
        **about,
        "d_sae": d_sae,
        "dtype": dtype,
        "shards": [],
        "complete": False,
        "settings": settings,
    }


def is_codes(folder: Path) -> bool:
    """Whether the manifest in a folder is that of codes.

    Raises:
        ValueError: no manifest, or one that is no JSON object; naming the file.
    """
    return read_json(folder / MANIFEST).get("format") == FORMAT


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a store, finished or not, with every field that is read of it.

    Raises:
        ValueError: none, a foreign one, or one with a field of another type; naming the file and the field.
    """
    path = folder / MANIFEST
    manifest = read_json_of(path, FORMAT, VERSION)
    field(path, manifest, "complete", bool)
    field(path, manifest, "d_sae", int, 1)
    field(path, manifest, "settings", dict)
    if field(path, manifest, "dtype", str) not in DTYPES:
        raise ValueError(f"{path}: dtype={manifest['dtype']!r}: must be one of {', '.join(DTYPES)}")
    for i, shard in enumerate(field(path, manifest, "shards", list)):
        where = f"{path}: shards[{i}]"
        for name in ("file", "crc32"):
            field(where, shard, name, str)
        for name in ("tokens", "entries", "bytes"):
            field(where, shard, name, int, 0)
        field(where, shard, "rows", (int, NoneType))
    return manifest


class CodesWriter(ListedFilesWriter):
    """Writes the files of a store of codes, and its manifest."""

    def written(self, index: int) -> dict[str, Any] | None:
        """The manifest's entry of a shard whose file is undamaged; None of any other."""
        entry = self._shards.get(_shard_name(index))
        return entry if self.is_whole(entry) else None

    def write_shard(self, index: int, entries: Entries, n_tokens: int, places: TokenPlaces | None) -> dict[str, Any]:
        """Entries by token of n tokens; returns the manifest's entry."""
        codes = CodesOfShard.of(entries, DTYPES[self.manifest["dtype"]])
        entry = self.write_file(_shard_name(index), {**codes._asdict(), **(places._asdict() if places else {})})
        sizes = {"tokens": n_tokens, "entries": len(codes.values), "rows": None if places is None else len(places.rows)}
        return self.list_shard({**entry, **sizes})

    def write_manifest(self, complete: bool = False) -> None:
        """Lists the files written so far."""
        self.manifest["complete"] = complete
        write_json(self.folder / MANIFEST, self.manifest)


def _shard_name(index: int) -> str:
    return f"codes_{index:05d}.safetensors"
