"""Tensors that a manifest at a URL lists, read into memory."""

from __future__ import annotations

from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from ..support.checksums import bytes_crc32
from ..support.remote_files import RemotePath


def read_remote(path: RemotePath, entry: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of a safetensors file, which must have the size and the checksum that its manifest says.

    Raises:
        ValueError: missing, truncated, corrupt or foreign; naming the URL.
        OSError: what the other side says.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file, but the manifest lists it") from None
    if len(data) != entry["bytes"]:
        raise ValueError(f"{path}: corrupt, {len(data)} bytes where the manifest says {entry['bytes']}")
    if "crc32" in entry and (found := bytes_crc32(data)) != entry["crc32"]:
        raise ValueError(f"{path}: corrupt, checksum {found} where the manifest says {entry['crc32']}")
    try:
        return dict(safetensors.torch.load(data))
    except SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file ({error})") from None
