"""NaN and inf in activations: found at once on a CPU, without waiting on a GPU."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import torch
from torch import Tensor

from .argument_checks import check_finite
from .cuda_graphs import capturing


def all_finite(x: Tensor) -> Tensor:
    """0-dim bool, not waited for: whether no value is NaN or inf.

    In one pass, since the sum in float64 of other values is finite; of float64 itself it may be too large.
    """
    x = x.detach()
    return torch.isfinite(x).all() if x.dtype == torch.float64 else torch.isfinite(x.sum(dtype=torch.float64))


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
    """

    def __init__(self, name: str = "x") -> None:
        self.name, self.calls = name, 0
        self._verdicts = LateScalars()

    def check(self, x: Tensor) -> None:
        """Raises ValueError for NaN or inf in x, or in the input of an earlier call."""
        if torch.compiler.is_compiling():
            return
        if not x.is_cuda:
            check_finite(x, self.name)
            return
        with torch.cuda.device_of(x):
            if capturing():
                return
        self.calls += 1
        for call, finite in self._verdicts.arrived():
            if not finite:
                self._verdicts = LateScalars()
                raise ValueError(
                    f"{self.name}: NaN or inf among the values of call {call}, {self.calls - call} calls ago"
                )
        self._verdicts.put(self.calls, all_finite(x))

    def __deepcopy__(self, memo: dict[int, object]) -> FiniteInputs:
        return FiniteInputs(self.name)

    def __reduce__(self) -> tuple[type[FiniteInputs], tuple[str]]:
        return FiniteInputs, (self.name,)
