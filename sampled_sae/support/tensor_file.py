"""A safetensors file that is written piece by piece, so that no process needs to hold a whole tensor of it."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from .checksums import as_text, crc32_of_kind

# in the order in which safetensors' own writer has the tensors
_DTYPES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.bool: "BOOL",
}
_AT_ONCE = 1 << 20


class Piece(NamedTuple):
    """The part of the tensor `name` that begins with index `first` of dimension `dim`, and has all of the others."""

    name: str
    part: Tensor
    dim: int = 0
    first: int = 0


class Kind(NamedTuple):
    """Of a whole tensor."""

    dtype: torch.dtype
    shape: torch.Size


def write_pieces(path: Path, kinds: Mapping[str, Kind], pieces: Iterable[Piece], written_as: str) -> None:
    """What `safetensors.torch.save_file` makes of the whole tensors, to the byte.

    Args:
        path: an existing file, which is overwritten.
        kinds: of all tensors, by name; int64, floats and bool.
        pieces: of all tensors, in any order, on any device.
        written_as: the file's metadata has `{"format": "<written_as> crc32 <that of the tensors>"}`.

    Raises:
        RuntimeError: pieces that do not add up to the tensors.
    """
    names = sorted(kinds, key=lambda name: (list(_DTYPES).index(kinds[name].dtype), name))
    sizes = {name: kinds[name].dtype.itemsize * math.prod(kinds[name].shape) for name in names}
    start, starts = len(_header(kinds, sizes, written_as, 0)), {}
    for name in names:
        starts[name] = start
        start += sizes[name]
    with open(path, "r+b") as file:
        file.truncate(start)
        written = sum(_write(file, starts[piece.name], kinds[piece.name], piece) for piece in pieces)
        if written != sum(sizes.values()):
            raise RuntimeError(f"{path}: {written} bytes of the tensors' {sum(sizes.values())} were given")
        crc = 0
        for name in sorted(names):
            crc = crc32_of_kind(name, *kinds[name], crc)
            file.seek(starts[name])
            for at in range(0, sizes[name], _AT_ONCE):
                crc = zlib.crc32(file.read(min(_AT_ONCE, sizes[name] - at)), crc)
        file.seek(0)
        file.write(_header(kinds, sizes, written_as, crc))


def _write(file: BinaryIO, start: int, kind: Kind, piece: Piece) -> int:
    """Number of bytes."""
    part = piece.part.detach().cpu().contiguous()
    if part.numel() == 0:
        return 0
    before = math.prod(kind.shape[: piece.dim])
    step = kind.dtype.itemsize * math.prod(kind.shape[piece.dim :])
    start += kind.dtype.itemsize * math.prod(kind.shape[piece.dim + 1 :]) * piece.first
    for row in part.reshape(-1).view(torch.uint8).reshape(before, -1):
        file.seek(start)
        file.write(row.numpy().data)
        start += step
    return part.nbytes


def _header(kinds: Mapping[str, Kind], sizes: Mapping[str, int], written_as: str, crc: int) -> bytes:
    """With the tensors in the order of `sizes`; as long for any `crc`."""
    entries: dict[str, object] = {"__metadata__": {"format": f"{written_as} crc32 {as_text(crc)}"}}
    end = 0
    for name, size in sizes.items():
        dtype, shape = kinds[name]
        entries[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [end, end := end + size]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
