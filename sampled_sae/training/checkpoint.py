"""The checkpoint of a training: torch's file with a checksum behind it, which is verified before anything is read.

torch verifies none of the checksums in its own file. Ours follows that file's end, which torch and zip tools skip.
"""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..support.argument_checks import check_finite
from ..support.atomic_files import field, write_atomically
from ..support.checksums import as_text, file_crc32

CHECKPOINT = "checkpoint.pt"
FIELDS: dict[str, type] = {
    "settings": dict,
    "step": int,
    "seconds": float,
    "sae": dict,
    "generator": Tensor,
    "pool": dict,
    "optimizer": dict,
    "metrics": list,
}
_MARK = b"sampled-sae crc32 "
_TRAILER = len(_MARK) + 8
_ZIP_END, _ZIP_END_BYTES = b"PK\x05\x06", 22


def write_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """`state` has the fields of `FIELDS`."""
    write_atomically(path, lambda temporary: _save(state, temporary))


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What `write_checkpoint` wrote, on the CPU.

    Raises:
        ValueError: naming the file: truncated, damaged, not a checkpoint, without one of the fields, or with NaN or inf
            among its weights.
    """
    _check_bytes(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path}: truncated or not a checkpoint ({type(error).__name__}: {error})") from error
    if not isinstance(state, dict) or "settings" not in state:
        raise ValueError(f"{path}: not a checkpoint of sampled-sae")
    for name, kind in FIELDS.items():
        field(path, state, name, kind)
    for name in ("settings", "metrics"):
        try:
            json.dumps(state[name])
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {name} are no plain values ({error})") from None
    for part in ("sae", "optimizer"):
        for name, value in _tensors(part, state[part]):
            check_finite(value, f"{path}: {name}")
    return state


class _Summed:
    """A file that torch writes to, with the checksum of what has been written."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.crc = file, 0

    def write(self, piece: bytes) -> int:
        self.crc = zlib.crc32(piece, self.crc)
        return self.file.write(piece)

    def flush(self) -> None:
        self.file.flush()


def _save(state: dict[str, Any], path: Path) -> None:
    with open(path, "wb") as file:
        summed = _Summed(file)
        torch.save(state, summed)  # type: ignore[arg-type]  # it needs no more of a file than this
        file.write(_MARK + as_text(summed.crc).encode())


def _check_bytes(path: Path) -> None:
    size = path.stat().st_size
    with open(path, "rb") as file:
        file.seek(max(0, size - _TRAILER))
        end = file.read()
    if end.startswith(_MARK):
        if file_crc32(path, size - _TRAILER).encode() != end[len(_MARK) :]:
            raise ValueError(f"{path}: damaged, its bytes do not have the checksum that was written with them")
    elif end[-_ZIP_END_BYTES:].startswith(_ZIP_END):  # written by torch alone, as earlier versions did
        try:
            with zipfile.ZipFile(path) as whole:
                bad = whole.testzip()
        except Exception as error:  # zipfile has many
            raise ValueError(f"{path}: damaged ({type(error).__name__}: {error})") from error
        if bad is not None:
            raise ValueError(f"{path}: damaged, {bad} in it does not have its checksum")
    else:
        raise ValueError(f"{path}: truncated or not a checkpoint")


def _tensors(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """The floating tensors inside, with the names that lead to them."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield name, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _tensors(f"{name}.{key}", inner)
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from _tensors(f"{name}[{i}]", inner)
