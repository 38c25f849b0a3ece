"""SampledSAE with RowAdam on row gradients, or with torch's fused Adam on dense ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.peers.candidate import Candidate, Setup, Weights
from sampled_sae import RowAdam, SampledSAE, SampledSAEConfig

CLIP = 1.0


class Library(Candidate):
    """Starts from weights; or from its first batch, as a training by `Trainer` does: of a transcoder what is read and
    its targets, of a crosscoder [B, layers * d]."""

    def __init__(self, setup: Setup, start: Weights | tuple[Tensor, ...], optimizer: str, rule: dict[str, Any]) -> None:
        self.setup, self.dense = setup, optimizer == "Adam"
        how = {"dead_after": setup.dead_after, "row_grads": not self.dense, **rule}
        if isinstance(start, Weights):
            self.sae = start.sae(setup.k, **how)
        else:
            shape = {"layers": setup.layers} if len(start) == 1 else {"d_out": start[1].shape[1], "skip": True}
            config = SampledSAEConfig(setup.d, setup.F, setup.k, seed=setup.seed, **shape, **how)
            self.sae = SampledSAE(config, device=setup.device)
            self.sae.init_b_dec(*start)
        if self.dense:
            on_gpu = setup.device != "cpu"
            self.optimizer: torch.optim.Optimizer = torch.optim.Adam(
                self.sae.parameters(), lr=setup.lr, fused=True, capturable=on_gpu
            )
        else:
            self.optimizer = RowAdam(self.sae, lr=setup.lr, clip=CLIP, mode=optimizer)

    def forward_backward(self, x: Tensor) -> None:
        """A step without its optimizer."""
        self._backward(x)
        self.optimizer.zero_grad()

    def step(self, *given: Tensor) -> Tensor:
        self.set_lr(self.optimizer)
        mse = self._backward(*given)
        if self.dense:
            torch.nn.utils.clip_grad_norm_(self.sae.parameters(), CLIP)
            self.sae.project_decoder_grad()
        self.optimizer.step()
        if self.dense:
            self.sae.normalize_decoder()
        self.optimizer.zero_grad()
        return mse

    def tensors(self) -> Weights:
        sae, skip = self.sae, getattr(self.sae, "W_skip", None)
        return Weights(sae.W_enc.t(), sae.b_enc, sae.W_dec, sae.b_dec, None if skip is None else skip.t())

    def _backward(self, *given: Tensor) -> Tensor:
        with self.setup.autocast():
            out = self.sae(*given)
        out.loss.backward()
        return out.mse.detach()
