"""`ArrayActivations`: a tensor or an array as it is, read as a store would be that was written of it."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Hashable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..support.argument_checks import check_integer
from ..support.checksums import tensors_crc32
from ..support.remote_files import is_url, local_copy
from .activation_store import SHARD_TOKENS
from .activations import Activations
from .chunks import as_tensor, check_chunk, check_holdout, checked_pieces
from .store_writer import as_stored, new_manifest, scale_of, sum_squares

SUFFIXES = (".npy", ".safetensors", ".pt", ".pth")


class ArrayActivations(Activations):
    """Activations [n, d] in memory or in a mapped file, without a copy.

    They are read once when this is made, for their scale, their checksums and NaN or inf; a training on them equals,
    bit for bit, one on `ActivationStore.write(folder, x, holdout)`. They must stay as they are until it has ended:
    a training that goes on from a checkpoint compares the checksums.

    Args:
        x: float16, bfloat16, float32 or float64 [n, d], on any device; a numpy array may be memory-mapped.
        holdout: how many tokens, the last ones, are kept for evaluation and never trained on.
        source: where the activations come from, as recorded; also their name in errors.

    Raises:
        ValueError, TypeError: naming the argument, its value and what is allowed: NaN or inf (with the place), all
            zero, no tokens, other shapes or dtypes.
    """

    def __init__(self, x: Tensor | np.ndarray, holdout: int = 0, source: str = "") -> None:
        check_chunk("x", x)
        if len(x) == 0:
            raise ValueError("x: holds no tokens; at least one is needed")
        self._x, self._held_out = x, check_integer("holdout", holdout, 0)
        check_holdout(self._held_out, len(x))
        self._trained_on = len(x) - self._held_out
        settings = {"holdout": self._held_out, "shard_tokens": SHARD_TOKENS, "dtype": "float32"}
        self.manifest = new_manifest(x.shape[1], "float32", settings, source=str(source))
        pieces = checked_pieces(x[: self._trained_on], SHARD_TOKENS)
        self.manifest["shards"] = [_described(as_stored(piece, "float32")) for piece in pieces]
        self.manifest["scale"] = scale_of(self.manifest)
        self.manifest["complete"] = True
        if self._held_out:
            tokens = [as_stored(piece, "float32") for piece in checked_pieces(x[self._trained_on :], SHARD_TOKENS)]
            self.manifest["holdout"] = {"tokens": sum(map(len, tokens)), "rows": None}

    @property
    def where(self) -> str:
        return self.manifest["source"] or f"x [{len(self._x)}, {self.d_in}]"

    @property
    def place(self) -> Hashable:
        return id(self)

    @property
    def tokens(self) -> list[int]:
        return [shard["tokens"] for shard in self.manifest["shards"]]

    def shard(self, i: int, start: int = 0, stop: int | None = None) -> Tensor:
        i = check_integer("i", i, 0)
        if i >= len(self.tokens):
            raise ValueError(f"i={i}: {self.where} has {len(self.tokens)} shards")
        first, tokens = i * SHARD_TOKENS, self.tokens[i]
        return self._read(first + start, first + (tokens if stop is None else min(stop, tokens)))

    def holdout(self) -> tuple[Tensor, Tensor | None]:
        if not self._held_out:
            raise ValueError(
                f"{self.where}: has no held-out part, which evaluation needs; give holdout=TOKENS, or --holdout TOKENS"
            )
        return self._read(self._trained_on, len(self._x)), None

    def _read(self, start: int, stop: int) -> Tensor:
        return as_stored(as_tensor(self._x[start:stop]), "float32")


def _described(piece: Tensor) -> dict[str, Any]:
    return {"tokens": len(piece), "crc32": tensors_crc32({"activations": piece}), "sum_squares": sum_squares(piece)}


def open_array(file: str | Path, holdout: int = 0) -> ArrayActivations:
    """The activations [n, d] in a .npy, .safetensors, .pt or .pth file, mapped into memory where the format allows it.

    Args:
        file: "FILE", or "FILE:NAME" for one of several tensors in a .safetensors or .pt file; or a URL of fsspec, of
            whose file a copy is made.
        holdout: as in `ArrayActivations`.

    Raises:
        ValueError: no such file, another format, no tensor of that name; naming the file.
    """
    path, name = _place(str(file))
    if is_url(file):
        try:
            path = local_copy(str(file).removesuffix(f":{name}"))
        except FileNotFoundError:
            raise ValueError(f"{file}: no such file") from None
    readers = {".npy": _npy, ".safetensors": _safetensors, ".pt": _pt, ".pth": _pt}
    x = readers[_place(str(file))[0].suffix.lower()](path, name)
    # one name for a file, whatever folder the command is given in
    source = str(file) if is_url(file) else os.path.abspath(file)
    try:
        return ArrayActivations(x, holdout, source)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{file}: {error}") from error


def is_array_file(file: str | Path) -> bool:
    """Whether a name, with that of a tensor behind it or without, is one for `open_array`."""
    return _place(str(file))[0].suffix.lower() in SUFFIXES


def _place(file: str) -> tuple[Path, str | None]:
    before, _, after = file.rpartition(":")
    if before and Path(before).suffix.lower() in SUFFIXES and Path(file).suffix.lower() not in SUFFIXES:
        return Path(before), after
    return Path(file), None


def _npy(path: Path, name: str | None) -> Any:
    if name is not None:
        raise ValueError(f"{path}: holds one array, which has no name; leave out ':{name}'")
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path}: truncated or not a .npy file of numbers ({error})") from None


def _safetensors(path: Path, name: str | None) -> Any:
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        with safe_open(path, "pt") as file:
            return file.get_tensor(_chosen(path, name, list(file.keys())))
    except SafetensorError as error:
        raise ValueError(f"{path}: truncated or not a safetensors file ({error})") from None


def _pt(path: Path, name: str | None) -> Any:
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        # what torch wrote before its version 1.6 is no zip file and cannot be mapped
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except UnpicklingError as error:
        unsafe = "truncated or not a file of tensors alone; nothing else is loaded, for it could run code"
        raise ValueError(f"{path}: {unsafe}") from error
    except Exception as error:  # torch has many, some of them pages long
        said = str(error).strip().split("\n")[0]
        raise ValueError(f"{path}: truncated or not a file of tensors ({type(error).__name__}: {said})") from error
    if not isinstance(found, dict):
        if name is not None:
            raise ValueError(f"{path}: holds a {type(found).__name__} without names; leave out ':{name}'")
        return found
    tensors = {str(key): value for key, value in found.items() if isinstance(value, Tensor)}
    return tensors[_chosen(path, name, list(tensors))]


def _chosen(path: Path, name: str | None, names: list[str]) -> str:
    """The one tensor to read."""
    if name is None and len(names) == 1:
        return names[0]
    if not names:
        raise ValueError(f"{path}: holds no tensor")
    if name not in names:
        wanted = "several tensors" if name is None else f"no tensor {name!r}"
        raise ValueError(f"{path}: {wanted}, but {', '.join(names)}: name one, as in {path.name}:NAME")
    return name
