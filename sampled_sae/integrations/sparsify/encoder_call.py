"""One call of sparsify's encoder relu(x W^T + b): its kept activations, and all of them, `pre_acts`, for who asks.

SparseCoder itself takes selections of `pre_acts`: `torch.where(dead, pre_acts, -inf).topk(k_aux)` for AuxK and
`pre_acts.topk(4 * k)` for Multi-TopK. Those two make no [N, F] tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

from ...codes import Entries
from ...impl.encoder import Operands
from ...impl.hints import Rule, ThresholdHints
from ...impl.interface import implementation, resolve_impl
from ...impl.row_gradients import RowSource

# with more than a DENSE-th of all features kept, entries take more memory than the activations themselves
DENSE = 8
# tokens whose activations are in memory at a time, where a selection is made of all of them
TOKENS = 256

# (activations, features), both [..., k]
Tables = tuple[Tensor, Tensor]


class EncoderCall:
    """x [..., d] under W [F, d], b [F] or None; all results have a gradient if there is one now.

    Raises:
        RuntimeError: by each method, once the input or the weights have been changed.
    """

    def __init__(self, x: Tensor, W: Tensor, b: Tensor | None, hints: ThresholdHints, rows: RowSource) -> None:
        self.hints = hints
        self.parts = implementation(resolve_impl("auto", x.device, x.dtype))
        b = W.new_zeros(W.shape[0]) if b is None else b
        self.encoder = self.parts.encoder(x.reshape(-1, x.shape[-1]), W, b, rows=rows)
        self.shape = (*x.shape[:-1], W.shape[0])
        self.dtype = W.dtype
        self.with_gradient = torch.is_grad_enabled()
        self._versions = self._now()

    def topk(self, k: int) -> Tables:
        """The k largest of each token, in any order; equivalent to `self.dense().topk(k, sorted=False)`."""
        n_tokens, n_features = self.encoder.shape
        if n_tokens == 0 or k * DENSE > n_features:
            acts, features = self.dense().topk(k, dim=-1, sorted=False)
            return acts, features
        self._check_unchanged()
        with torch.set_grad_enabled(self.with_gradient):
            entries = self.parts.select(self.encoder, None, Rule(k, "token"), self.hints).entries()
            if len(entries.values) == n_tokens * k:
                return self._shaped(entries.values.view(-1, k), entries.features.view(-1, k))
        return self._with_gradient(*self._filled(entries, k))

    def topk_among(self, members: Tensor, k: int) -> Tables:
        """The k largest of each token among `members` int64 [P], P >= k, in any order."""
        self._check_unchanged()
        acts, at = picked(self.encoder.operands.of_features(members), lambda a: a.topk(k, sorted=False))
        return self._with_gradient(acts, members[at])

    def group_max(self, k: int) -> Tables:
        """The largest of each of k groups of neighbouring features; k divides F."""
        acts, at = picked(self.encoder.operands, lambda a: a.unflatten(1, (k, -1)).max(-1))
        n_features = self.encoder.shape[1]
        first = torch.arange(0, n_features, n_features // k, device=at.device)
        return self._with_gradient(acts, first + at)

    def dense(self) -> Tensor:
        """All activations, [..., F], in a new tensor."""
        self._check_unchanged()
        with torch.set_grad_enabled(self.with_gradient):
            x, W, b = self.encoder[:3]
            z = F.linear(x.to(W.dtype), W, b)
            # a relu whose gradient does not need its result, which may be written to
            return torch.where(z <= 0, 0, z).to(W.dtype).view(self.shape)

    def _filled(self, entries: Entries, k: int) -> Tables:
        """[N, k] of entries that are k a token, but for tokens with fewer positive activations, or with NaN."""
        values, tokens, features = entries
        operands = self.encoder.operands
        short = torch.bincount(tokens, minlength=len(operands.x)) < k
        full = ~short[tokens]
        acts, at = values.new_empty(len(short), k), features.new_empty(len(short), k)
        acts[~short], at[~short] = values.detach()[full].view(-1, k), features[full].view(-1, k)
        found, at[short] = picked(operands.of_tokens(short), lambda a: a.topk(k, sorted=False))
        acts[short] = found.to(acts.dtype)
        return acts, at

    def _with_gradient(self, acts: Tensor, features: Tensor) -> Tables:
        """Tables [N, k] with the gradient of the activations; one of 0 passes none on."""
        features, order = features.sort(1)
        acts = acts.gather(1, order)
        tokens = torch.arange(len(acts), device=acts.device).repeat_interleave(acts.shape[1])
        with torch.set_grad_enabled(self.with_gradient):
            codes = self.parts.encode_at(self.encoder, Entries(acts.flatten(), tokens, features.flatten()))
            return self._shaped(torch.where(acts != 0, codes.values.view(acts.shape), 0), features)

    def _shaped(self, acts: Tensor, features: Tensor) -> Tables:
        """Tables [N, k] in the shape and dtype of the caller."""
        shape = *self.shape[:-1], acts.shape[1]
        return acts.to(self.dtype).view(shape), features.view(shape)

    def _now(self) -> tuple[int, ...]:
        """How often the tensors were written to, where torch keeps count."""
        return tuple(0 if t.is_inference() else t._version for t in self.encoder[:3])

    def _check_unchanged(self) -> None:
        if self._now() != self._versions:
            raise RuntimeError("pre_acts: the input or the weights have been changed since encode; use pre_acts before")


@torch.no_grad()
def picked(operands: Operands, pick: Callable[[Tensor], Any]) -> Tables:
    """(activations, columns), [N, k] each, that `pick` takes of relu(x W^T + b), some tokens at a time."""
    W, b = (t.to(operands.x.dtype) for t in operands[1:3])
    acts, at = zip(*(pick(F.linear(x, W, b).relu_()) for x in operands.x.split(TOKENS)))
    return torch.cat(acts), torch.cat(at)


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
