"""`pre_acts` of sparsify's encoder without the [N, F] tensor.

SparseCoder uses it in two ways: AuxK takes `torch.where(dead, pre_acts, -inf).topk(k_aux)`, Multi-TopK
`pre_acts.topk(4 * k)`. Both are selections, which need no [N, F] tensor and have right gradients. Whatever else is
done with it is done with the dense activations.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from .encoder import DENSE, EncoderCall, Tables

METADATA = {
    getattr(torch.Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "layout", "is_cuda")
} | {torch.Tensor.size, torch.Tensor.dim, torch.Tensor.numel, torch.Tensor.__len__, torch.Tensor.is_floating_point}


class PreActivations(torch.Tensor):
    """relu(x W^T + b), [..., F], of an encoder's call, as if it had been computed then.

    With a mask bool [F], -inf outside of it. `made` is the ordinary tensor once someone had it: who writes to it wants
    the next to see that.
    """

    call: EncoderCall
    mask: Tensor | None
    made: Tensor | None

    @staticmethod
    def __new__(cls, call: EncoderCall, mask: Tensor | None = None) -> PreActivations:
        shape = (*call.lead, call.W.shape[0])
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=call.W.dtype, device=call.W.device)

    def __init__(self, call: EncoderCall, mask: Tensor | None = None) -> None:
        self.call, self.mask, self.made = call, mask, None

    def dense(self) -> Tensor:
        """The activations as an ordinary tensor, with their gradient; always the same one."""
        if self.made is None:
            mask, call = self.mask, self.call
            self.made = call.take_dense() if mask is None else torch.where(mask, call.dense(), -torch.inf)
        return self.made

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in METADATA:
            return super().__torch_function__(func, types, args, kwargs)
        found: Any = None
        if func is torch.where:
            found = where(*args, **kwargs)
        elif func in (torch.topk, torch.Tensor.topk):
            found = topk(*args, **kwargs)
        if found is not None:
            return found
        args, kwargs = tree_map_only(PreActivations, PreActivations.dense, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise TypeError(f"{func}: pre_acts holds no values until it is used in Python; pass pre_acts.dense()")


def where(condition: Any, input: Any = None, other: Any = None, **options: Any) -> PreActivations | None:
    """`torch.where(mask, pre_acts, -inf)` with a mask of features; None for any other use, and for a dense tensor."""
    if not isinstance(input, PreActivations) or isinstance(condition, PreActivations) or options:
        return None
    if input.mask is not None or input.made is not None:
        return None
    if not isinstance(other, (int, float)) or other != -math.inf:
        return None
    n_features = input.shape[-1]
    if condition.dtype != torch.bool or condition.dim() > input.dim() or condition.numel() != n_features:
        return None
    return PreActivations(input.call, condition.reshape(-1)) if condition.shape[-1] == n_features else None


def topk(
    input: Any, k: int, dim: int = -1, largest: bool = True, sorted: bool = True, **options: Any
) -> torch.return_types.topk | None:
    """`pre_acts.topk(k)` over the features; None for any other use, and where the dense way is the better one."""
    if not isinstance(input, PreActivations) or dim not in (-1, input.dim() - 1) or not largest or options:
        return None
    found = selected(input, k)
    if found is None:
        return None
    acts, features = found
    if sorted:
        acts, order = acts.sort(-1, descending=True)
        features = features.gather(-1, order)
    return torch.return_types.topk((acts, features))


def selected(input: PreActivations, k: int) -> Tables | None:
    if input.made is not None or not 0 < k <= input.shape[-1]:
        return None
    if input.mask is None:
        if k * DENSE <= input.shape[-1]:
            input.call.memory.wider = k
        return input.call.largest(k)
    members = input.mask.nonzero().squeeze(1)
    return input.call.largest_among(members, k) if k <= len(members) else None
