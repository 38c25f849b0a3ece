"""SampledSAE with RowAdam on row gradients, or with torch's fused Adam on dense ones.

Imports what users import, and nothing else without being asked: the package may be that of another revision.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.peers.candidate import Candidate, Setup, Weights
from sampled_sae import RowAdam, SampledSAE, SampledSAEConfig

CLIP = 1.0


class Library(Candidate):
    def __init__(self, setup: Setup, weights: Weights, optimizer: str, form: str | None, rule: dict[str, Any]) -> None:
        self.setup, self.dense = setup, optimizer == "Adam"
        self.sae = weights.sae(setup.k, dead_after=setup.dead_after, row_grads=not self.dense, **rule)
        if self.dense:
            on_gpu = setup.device != "cpu"
            self.optimizer: torch.optim.Optimizer = torch.optim.Adam(
                self.sae.parameters(), lr=setup.lr, fused=True, capturable=on_gpu
            )
        else:
            self.optimizer = RowAdam(self.sae, lr=setup.lr, clip=CLIP, mode=optimizer)
        if form is not None:
            from sampled_sae.impl.torch import layer

            layer.use_block = lambda *_: form == "block"

    def forward_backward(self, x: Tensor) -> None:
        """A step without its optimizer."""
        self._backward(x)
        self.optimizer.zero_grad()

    def step(self, x: Tensor) -> Tensor:
        self.set_lr(self.optimizer)
        mse = self._backward(x)
        if self.dense:
            torch.nn.utils.clip_grad_norm_(self.sae.parameters(), CLIP)
            self.sae.project_decoder_grad()
        self.optimizer.step()
        if self.dense:
            self.sae.normalize_decoder()
        self.optimizer.zero_grad()
        return mse

    def tensors(self) -> Weights:
        return weights_of(self.sae)

    def _backward(self, x: Tensor) -> Tensor:
        with self.setup.autocast():
            out = self.sae(x)
        out.loss.backward()
        return out.mse.detach()


class Begun(Candidate):
    """An SAE of another kind with RowAdam; `first` is what the first step is given, from which b_dec follows."""

    def __init__(self, setup: Setup, first: tuple[Tensor, ...], optimizer: str, **rule: Any) -> None:
        self.setup = setup
        same = {"d_sae": setup.F, "k": setup.k, "seed": setup.seed, "dead_after": setup.dead_after}
        self.sae = SampledSAE(SampledSAEConfig(**same, row_grads=True, **rule))
        self.sae.init_b_dec(*first)
        self.optimizer = RowAdam(self.sae, lr=setup.lr, clip=CLIP, mode=optimizer)

    def step(self, *given: Tensor) -> Tensor:
        self.set_lr(self.optimizer)
        out = self.sae(*given)
        out.loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return out.mse.detach()

    def tensors(self) -> Any:
        return weights_of(self.sae)


def weights_of(sae: SampledSAE) -> Weights:
    """Its own tensors, but for a skip."""
    return Weights(sae.W_enc.t(), sae.b_enc, sae.W_dec, sae.b_dec)
