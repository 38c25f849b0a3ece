"""What was computed for some tokens after others, as one."""

from __future__ import annotations

import torch
from torch import Tensor

from ..codes import SparseCodes


def join_codes(parts: list[SparseCodes]) -> SparseCodes:
    """Codes of blocks of tokens [B_i, F] as those of all, [sum B_i, F]; in their order."""
    if len(parts) == 1:
        return parts[0]
    counts = [part.shape[0] for part in parts]
    n_features = parts[0].shape[1]
    entries = [part.entries() for part in parts]
    first = 0
    for at, n in enumerate(counts):
        entries[at] = entries[at]._replace(tokens=entries[at].tokens + first)
        first += n
    values, tokens, features = (torch.cat(column) for column in zip(*entries))
    return SparseCodes(values, tokens, features, (first, n_features))


def join_rows(parts: list[Tensor]) -> Tensor:
    """Rows [B_i, n] as one matrix."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)
