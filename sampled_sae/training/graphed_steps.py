"""`GraphedSteps`: training steps that are captured in a CUDA graph, so that the host launches one thing a step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..optim import RowAdam
from ..sae import SampledSAE, SampledSAEOutput
from ..support.cuda_graphs import CapturedCall, CudaGraphs
from .precision import forward_in

# steps that run as ever before one is captured: kernels are compiled, moments made, a first threshold found
WARM_STEPS = 3


def graph_refusal(sae: SampledSAE, device: torch.device, is_scheduled: bool) -> str | None:
    """Why steps of this training cannot be replayed; None where they can."""
    c = sae.cfg
    if device.type != "cuda":
        return f"needs a GPU, this is {device}"
    if sae.impl_in_use != "triton":
        return f"needs impl='triton', whose steps wait for nothing; this is {sae.impl_in_use!r}"
    if sae.layout.size > 1:
        return "is for one process"
    if is_scheduled:
        return "k_start and l_start change sizes in mid-training"
    if c.pool_every != 1:
        return f"pool_every={c.pool_every}: every replay would use one pool"
    if c.pool == "sample" or c.score_tokens != 1:
        return 'pool="sample" and score_tokens draw anew in each step, and every replay would use one draw'
    return None


class GraphedSteps:
    """Forward, backward and optimizer as one call; the first few run as ever, the others replay one capture.

    The learning rate is read on the device. A batch of another shape or dtype, and another config of the SAE, are
    captured anew. Whether a feature is dead is decided on the device, so that the dead-feature loss costs its time in
    every step. Replays write to the weights unseen by autograd: nothing else may, until training has ended.

    Args:
        sae, optimizer: with `optimizer`'s learning rates set before each call.
        precision: as `resolve_precision` names it.
        graphs: what captures; that of the SAE's device when None.
    """

    def __init__(
        self,
        sae: SampledSAE,
        optimizer: RowAdam,
        precision: str,
        device: torch.device,
        graphs: CudaGraphs | None = None,
    ) -> None:
        self.sae, self.optimizer, self.precision, self.device = sae, optimizer, precision, device
        self._graphs = graphs if graphs is not None else CudaGraphs(device)
        self._lr = torch.zeros((), dtype=torch.float32, device=device)
        self._key: Any = None
        self._warm = 0
        self._inputs: tuple[Tensor, Tensor | None] | None = None
        self._captured: CapturedCall[SampledSAEOutput] | None = None
        sae.memory.idle.decide_on_device()

    def __call__(self, x: Tensor, target: Tensor | None) -> SampledSAEOutput:
        """One step on x [B, d_in], scaled; what it returns is overwritten by the next."""
        key = (x.shape, x.dtype, None if target is None else (target.shape, target.dtype), self.sae.cfg)
        if key != self._key:
            self._key, self._warm, self._inputs, self._captured = key, 0, None, None
        (rate,) = {float(group["lr"]) for group in self.optimizer.param_groups}
        self._lr.fill_(rate)
        if self._warm < WARM_STEPS:
            self._warm += 1
            return self._graphs.warm(lambda: self._step(x, target))
        self.sae.memory.inputs.check(x)
        if target is not None:
            self.sae.memory.targets.check(target)
        if self._inputs is None:
            mine = self._inputs = x.clone(), None if target is None else target.clone()
            self._captured = self._graphs.capture(lambda: self._step(*mine))
        for place, given in zip(self._inputs, (x, target)):
            if place is not None and given is not None:
                place.copy_(given)
        assert self._captured is not None
        self._captured.replay()
        return self._captured.out

    def _step(self, x: Tensor, target: Tensor | None) -> SampledSAEOutput:
        with forward_in(self.precision, self.device):
            out = self.sae(x, target, scaled=True)
        out.loss.backward()
        with self._rate_on_device():
            self.optimizer.step()
        self.optimizer.zero_grad()
        return out

    @contextmanager
    def _rate_on_device(self) -> Iterator[None]:
        """The optimizer reads the rate from the device; its state names the number again afterwards."""
        rates = [group["lr"] for group in self.optimizer.param_groups]
        for group in self.optimizer.param_groups:
            group["lr"] = self._lr
        try:
            yield
        finally:
            for group, rate in zip(self.optimizer.param_groups, rates):
                group["lr"] = rate
