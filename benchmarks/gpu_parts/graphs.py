"""A training step as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from sampled_sae.support.timing import Call

WARM_UP = 3


def captured(step: Callable[[torch.Tensor], None], batches: Iterator[torch.Tensor]) -> Call:
    """One step on the next batch, which is copied to where the graph reads it; what came before is its warm-up."""
    x = next(batches).clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            x.copy_(next(batches))
            step(x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(x)

    def replay() -> None:
        x.copy_(next(batches))
        graph.replay()

    return replay
