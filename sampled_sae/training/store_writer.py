"""The files of a store of activations, written one by one, and the manifest that lists them.

The folder holds `shard_00000.safetensors`, ... (tensor `activations` [n, d], raw, and where there is text the
`TokenPlaces` of the tokens), `holdout.safetensors` (activations of tokens kept for evaluation, and their token rows
where there is text) and `manifest.json`. A file becomes visible only when whole, and counts only once the manifest
lists it, with its checksum.
"""

from __future__ import annotations

import math
from importlib import metadata
from pathlib import Path
from types import NoneType
from typing import Any

from torch import Tensor

from ..support import checksums
from ..support.atomic_files import field, read_json_of, read_tensors, write_json
from ..support.listed_files import DTYPES, ListedFilesWriter
from ..support.remote_files import AnyPath
from ..support.token_places import TokenPlaces

FORMAT = "sampled-sae activations"
VERSION = 1
MANIFEST = "manifest.json"
HOLDOUT = "holdout.safetensors"
# Sums of the squares of a batch of such values stay below float32's largest number, 3e38.
LARGEST = 1e15


def new_manifest(d_in: int, dtype: str, settings: dict[str, Any], **about: Any) -> dict[str, Any]:
    """The manifest of a store without files; `about` is what else a reader wants to know of the activations."""
    return {
        "format": FORMAT,
        "version": VERSION,
        **about,
        "d_in": d_in,
        "dtype": dtype,
        "scale": None,
        "shards": [],
        "holdout": None,
        "complete": False,
        "settings": settings,
        "versions": {package: installed_version(package) for package in ("sampled-sae", "torch", "safetensors")},
    }


def read_manifest(folder: AnyPath) -> dict[str, Any]:
    """The manifest of a store, finished or not, with every field that is read of it.

    Raises:
        ValueError: none, a foreign one, or one with a field of another type; naming the file and the field.
    """
    path = folder / MANIFEST
    manifest = read_json_of(path, FORMAT, VERSION)
    complete = field(path, manifest, "complete", bool)
    field(path, manifest, "d_in", int, 1)
    field(path, manifest, "settings", dict)
    for name, kind in (("model", str), ("source", str), ("layer", int), ("point", str), ("context", int)):
        field(path, manifest, name, (kind, NoneType))
    for i, shard in enumerate(field(path, manifest, "shards", list)):
        _check_entry(f"{path}: shards[{i}]", shard, 0)
    if complete and field(path, manifest, "scale", float) <= 0:
        raise ValueError(f"{path}: scale={manifest['scale']!r}: must be > 0")
    held_out = field(path, manifest, "holdout", (dict, NoneType))
    if held_out is not None:
        _check_entry(f"{path}: holdout", held_out, 1)
        if field(f"{path}: holdout", held_out, "rows", (int, NoneType)):
            if not manifest.get("point"):
                field(path, manifest, "layer", int, 0)
            field(path, manifest, "max_norm", float)
    return manifest


def _check_entry(where: str, entry: Any, least: int) -> None:
    field(where, entry, "file", str)
    field(where, entry, "tokens", int, least)
    field(where, entry, "bytes", int, 0)


def check_scale(folder: Path, manifest: dict[str, Any]) -> None:
    """ValueError unless the scale of a finished store is that of its shards; earlier versions wrote no sums."""
    path = folder / MANIFEST
    if not all("sum_squares" in shard for shard in manifest["shards"]):
        return
    for i, shard in enumerate(manifest["shards"]):
        field(f"{path}: shards[{i}]", shard, "sum_squares", float, 0)
    found = scale_of(manifest)
    if not math.isclose(manifest["scale"], found, rel_tol=1e-9):
        raise ValueError(f"{path}: damaged, scale={manifest['scale']} where the shards' sums give {found}")


def installed_version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def as_stored(x: Tensor, dtype: str) -> Tensor:
    """A copy of x on the CPU, in the dtype of the shards.

    Raises:
        ValueError: values of x that this dtype cannot hold, or whose squares no sum in float32 can.
    """
    stored = x.detach().to("cpu", DTYPES[dtype], copy=True)
    if len(x) == 0:
        return stored
    largest = float(x.detach().abs().max())
    if not stored.isfinite().all():
        raise ValueError(f"dtype={dtype!r} cannot hold these activations, which reach {largest:.3g}")
    if largest > LARGEST:
        raise ValueError(f"the activations reach {largest:.3g}: must be at most {LARGEST:g}, divide them by a constant")
    return stored


def damage(folder: Path, entry: dict[str, Any]) -> str | None:
    """What is wrong with a file that the manifest lists, by its checksum; None where nothing is.

    Stores of earlier versions have no checksums: there the shards' sums of squares say it.
    """
    problem = checksums.damage(folder, entry)
    if problem is None and "crc32" not in entry and "sum_squares" in entry:
        try:
            found_sum = sum_squares(read_tensors(folder / entry["file"])["activations"])
        except (ValueError, KeyError) as error:
            return f"corrupt, no readable activations ({error})"
        if not math.isclose(found_sum, entry["sum_squares"], rel_tol=1e-9):
            return f"corrupt, its squares sum to {found_sum:.9g} where the manifest says {entry['sum_squares']:.9g}"
    return problem


def sum_squares(activations: Tensor) -> float:
    return float(activations.double().square().sum())


def scale_of(manifest: dict[str, Any]) -> float:
    """Training activations times this have mean ||x||^2 = d, by the sums that the manifest lists.

    Raises:
        ValueError: all activations are zero, or so small that they might be.
    """
    tokens = sum(shard["tokens"] for shard in manifest["shards"])
    total = math.fsum(shard["sum_squares"] for shard in manifest["shards"])
    if total == 0:
        raise ValueError("all activations are zero: there is no scale to normalise them with")
    scale = math.sqrt(manifest["d_in"] * tokens / total)
    if scale > LARGEST:
        raise ValueError(f"the activations are of size {1 / scale:.3g}: must be at least {1 / LARGEST:g}")
    return scale


class StoreWriter(ListedFilesWriter):
    """Writes the files of a store, and its manifest."""

    def __init__(self, folder: AnyPath, manifest: dict[str, Any]) -> None:
        super().__init__(folder, manifest)
        self._written: list[str] = []

    def has_shard(self, index: int) -> bool:
        """Whether the manifest lists this shard and the file is undamaged; at a URL, of the size it should have."""
        return self.is_whole(self._shards.get(_shard_name(index)))

    def has_holdout(self) -> bool:
        """Whether the manifest lists the held-out part and the file is undamaged."""
        return self.is_whole(self.manifest["holdout"])

    def write_shard(
        self, index: int, activations: Tensor, places: TokenPlaces | None = None, **about: Any
    ) -> dict[str, Any]:
        """activations [n, d], raw, in the dtype of the shards; places: where in the texts the n tokens stand.

        Returns what the manifest says of it: `about` too.
        """
        entry = self._write(_shard_name(index), {"activations": activations, **(places._asdict() if places else {})})
        if places is not None:
            entry["rows"] = len(places.rows)
        return self.list_file({**entry, "sum_squares": sum_squares(activations), **about})

    def write_holdout(self, activations: Tensor, rows: Tensor | None = None, **about: Any) -> dict[str, Any]:
        """activations [n, d], raw; rows int64 [N, context], the token ids that they were computed from."""
        if rows is None:
            return self.list_file({**self._write(HOLDOUT, {"activations": activations}), **about})
        entry = self._write(HOLDOUT, {"rows": rows.contiguous(), "activations": activations})
        return self.list_file({**entry, "rows": len(rows), **about})

    def list_file(self, entry: dict[str, Any]) -> dict[str, Any]:
        """Puts a file into the manifest that this writer, or another in the same folder, has written."""
        if entry["file"] != HOLDOUT:
            return self.list_shard(entry)
        self.manifest["holdout"] = entry
        return entry

    def write_manifest(self, complete: bool = False) -> None:
        """Lists the files written so far, with the scale that their activations have together.

        Raises:
            ValueError: all activations are zero, or so small that they might be.
        """
        if self.manifest["shards"]:
            self.manifest["scale"] = scale_of(self.manifest)
        self.manifest["complete"] = complete
        write_json(self.folder / MANIFEST, self.manifest)

    def delete_files(self) -> None:
        """Takes back what this writer has written, and the manifest, of a folder."""
        assert isinstance(self.folder, Path)
        for file in (MANIFEST, *self._written):
            (self.folder / file).unlink(missing_ok=True)

    def _damage(self, folder: Path, entry: dict[str, Any]) -> str | None:
        return damage(folder, entry)

    def _write(self, file: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
        self._written.append(file)
        return {**self.write_file(file, tensors), "tokens": len(tensors["activations"])}


def _shard_name(index: int) -> str:
    return f"shard_{index:05d}.safetensors"
