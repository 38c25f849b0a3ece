"""Files of tensors that a manifest lists, each with its size and its checksum: how they are written and read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from .argument_checks import check_integer
from .atomic_files import write_atomically
from .checksums import damage, file_crc32

# that values are stored in
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class ListedFilesWriter:
    """Writes shards into a folder and keeps the manifest of them.

    Args:
        folder: of the store.
        manifest: new, or that of a store whose writing goes on; it says "complete" once every file has been looked at.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder, self.manifest = folder, manifest
        manifest["complete"] = False
        self._shards: dict[str, dict[str, Any]] = {shard["file"]: shard for shard in manifest["shards"]}

    def write_file(self, file: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """Returns what the manifest says of every file."""
        path = self.folder / file
        write_atomically(path, lambda temporary: save_file(tensors, temporary))
        return {"file": file, "bytes": path.stat().st_size, "crc32": file_crc32(path)}

    def list_shard(self, entry: dict[str, Any]) -> dict[str, Any]:
        """Puts a shard into the manifest that this writer, or another in the same folder, has written."""
        self._shards[entry["file"]] = entry
        self.manifest["shards"] = [self._shards[file] for file in sorted(self._shards)]
        return entry


@dataclass(frozen=True)
class ListedFiles(ABC):
    """A folder and its manifest, as a dict; the files stay on disk until they are asked for."""

    folder: Path
    manifest: dict[str, Any]
    _verified: set[str] = field(default_factory=set, init=False, repr=False, compare=False)

    @property
    def tokens(self) -> list[int]:
        """Tokens in each shard."""
        return [int(shard["tokens"]) for shard in self.manifest["shards"]]

    def entry(self, i: int) -> dict[str, Any]:
        """What the manifest says of shard i, 0 <= i < len(self.tokens)."""
        i = check_integer("i", i, 0)
        if i >= len(self.tokens):
            raise ValueError(f"i={i}: {self.folder} has {len(self.tokens)} shards")
        found: dict[str, Any] = self.manifest["shards"][i]
        return found

    def whole(self, entry: dict[str, Any]) -> Path:
        """The path of a file in the manifest, whose checksum has been verified once.

        Raises:
            ValueError: damage, with the file and what mends it.
        """
        path = self.folder / entry["file"]
        if entry["file"] not in self._verified and (problem := self._damage(entry)):
            raise ValueError(f"{path}: {problem}; {self._cure()}")
        self._verified.add(entry["file"])
        return path

    def _damage(self, entry: dict[str, Any]) -> str | None:
        return damage(self.folder, entry)

    @abstractmethod
    def _cure(self) -> str:
        """What writes a damaged file again, for people."""
