"""Where in the texts tokens stand, and the activations of tokens with it."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .checksums import tensors_crc32


class TokenPlaces(NamedTuple):
    """Rows of token ids, and the places in them of some tokens.

    rows: int32 [R, context], the ids of whole rows. token_rows, positions: int32 [n], the row of each token and its
    place there, ascending by row, then position. Equivalent to `ids = rows[token_rows, positions]`.
    """

    rows: Tensor
    token_rows: Tensor
    positions: Tensor

    @classmethod
    def of_rows(cls, rows: Tensor, stay: Tensor) -> TokenPlaces:
        """Of ids [R, context] and bool [R, context], which of them are there."""
        token_rows, positions = stay.nonzero(as_tuple=True)
        return cls(rows.to("cpu", torch.int32).contiguous(), token_rows.int(), positions.int())

    @classmethod
    def read(cls, path: Path, tensors: dict[str, Tensor]) -> TokenPlaces:
        """From the tensors of a file.

        Raises:
            ValueError: naming the file: missing, or other shapes, dtypes or places than those of rows.
        """
        places = cls(*(tensors.get(name, torch.empty(0)) for name in cls._fields))
        n = len(places.token_rows)
        fits = all(t.dtype == torch.int32 for t in places) and places.rows.dim() == 2
        if not fits or places.token_rows.shape != (n,) or places.positions.shape != (n,):
            raise ValueError(f"{path}: its rows, token_rows and positions are not those of tokens")
        for name, t, size in zip(cls._fields[1:], places[1:], places.rows.shape):
            if n and not 0 <= int(t.min()) <= int(t.max()) < size:
                raise ValueError(f"{path}: {name} from {int(t.min())} to {int(t.max())}: there are {size}")
        return places

    def crc32(self) -> str:
        """Equal for the same tokens of the same rows."""
        return tensors_crc32(self._asdict())

    @property
    def ids(self) -> Tensor:
        """int32 [n], the tokens' own ids."""
        return self.rows[self.token_rows.long(), self.positions.long()]


class TokenShard(NamedTuple):
    """x: [n, d], activations as the model makes them. places: where their tokens stand; None without text."""

    x: Tensor
    places: TokenPlaces | None
