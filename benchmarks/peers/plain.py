"""Any rule as one would write it in PyTorch, eager or with its loss under torch.compile."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.peers.candidate import Candidate, Setup, Weights
from sampled_sae.config import pool_size


class Library(Candidate):
    """Dense codes and gradients; clip, decoder projection, torch.optim.Adam, unit decoder rows."""

    def __init__(
        self, setup: Setup, weights: Weights, compiled: bool, l: float | None = None, select: str = "batch"
    ) -> None:
        self.setup, self.select, self.pool = setup, select, pool_size(setup.k, l, setup.F)
        tensors = (weights.W_enc.t(), weights.b_enc, weights.W_dec, weights.b_dec)
        self.parameters = [
            nn.Parameter(t.clone(memory_format=torch.contiguous_format).to(setup.device)) for t in tensors
        ]
        self.loss = torch.compile(self._loss) if compiled else self._loss
        self.optimizer = torch.optim.Adam(self.parameters, lr=setup.lr, fused=setup.device != "cpu" or None)

    def _loss(self, x: Tensor) -> Tensor:
        W_enc, b_enc, W_dec, b_dec = self.parameters
        a = torch.relu((x - b_dec) @ W_enc + b_enc)
        if self.pool < self.setup.F:
            members = a.square().sum(0, dtype=torch.float32).topk(self.pool).indices
            a = a * torch.zeros_like(a[0]).index_fill(0, members, 1)
        if self.select == "token":
            kept = a.topk(self.setup.k, dim=1, sorted=False)
            codes = torch.zeros_like(a).scatter(1, kept.indices, kept.values)
        else:
            kept = a.flatten().topk(self.setup.k * len(x), sorted=False)
            codes = torch.zeros_like(a).flatten().scatter(0, kept.indices, kept.values).view_as(a)
        return (x - codes @ W_dec - b_dec).square().sum(1).mean()

    def step(self, x: Tensor) -> Tensor:
        self.set_lr(self.optimizer)
        with self.setup.autocast():
            loss = self.loss(x)
        loss.backward()
        W_dec = self.parameters[2]
        with torch.no_grad():
            W_dec.grad -= (W_dec.grad * W_dec).sum(1, keepdim=True) * W_dec
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            W_dec /= W_dec.norm(dim=1, keepdim=True)
        return loss.detach()

    def tensors(self) -> Weights:
        W_enc, b_enc, W_dec, b_dec = self.parameters
        return Weights(W_enc.t(), b_enc, W_dec, b_dec)
