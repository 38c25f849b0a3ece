"""Lists of entries with room for more than are in them: what filters append to."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..encoder import Operands


class Hits(NamedTuple):
    """Entries that a filter let through, in any order: values fp32 [cap], keys int64 [cap], how many int64 [1].

    Unused places hold value 0 and key B * F; a number above cap says that some are missing.
    """

    values: Tensor
    keys: Tensor
    found: Tensor


def no_hits(operands: Operands, cap: int) -> Hits:
    """A list of `cap` unused places."""
    values = operands.x.new_zeros(cap, dtype=torch.float32)
    keys = torch.full((cap,), operands.n_tokens * operands.n_features, dtype=torch.int64, device=values.device)
    return Hits(values, keys, operands.x.new_zeros(1, dtype=torch.int64))


def in_order(values: Tensor, keys: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Sorted by key, all of which are at most B * F: 32 bits, where they suffice, take half the passes."""
    keys, order = torch.sort(keys.int() if shape[0] * shape[1] < 2**31 else keys)
    return values.index_select(0, order), keys.long()
