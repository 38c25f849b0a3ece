"""One training of the study: ours, or SAELens' own, from the same weights on the same tokens at the same rates."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.peers import Setup, Weights
from sampled_sae import RowAdam, SampledSAE, SampledSAEConfig, TrainConfig

# x [B, d], times the config's input_scale
Batches = Iterable[Tensor]


def train_ours(
    config: SampledSAEConfig,
    train: TrainConfig,
    batches: Batches,
    median: Tensor,
    aligned: bool = False,
    rows: Tensor | None = None,
) -> SampledSAE:
    """A SampledSAE by RowAdam; `median` [d] is what b_dec starts from. In evaluation mode, not calibrated.

    `rows`, of unit norm [F, d], are what decoder and encoder start from, in place of random ones. `aligned` keeps the
    inner product of each encoder column and its decoder row at 1 (arXiv 2605.18629): after each step the column moves
    along the row, which is of unit norm.
    """
    sae = SampledSAE(replace(config, row_grads=True), device=median.device)
    with torch.no_grad():
        sae.b_dec.copy_(median)
        if rows is not None:
            sae.W_dec.copy_(rows)
            sae.W_enc.copy_(rows.T)
    optimizer = RowAdam(sae, lr=train.lr, clip=train.clip, mode=train.adam)

    def step(x: Tensor) -> None:
        optimizer.zero_grad()
        sae(x, scaled=True).loss.backward()
        optimizer.step()
        if aligned:
            with torch.no_grad():
                W_dec = sae.W_dec
                sae.W_enc += ((1 - (sae.W_enc.T * W_dec).sum(1, keepdim=True)) * W_dec).T

    _go(step, optimizer, train, batches)
    optimizer.zero_grad()
    sae.cfg = config
    return sae.eval()


def train_saelens(config: SampledSAEConfig, train: TrainConfig, batches: Batches, median: Tensor) -> SampledSAE:
    """SAELens' BatchTopK by SAELens' own trainer, as a SampledSAE with unit decoder rows."""
    from benchmarks.peers.saelens import Library

    device = median.device
    rows = SampledSAE(config, device=device).W_dec.detach()
    start = Weights(rows.clone(), torch.zeros(config.d_sae, device=device), rows, median)
    setup = Setup(train.batch_size, config.d_in, config.d_sae, int(config.k), train.lr, dead_after=config.dead_after)
    library = Library(replace(setup, device=device.type), start)
    _go(library.step, library.trainer.optimizer, train, batches)
    sae = library.weights().sae(config.k, l=None, input_scale=config.input_scale)
    return sae.to(device).eval()


def _go(
    step: Callable[[Tensor], object], optimizer: torch.optim.Optimizer, train: TrainConfig, batches: Batches
) -> None:
    for number, x in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = train.lr_at(number)
        step(x)
