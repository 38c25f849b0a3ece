"""NaN and inf in activations: found at once on a CPU, without waiting on a GPU."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from .capture import capturing
from .validate import check_finite


class FiniteInputs:
    """Checks one input after another.

    On a CPU a bad one raises at once. A GPU is not waited for: its verdict is fetched by a later call, which raises
    and names the call that was at fault. Inside torch.compile and CUDA graphs nothing is checked: the loss of a bad
    batch is NaN or inf.
    """

    def __init__(self) -> None:
        self.calls = 0
        self.pending: deque[tuple[int, Tensor, torch.cuda.Event]] = deque()

    def check(self, x: Tensor) -> None:
        """Raises ValueError for NaN or inf in x, or in the input of an earlier call."""
        if torch.compiler.is_compiling():
            return
        if not x.is_cuda:
            check_finite(x)
            return
        with torch.cuda.device_of(x):
            self._check_later(x)

    def _check_later(self, x: Tensor) -> None:
        if capturing():
            return
        self.calls += 1
        while self.pending and (len(self.pending) > 1 or self.pending[0][2].query()):
            call, verdict, done = self.pending.popleft()
            done.synchronize()
            if not bool(verdict):
                self.pending.clear()
                raise ValueError(f"x: NaN or inf among the values of call {call}, {self.calls - call} calls ago")
        verdict = torch.empty((), dtype=torch.bool, device="cpu", pin_memory=True)
        verdict.copy_(torch.isfinite(x.detach()).all(), non_blocking=True)
        done = torch.cuda.Event()
        done.record()
        self.pending.append((self.calls, verdict, done))

    def __deepcopy__(self, memo: dict[int, object]) -> FiniteInputs:
        return FiniteInputs()

    def __reduce__(self) -> tuple[type[FiniteInputs], tuple[()]]:
        return FiniteInputs, ()
