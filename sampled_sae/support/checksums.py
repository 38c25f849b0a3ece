"""Checksums of files. CRC-32 finds damage, not forgery, and is the fastest of the standard library by far."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_PIECE = 1 << 18


def as_text(crc: int) -> str:
    return f"{crc:08x}"


def file_crc32(path: Path, length: int | None = None) -> str:
    """Eight hexadecimal digits, of the first `length` bytes or of all."""
    crc, left = 0, path.stat().st_size if length is None else length
    with open(path, "rb") as file:
        while left > 0 and (piece := file.read(min(_PIECE, left))):
            crc = zlib.crc32(piece, crc)
            left -= len(piece)
    return as_text(crc)


def bytes_crc32(data: bytes) -> str:
    """The same of bytes."""
    return as_text(zlib.crc32(data))


def tensors_crc32(tensors: dict[str, Tensor]) -> str:
    """The same of tensors on the CPU, with their names, dtypes and shapes."""
    crc = 0
    for name, tensor in sorted(tensors.items()):
        crc = crc32_of_kind(name, tensor.dtype, tensor.shape, crc)
        crc = zlib.crc32(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data, crc)
    return as_text(crc)


def crc32_of_kind(name: str, dtype: torch.dtype, shape: torch.Size, crc: int) -> int:
    """`crc` continued by what stands before the bytes of a tensor."""
    return zlib.crc32(f"{name} {dtype} {tuple(shape)}".encode(), crc)


def json_crc32(value: Any) -> str:
    """The same of a value that JSON gives back as it was."""
    return as_text(zlib.crc32(json.dumps(value, sort_keys=True).encode()))


def damage(folder: Path, entry: dict[str, Any]) -> str | None:
    """What is wrong with a file that a manifest lists, by its size and its checksum; None where nothing is.

    Args:
        folder: that of the manifest.
        entry: of the manifest: `file`, `bytes`, and `crc32`, which earlier versions did not write.
    """
    path = folder / entry["file"]
    if not path.is_file():
        return "no such file, but the manifest lists it"
    return difference(path.stat().st_size, lambda: file_crc32(path), entry)


def difference(size: int, crc32: Callable[[], str], entry: dict[str, Any]) -> str | None:
    """The same of so many bytes that were found, and their checksum."""
    if size != entry["bytes"]:
        return f"corrupt, {size} bytes where the manifest says {entry['bytes']}"
    if "crc32" in entry and (found := crc32()) != entry["crc32"]:
        return f"corrupt, checksum {found} where the manifest says {entry['crc32']}"
    return None
