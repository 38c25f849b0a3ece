"""One call of an encoder relu(x W^T + b), whose results are computed as they are asked for."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from ...codes import SparseCodes
from ...impl.interface import Implementation, implementation, resolve_impl
from ...impl.row_gradients import RowSource
from ...impl.torch import layer as torch_layer
from ...impl.torch.scores import chunk_features
from ...support.reused_memory import Workspace, scratch
from .kept import Entries, mark, table, version

# with more than a DENSE-th of all features kept, entries take more memory than the activations themselves
DENSE = 8

Tables = tuple[Tensor, Tensor]


@dataclass
class Memory:
    """What one call tells the next with the same weights.

    hints: (k, hint) of the last selection among all features, and among some. wider: a k that was asked of `pre_acts`.
    """

    hints: dict[str, tuple[int, float | Tensor | None]] = field(default_factory=dict)
    wider: int = 0


class EncoderCall:
    """x [..., d] under W [F, d], b [F] or None; all results have a gradient if there is one now."""

    def __init__(self, x: Tensor, W: Tensor, b: Tensor | None, memory: Memory, workspace: Workspace) -> None:
        self.lead = x.shape[:-1]
        self.x, self.W = x.reshape(-1, x.shape[-1]), W
        self.b = W.new_zeros(W.shape[0]) if b is None else b
        self.memory, self.workspace = memory, workspace
        self.with_gradient = torch.is_grad_enabled()
        self._versions = self._now()
        self._ahead: dict[int, Tables] = {}
        self._dense: Tensor | None = None

    def topk(self, k: int) -> Tables:
        """(activations, features), both [..., k]: the k largest of each token, in any order.

        Where the last call was asked for more than k later on, all of them are selected at once.
        """
        wider, self.memory.wider = self.memory.wider, 0
        if not k < wider <= self.W.shape[0] // DENSE:
            return self._select(k, None)
        acts, features = self._ahead[wider] = self._select(wider, None)
        at = acts.detach().topk(k, dim=-1, sorted=False).indices
        return acts.gather(-1, at), features.gather(-1, at)

    def largest(self, k: int) -> Tables:
        """The k largest of each token, in tensors that nobody else has."""
        return self._ahead.pop(k, None) or self._select(k, None)

    def largest_among(self, members: Tensor, k: int) -> Tables:
        """The k largest of each token among `members` int64 [P], ascending, P >= k."""
        return self._select(k, members)

    def group_max(self, k: int) -> Tables:
        """(activations, features), both [..., k]: the largest of each of k groups of neighbouring features."""
        n_tokens, n_features = len(self.x), self.W.shape[0]
        if n_features % k:
            raise ValueError(f"k={k}: groupmax needs a divisor of {n_features}, the number of features")
        acts, features = group_maxima(self._parts.centre(self.x, None), self.W, self.b, k)
        if n_tokens == 0:
            return acts.view(*self.lead, k).to(self.W.dtype), features.view(*self.lead, k)
        codes = self._with_gradient(acts, features)
        values = codes.values if codes.slots is None else codes.slots.values
        # the gradient of relu at 0 is 0
        return self._finish(torch.where(acts != 0, values.view(acts.shape), 0), features, Entries(codes, None))

    def dense(self) -> Tensor:
        """relu(x W^T + b), [..., F], made once; not to be written to.

        Raises:
            RuntimeError: the input or the weights have been changed since the call.
        """
        if self._dense is None:
            self._check_unchanged()
            with torch.set_grad_enabled(self.with_gradient):
                z = F.linear(self.x.to(self.W.dtype), self.W, self.b)
                # a relu whose gradient does not need its result, which may be written to
                self._dense = torch.where(z <= 0, 0, z).to(self.W.dtype).view(*self.lead, self.W.shape[0])
        return self._dense

    def take_dense(self) -> Tensor:
        """`dense()` in a tensor that nobody else has."""
        dense, self._dense = self.dense(), None
        return dense

    def _select(self, k: int, members: Tensor | None) -> Tables:
        self._check_unchanged()
        if len(self.x) == 0 or (members is None and k * DENSE > self.W.shape[0]):
            acts, features = self.dense().topk(k, dim=-1, sorted=False)
            return acts, features
        name = "all" if members is None else "some"
        last_k, hint = self.memory.hints.get(name, (k, None))
        with torch.set_grad_enabled(self.with_gradient):
            selection = self._parts.select(
                self.x,
                None,
                self._parts.centre(self.x, None),
                self.W,
                self.b,
                members,
                k=k,
                select="token",
                hint=hint if last_k == k else None,
                rows=RowSource(workspace=self.workspace),
            )
            self.memory.hints[name] = k, selection.hint
            return self._finish(*table(selection.codes, k, members))

    def _finish(self, acts: Tensor, features: Tensor, entries: Entries) -> Tables:
        """Shapes and dtype of the caller; a token with NaN or inf gets activations of NaN.

        A list of entries leaves such tokens out. Where there may be some, and a GPU is not asked, the decoder has to
        make its own list of the table.
        """
        k = acts.shape[-1]
        sums = self.x.detach().sum(-1, dtype=torch.promote_types(self.x.dtype, torch.float32)) * 0
        complete = True
        if self._impl == "triton" or sums.any():
            acts = acts + sums[:, None].to(acts.dtype)
            complete = entries.codes.block is not None
        acts, features = acts.to(self.W.dtype).view(*self.lead, k), features.view(*self.lead, k)
        if complete:
            mark(acts, features, entries)
        return acts, features

    def _with_gradient(self, acts: Tensor, features: Tensor) -> SparseCodes:
        """Codes of tables [N, k], whose values have a gradient."""
        n_tokens, k = acts.shape
        tokens = torch.arange(n_tokens, device=acts.device).repeat_interleave(k)
        rows = RowSource(workspace=self.workspace)
        centred = self._parts.centre(self.x, None)
        if self._impl != "triton":
            found = acts.flatten(), tokens, features.flatten()
            return torch_layer.entry_codes(self.x, None, self.W, self.b, centred, None, found, rows)
        from ...impl.triton import layer as triton_layer

        values, tokens, columns = acts.flatten().float(), tokens.int(), features.flatten().int()
        slots = triton_layer.by_feature(values, tokens, columns, None, n_tokens, self.W.shape[0])
        weights = triton_layer.weights_for(centred, self.W)
        values = triton_layer.attach(self.x, None, self.W, self.b, centred, weights, None, slots, rows)
        return SparseCodes.from_slots(slots.with_values(values), (n_tokens, self.W.shape[0]))

    @property
    def _impl(self) -> str:
        return resolve_impl("auto", self.x.device, self.x.dtype)

    @property
    def _parts(self) -> Implementation:
        return implementation(self._impl)

    def _now(self) -> tuple[int, ...]:
        return tuple(version(t) for t in (self.x, self.W, self.b))

    def _check_unchanged(self) -> None:
        if self._now() != self._versions:
            raise RuntimeError(
                "pre_acts: the input or the weights have been changed since encode; use pre_acts before the "
                "optimizer's step"
            )


@torch_layer.without_autocast
@torch.no_grad()
def group_maxima(x: Tensor, W: Tensor, b: Tensor, k: int) -> Tables:
    """relu(x W^T + b) [N, F], the largest of each of k groups and its feature, both [N, k]; no gradient."""
    n_tokens, width = x.shape[0], W.shape[0] // k
    acts = x.new_empty(n_tokens, k)
    features = torch.empty(n_tokens, k, dtype=torch.int64, device=x.device)
    step = max(1, chunk_features(max(n_tokens, 1)) // width)
    for start in range(0, k, step):
        stop = min(start + step, k)
        rows = slice(start * width, stop * width)
        a = scratch(x, n_tokens, rows.stop - rows.start)
        torch.addmm(b[rows].to(x.dtype), x, W[rows].to(x.dtype).t(), out=a).relu_()
        largest, at = a.view(n_tokens, stop - start, width).max(-1)
        acts[:, start:stop] = largest
        features[:, start:stop] = at + torch.arange(rows.start, rows.stop, width, device=x.device)
    return acts, features
