"""The collectives among the processes of one dimension of a mesh, counted."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from ..impl.torch.screen import UNIT

# processes whose numbers are added up in bfloat16, at most: more of them would leave too much open
MOST_ROUNDED = 32
# of a sum: what is smaller may be lost
LEAST = 2.0**-120
# the name since torch 2.13
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass
class Sent:
    """calls: collectives. size: bytes of their results on this process: a sum as it is, a gather of all processes."""

    calls: int = 0
    size: int = 0


@dataclass
class Traffic:
    """What this process has taken part in since it was last cleared.

    Attributes:
        sent: by dimension of the mesh and purpose ("scores", "gradients", ...).
    """

    sent: dict[tuple[str, str], Sent] = field(default_factory=lambda: defaultdict(Sent))

    def add(self, dimension: str, purpose: str, size: int) -> None:
        entry = self.sent[dimension, purpose]
        entry.calls += 1
        entry.size += size

    def calls(self, dimension: str | None = None) -> int:
        """Number of collectives, of one dimension or of all."""
        return sum(entry.calls for (name, _), entry in self.sent.items() if dimension in (None, name))

    def size(self, dimension: str | None = None) -> int:
        """Bytes."""
        return sum(entry.size for (name, _), entry in self.sent.items() if dimension in (None, name))

    def clear(self) -> None:
        self.sent.clear()


class Ranks:
    """The processes along one dimension of a mesh, as one of them sees them. Among one, nothing travels.

    Attributes:
        name: of the dimension. size, rank: how many there are, and which of them this is.
    """

    def __init__(self, name: str, size: int, rank: int, group: dist.ProcessGroup | None, traffic: Traffic) -> None:
        self.name, self.size, self.rank = name, size, rank
        self._group, self._traffic = group, traffic

    def sum_(self, t: Tensor, purpose: str) -> Tensor:
        """t, contiguous, becomes the sum over the processes; the same bits on all of them."""
        return self._reduce(t, dist.ReduceOp.SUM, purpose)

    def between(self, t: Tensor, purpose: str) -> tuple[Tensor, Tensor]:
        """(no more, no less) than the sum over the processes of t >= 0, float32, which few of them send in bfloat16;
        the same bits on all of them. NaN stays NaN."""
        if not 1 < self.size <= MOST_ROUNDED:
            total = self.sum_(t, purpose)
            return total, total
        total = self.sum_(t.bfloat16(), purpose).float()
        # each number is rounded once, and again with every other that it is added to
        off = (1 - UNIT) ** -self.size - 1
        # a sum beyond bfloat16 is no more than infinity, but no less than its largest number, about
        least = (total - LEAST).clamp(0, torch.finfo(torch.bfloat16).max) * (1 - off)
        return least, (total + LEAST) * (1 + off)

    def max_(self, t: Tensor, purpose: str) -> Tensor:
        return self._reduce(t, dist.ReduceOp.MAX, purpose)

    def min_(self, t: Tensor, purpose: str) -> Tensor:
        return self._reduce(t, dist.ReduceOp.MIN, purpose)

    def gather(self, t: Tensor, purpose: str) -> Tensor:
        """[R, ...]: t of every process, all of one shape."""
        if self.size == 1:
            return t[None]
        out = t.new_empty(self.size, *t.shape)
        self._traffic.add(self.name, purpose, out.numel() * out.element_size())
        all_gather(out.view(-1), t.reshape(-1), group=self._group)
        return out

    def gather_rows(self, columns: Sequence[Tensor], purpose: str) -> tuple[list[Tensor], list[int]]:
        """Of tensors [n, ...], n another on each process, those of all one behind the other; how many rows each has."""
        counts = self.gather(torch.tensor([len(columns[0])], device=columns[0].device), purpose).flatten().tolist()
        found = []
        for t in columns:
            padded = t.new_zeros(max(counts), *t.shape[1:])
            padded[: len(t)] = t
            found.append(torch.cat([of_rank[:n] for of_rank, n in zip(self.gather(padded, purpose), counts)]))
        return found, counts

    def between_hosts(self) -> Ranks:
        """The same processes, for tensors on the CPU."""
        group, cpu = self._group, torch.device("cpu")
        if group is None or cpu in group._device_types:
            return self
        timeout = group._get_backend(group._device_types[0]).options._timeout
        ranks = dist.get_process_group_ranks(group)
        group = dist.new_group(ranks, timeout=timeout, backend="gloo", use_local_synchronization=True)
        return Ranks(self.name, self.size, self.rank, group, self._traffic)

    def from_(self, t: Tensor, rank: int = 0, purpose: str = "weights") -> Tensor:
        """t, contiguous, becomes that of one process."""
        if self.size > 1:
            self._traffic.add(self.name, purpose, t.numel() * t.element_size())
            dist.broadcast(t, group=self._group, group_src=rank)
        return t

    def _reduce(self, t: Tensor, operation: dist.ReduceOp.RedOpType, purpose: str) -> Tensor:
        if self.size > 1:
            self._traffic.add(self.name, purpose, t.numel() * t.element_size())
            dist.all_reduce(t, operation, group=self._group)
        return t


class SumForward(torch.autograd.Function):
    """The sum over the processes, each of which goes on to compute the same: the gradient is that of every term."""

    @staticmethod
    def forward(ctx: object, t: Tensor, ranks: Ranks, purpose: str) -> Tensor:
        # not the tensor that was sent: who sends may hold that a moment longer, and with its node the whole step
        return ranks.sum_(t.detach().clone(memory_format=torch.contiguous_format), purpose).detach()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad, None, None


class SumBackward(torch.autograd.Function):
    """t itself, of which every process goes on to use a part: the gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: object, t: Tensor, ranks: Ranks, purpose: str) -> Tensor:
        ctx.ranks, ctx.purpose = ranks, purpose  # type: ignore[attr-defined]
        return t.view_as(t)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor, None, None]:
        ranks, purpose = ctx.ranks, ctx.purpose  # type: ignore[attr-defined]
        return ranks.sum_(grad.clone(memory_format=torch.contiguous_format), purpose), None, None
