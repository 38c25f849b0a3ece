"""One call of sparsify's encoder relu(x W^T + b): its kept activations, and all of them where somebody asks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...codes import SparseCodes
from ...impl.interface import implementation, resolve_impl
from ...impl.row_gradients import RowSource
from ...impl.torch import layer as torch_layer
from ...support.reused_memory import Workspace

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

    def __init__(self, x: Tensor, W: Tensor, b: Tensor | None, hints: Any, workspace: Workspace) -> None:
        self.lead = x.shape[:-1]
        self.x, self.W = x.reshape(-1, x.shape[-1]), W
        self.b = W.new_zeros(W.shape[0]) if b is None else b
        self.hints = hints
        self.rows = RowSource(workspace=workspace)
        self.parts = implementation(resolve_impl("auto", x.device, x.dtype))
        self.with_gradient = torch.is_grad_enabled()
        self._versions = self._now()

    def topk(self, k: int) -> Tables:
        """The k largest of each token, in any order; equivalent to `self.dense().topk(k, sorted=False)`."""
        if len(self.x) == 0 or k * DENSE > self.W.shape[0]:
            acts, features = self.dense().topk(k, dim=-1, sorted=False)
            return acts, features
        self._check_unchanged()
        x = self.parts.centre(self.x, None)
        with torch.set_grad_enabled(self.with_gradient):
            found = self.parts.select(
                self.x, None, x, self.W, self.b, None, k=k, select="token", hint=self.hints.get(k), rows=self.rows
            )
            self.hints[k] = found.hint
            values, tokens, features = found.codes.entries()
            if len(values) == len(self.x) * k:
                return self._shaped(values.view(-1, k), features.view(-1, k))
        return self._with_gradient(*self._filled(values.detach(), tokens, features, k))

    def topk_among(self, members: Tensor, k: int) -> Tables:
        """The k largest of each token among `members` int64 [P], P >= k, in any order."""
        self._check_unchanged()
        acts, at = self._picked(self.x, self.W[members], self.b[members], lambda a: a.topk(k, sorted=False))
        return self._with_gradient(acts, members[at])

    def group_max(self, k: int) -> Tables:
        """The largest of each of k groups of neighbouring features; k divides F."""
        acts, at = self._picked(self.x, self.W, self.b, lambda a: a.unflatten(1, (k, -1)).max(-1))
        first = torch.arange(0, self.W.shape[0], self.W.shape[0] // k, device=at.device)
        return self._with_gradient(acts, first + at)

    def dense(self) -> Tensor:
        """All activations, [..., F], in a new tensor."""
        self._check_unchanged()
        with torch.set_grad_enabled(self.with_gradient):
            z = F.linear(self.x.to(self.W.dtype), self.W, self.b)
            # a relu whose gradient does not need its result, which may be written to
            return torch.where(z <= 0, 0, z).to(self.W.dtype).view(*self.lead, self.W.shape[0])

    def _filled(self, values: Tensor, tokens: Tensor, features: Tensor, k: int) -> Tables:
        """[N, k] of entries that are k a token, but for tokens with fewer positive activations, or with NaN."""
        short = torch.bincount(tokens, minlength=len(self.x)) < k
        listed = ~short[tokens]
        acts, at = values.new_empty(len(short), k), features.new_empty(len(short), k)
        acts[~short], at[~short] = values[listed].view(-1, k), features[listed].view(-1, k)
        acts[short], at[short] = self._picked(self.x[short], self.W, self.b, lambda a: a.topk(k, sorted=False))
        return acts, at

    @torch.no_grad()
    def _picked(self, x: Tensor, W: Tensor, b: Tensor, pick: Callable[[Tensor], Any]) -> Tables:
        """(activations, columns) that `pick` takes of relu(x W^T + b), some tokens at a time."""
        x = self.parts.centre(x, None)
        W, b = W.to(x.dtype), b.to(x.dtype)
        acts, at = zip(*(pick(F.linear(tokens, W, b).relu_()) for tokens in x.split(TOKENS)))
        return torch.cat(acts), torch.cat(at)

    def _with_gradient(self, acts: Tensor, features: Tensor) -> Tables:
        """Tables [N, k] with the gradient of the activations; one of 0 passes none on."""
        features, order = features.sort(1)
        acts = acts.gather(1, order)
        tokens = torch.arange(len(acts), device=acts.device).repeat_interleave(acts.shape[1])
        with torch.set_grad_enabled(self.with_gradient):
            codes = self._encode_at(acts.flatten(), tokens, features.flatten())
            values = codes.values if codes.slots is None else codes.slots.values
            return self._shaped(torch.where(acts != 0, values.view(acts.shape), 0), features)

    def _shaped(self, acts: Tensor, features: Tensor) -> Tables:
        """Tables [N, k] in the shape and dtype of the caller."""
        shape = *self.lead, acts.shape[1]
        return acts.to(self.W.dtype).view(shape), features.view(shape)

    def _encode_at(self, values: Tensor, tokens: Tensor, features: Tensor) -> SparseCodes:
        x = self.parts.centre(self.x, None)
        return torch_layer.entry_codes(self.x, None, self.W, self.b, x, None, (values, tokens, features), self.rows)

    def _now(self) -> tuple[int, ...]:
        """How often the tensors were written to, where torch keeps count."""
        return tuple(0 if t.is_inference() else t._version for t in (self.x, self.W, self.b))

    def _check_unchanged(self) -> None:
        if self._now() != self._versions:
            raise RuntimeError("pre_acts: the input or the weights have been changed since encode; use pre_acts before")
