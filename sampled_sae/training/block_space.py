"""Where the activations of a block are put together: in memory, or in a file without a name."""

from __future__ import annotations

import math
import mmap
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from ..support.atomic_files import errors_named
from ..support.output_folder import check_output_folder
from ..support.timing import check_memory

# while the block in use is held, another is read, and in memory a third is put together
_IN_MEMORY, _ON_DISK = 3, 2


class InMemory:
    """Takes one part of a block, of so many numbers a token, piece by piece."""

    def __init__(self, width: int) -> None:
        self._pieces = [torch.empty(0, width)]

    def add(self, x: Tensor) -> None:
        """float32 [n, width] on the CPU, behind what is there."""
        self._pieces.append(x)

    def whole(self) -> Tensor:
        """All of it, [n, width]; the last call."""
        pieces, self._pieces = self._pieces, []
        return torch.cat(pieces)


class OnDisk:
    """The same in a folder. Its file has no name there: the system takes it back when the block, or the process, ends.

    Raises:
        OSError: naming the folder: a full disk, no permission.
    """

    def __init__(self, folder: Path, width: int) -> None:
        self._folder, self._width, self._size = folder, width, 0
        with errors_named(folder):
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  # closed by `whole`

    def add(self, x: Tensor) -> None:
        with errors_named(self._folder):
            self._size += self._file.write(x.contiguous().numpy().data)

    def whole(self) -> Tensor:
        with errors_named(self._folder), self._file as file:
            file.flush()
            if not self._size:
                return torch.empty(0, self._width)
            # torch wants a map that it may write to; the system counts a private one as memory, this one not
            found = mmap.mmap(file.fileno(), self._size, access=mmap.ACCESS_WRITE)
        return torch.frombuffer(found, dtype=torch.float32).view(-1, self._width)


class Room:
    """Makes the spaces of blocks of so many tokens, and says whether there is room for those held at once.

    Args:
        tokens: of a block.
        widths: of its parts.
        folder: that of their files; None for memory.

    Attributes:
        folder: as given.

    Raises:
        ValueError: no such folder.
    """

    def __init__(self, tokens: int, widths: list[int], folder: str | Path | None) -> None:
        self.folder = None if folder is None else Path(folder)
        self._tokens, self._size, self._checked = tokens, 4 * tokens * sum(widths), False
        if self.folder is not None and not self.folder.is_dir():
            raise ValueError(f"buffer_on_disk={folder}: must be a folder that is there")

    def check(self, part: float = 1.0) -> None:
        """Of the blocks those that lie in the memory, or on the disk, that is meant, `part` of them; asked once, before
        the first is there.

        Raises:
            MemoryError, ValueError: there is no room for them in memory, or on the disk of the folder.
        """
        if self._checked:
            return
        if self.folder is None:
            check_memory(f"buffer_tokens={self._tokens}", part * _IN_MEMORY * self._size)
        else:
            check_output_folder(self.folder, math.ceil(part * _ON_DISK * self._size))
        self._checked = True

    def part(self, width: int) -> InMemory | OnDisk:
        return InMemory(width) if self.folder is None else OnDisk(self.folder, width)
