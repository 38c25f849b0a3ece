"""NaN, inf and what is too large in activations: found at once on a CPU, without waiting on a GPU."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator

import torch
from torch import Tensor

from .argument_checks import check_finite
from .cuda_graphs import capturing


def all_finite(x: Tensor) -> Tensor:
    """0-dim bool, not waited for: whether no value is NaN or inf. In one pass, without a copy in another dtype."""
    if x.numel() == 0:
        return x.new_ones((), dtype=torch.bool)
    low, high = x.detach().aminmax()  # NaN where there is one
    return low.isfinite() & high.isfinite()


# Losses are sums of squares of differences: between the squares and the largest number there has to be some room.
ROOM = 2.0**10


def squares_finite(x: Tensor) -> Tensor:
    """0-dim bool, not waited for: whether no value is NaN or inf, and a loss on them is none either. In one pass."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.linalg.vector_norm(x.detach(), dtype=dtype) <= math.sqrt(torch.finfo(dtype).max / ROOM)


class LateScalars:
    """Scalars on their way to the host, which does not wait for them: on a CPU they are there at once.

    Of a GPU's, all but the last are waited for when asked: the host is never far ahead.
    """

    def __init__(self) -> None:
        self._pending: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()

    def put(self, number: int, scalar: Tensor) -> None:
        """A 0-dim tensor, and the number by which `arrived` names it."""
        value, done = scalar.detach(), None
        if value.is_cuda:
            with torch.cuda.device_of(value):
                host = torch.empty((), dtype=value.dtype, device="cpu", pin_memory=True)
                value = host.copy_(value, non_blocking=True)
                done = torch.cuda.Event()
                done.record()
        self._pending.append((number, value, done))

    def arrived(self, wait: bool = False) -> Iterator[tuple[int, float]]:
        """(number, value) of those that are there, each once and in order; all of them with `wait`."""
        while self._pending:
            number, value, done = self._pending[0]
            if done is not None:
                if not (wait or len(self._pending) > 1 or done.query()):
                    return
                done.synchronize()
            self._pending.popleft()
            yield number, float(value)


class FiniteInputs:
    """Checks one input after another.

    On a CPU a bad one raises at once. A GPU is not waited for: its verdict is fetched by a later call, which raises
    and names the call that was at fault. Inside torch.compile and CUDA graphs nothing is checked: the loss of a bad
    batch is NaN or inf.

    Args:
        name: of the input, in errors.
        squares: also refuse values whose squares are too large to be summed.
    """

    def __init__(self, name: str = "x", squares: bool = False) -> None:
        self.name, self.squares, self.calls = name, squares, 0
        self._verdicts = LateScalars()

    def check(self, x: Tensor) -> None:
        """Raises ValueError for NaN, inf or, with `squares`, what is too large in x, or in an earlier call's input."""
        if torch.compiler.is_compiling():
            return
        fine = squares_finite if self.squares else all_finite
        if not x.is_cuda:
            if not fine(x):
                check_finite(x, self.name)
                self._refuse_size(x)
            return
        with torch.cuda.device_of(x):
            if capturing():
                return
        self.calls += 1
        for call, good in self._verdicts.arrived():
            if not good:
                self._verdicts = LateScalars()
                bad = "NaN, inf or squares too large to be summed" if self.squares else "NaN or inf"
                raise ValueError(f"{self.name}: {bad} among the values of call {call}, {self.calls - call} calls ago")
        self._verdicts.put(self.calls, fine(x))

    def _refuse_size(self, x: Tensor) -> None:
        if self.squares:
            raise ValueError(
                f"{self.name}: values up to {float(x.detach().abs().max()):.3g}: the sum of their squares is too large "
                f"for a loss in {torch.promote_types(x.dtype, torch.float32)}; scale the activations down"
            )

    # of a copy too
    def __reduce__(self) -> tuple[type[FiniteInputs], tuple[str, bool]]:
        return FiniteInputs, (self.name, self.squares)
