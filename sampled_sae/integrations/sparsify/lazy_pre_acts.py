"""sparsify's `pre_acts`: all activations of an encoder's call, computed only where somebody uses them.

SparseCoder itself takes selections of it: `torch.where(dead, pre_acts, -inf).topk(k_aux)` for AuxK and
`pre_acts.topk(4 * k)` for Multi-TopK. Those two make no [N, F] tensor.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from .encoder_call import EncoderCall


class PreActivations(torch.Tensor):
    """relu(x W^T + b), [..., F], as if it had been computed in the encoder's call; -inf outside a mask bool [F].

    `made` is the ordinary tensor once someone had it: who writes to it wants the next to see that.
    """

    call: EncoderCall
    mask: Tensor | None
    made: Tensor | None

    @staticmethod
    def __new__(cls, call: EncoderCall, mask: Tensor | None = None) -> PreActivations:
        device = call.encoder.W.device
        return torch.Tensor._make_wrapper_subclass(cls, call.shape, dtype=call.dtype, device=device)

    def __init__(self, call: EncoderCall, mask: Tensor | None = None) -> None:
        self.call, self.mask, self.made = call, mask, None

    def dense(self) -> Tensor:
        """The activations as an ordinary tensor, with their gradient; always the same one."""
        if self.made is None:
            every = self.call.dense()
            self.made = every if self.mask is None else torch.where(self.mask, every, -torch.inf)
        return self.made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func in WITHOUT_VALUES:
            return super().__torch_function__(func, types, args, kwargs)
        found = SELECTIONS[func](*args, **kwargs) if func in SELECTIONS else None
        if found is None:
            args, kwargs = tree_map_only(PreActivations, PreActivations.dense, (args, kwargs))
            found = func(*args, **kwargs)
        return found

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise TypeError(f"{func}: pre_acts holds no values until it is used in Python; pass pre_acts.dense()")


def masked(condition: Any, input: Any = None, other: Any = None, **options: Any) -> PreActivations | None:
    """`torch.where(mask of features, pre_acts, -inf)`; None for any other use."""
    if not isinstance(input, PreActivations) or input.mask is not None or input.made is not None or options:
        return None
    n_features = input.call.shape[-1]
    if not isinstance(other, float) or other != -math.inf or condition.dtype != torch.bool:
        return None
    if condition.numel() != n_features or condition.shape[-1:] != (n_features,) or condition.dim() > input.dim():
        return None
    return PreActivations(input.call, condition.reshape(-1))


def largest(input: Any, k: int, dim: int = -1, largest: bool = True, sorted: bool = True, **options: Any) -> Any:
    """`pre_acts.topk(k)` over the features, masked or not; None for any other use."""
    if input.made is not None or dim not in (-1, input.dim() - 1) or not largest or options:
        return None
    members = None if input.mask is None else input.mask.nonzero().squeeze(1)
    if not 0 < k <= (input.shape[-1] if members is None else len(members)):
        return None
    acts, features = input.call.topk(k) if members is None else input.call.topk_among(members, k)
    if sorted:
        acts, order = acts.sort(-1, descending=True)
        features = features.gather(-1, order)
    return torch.return_types.topk((acts, features))


SELECTIONS: dict[Any, Any] = {torch.where: masked, torch.topk: largest, torch.Tensor.topk: largest}
WITHOUT_VALUES = {getattr(torch.Tensor, name).__get__ for name in ("shape", "dtype", "device")} | {torch.Tensor.dim}
