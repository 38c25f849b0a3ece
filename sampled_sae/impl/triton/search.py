"""The entries that a rule keeps of large pools and of whole dictionaries, as an operator: what is in stream.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..encoder import Operands
from .screen import of_tensors
from .stream import stream_batch, stream_token


@torch.library.custom_op("sampled_sae::select_entries", mutates_args=())
def select_entries(
    x: Tensor,
    W: Tensor,
    b: Tensor,
    scale: Tensor | None,
    members: Tensor | None,
    budget: int,
    per_token: bool,
    hint: Tensor | None,
    screen: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The kept entries of relu(x W^T + b) * scale: (values, tokens, features, the next batch's hint fp32 [1], opened).

    `budget` entries of the batch, or of each token; sorted by token, then feature. screen: `tensors_of` one, or none;
    opened, int64 [1], is how many entries it left open.
    """
    operands = Operands(x, W, b, scale, members, of_tensors(x, screen))
    if per_token:
        found = (*stream_token(operands, budget), x.new_zeros(1, dtype=torch.float32))
    else:
        found = stream_batch(operands, budget, hint)
    opened = 0 if operands.screen is None else operands.screen.looks.open_entries
    return (*found, opened if isinstance(opened, Tensor) else x.new_full((1,), opened, dtype=torch.int64))


@select_entries.register_fake
def _(x: Tensor, W: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    budget, per_token = rest[-4:-2]
    n = x.shape[0] * budget if per_token else budget
    values = x.new_empty(n, dtype=torch.float32)
    tokens, features = (x.new_empty(n, dtype=torch.int32) for _ in range(2))
    return values, tokens, features, x.new_empty(1, dtype=torch.float32), x.new_empty(1, dtype=torch.int64)
