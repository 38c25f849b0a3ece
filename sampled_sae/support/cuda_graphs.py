"""CUDA graphs: whether one is being captured, and calls that are captured once and replayed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import torch

T = TypeVar("T")


def capturing() -> bool:
    """True where what the host does now is done once, and replays repeat only what the device does."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


class CapturedCall(Generic[T]):
    """What a call has launched, to be launched again; `out`, what it returned, holds the values of the last replay."""

    def __init__(self, graph: torch.cuda.CUDAGraph, out: T) -> None:
        self._graph, self.out = graph, out

    def replay(self) -> None:
        self._graph.replay()


class CudaGraphs:
    """How calls are captured on a device.

    Args:
        device: a GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def warm(self, call: Callable[[], T]) -> T:
        """Runs what is to be captured later, on a stream of its own, where libraries prepare themselves for it."""
        side, main = torch.cuda.Stream(self.device), torch.cuda.current_stream(self.device)
        side.wait_stream(main)
        with torch.cuda.stream(side):
            out = call()
        main.wait_stream(side)
        return out

    def capture(self, call: Callable[[], T]) -> CapturedCall[T]:
        """Records what a call launches; nothing of it has run yet."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device), torch.cuda.graph(graph):
            out = call()
        return CapturedCall(graph, out)
