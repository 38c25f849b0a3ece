"""SAELens' TopK, BatchTopK and MatryoshkaBatchTopK training SAEs with the step of `SparseStep`, and `accelerate`."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE
from sae_lens.saes.matryoshka_batchtopk_sae import MatryoshkaBatchTopKTrainingSAE
from sae_lens.saes.sae import SAE, TrainingSAE, TrainStepInput, TrainStepOutput
from sae_lens.saes.topk_sae import TopKTrainingSAE
from torch import Tensor

from ...codes import SparseCodes
from ...support.argument_checks import check_budget
from .as_made import DENSE_METHODS
from .feature_rows import feature_major
from .inference import INFERENCE_FORMS, METHODS, SparseInference
from .step import SparseStep, StepInputs


class SampledTopKTrainingSAE(SparseStep):
    """SAELens' TopKTrainingSAE; equivalent to it in parameters, losses and files."""


class SampledBatchTopKTrainingSAE(SparseStep, BatchTopKTrainingSAE):
    """SAELens' BatchTopKTrainingSAE; equivalent to it in parameters, losses, threshold and files."""

    selection = "batch"
    topk_threshold: Tensor

    def after_selection(self, inputs: StepInputs, codes: SparseCodes, output: TrainStepOutput) -> None:
        self.move_threshold(codes.smallest())
        output.metrics["topk_threshold"] = self.topk_threshold

    @torch.no_grad()
    def move_threshold(self, smallest: Tensor) -> None:
        """The running mean of the smallest kept activation; `inf` where nothing was kept."""
        smallest, lr = smallest.to(self.topk_threshold.dtype), self.cfg.topk_threshold_lr
        moved = (1 - lr) * self.topk_threshold + lr * smallest
        self.topk_threshold = torch.where(smallest.isfinite(), moved, self.topk_threshold)


class SampledMatryoshkaBatchTopKTrainingSAE(SampledBatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAE):
    """SAELens' MatryoshkaBatchTopKTrainingSAE; all levels are decoded in one go."""

    def widths(self) -> list[int]:
        return self.cfg.matryoshka_widths[:-1]

    def decode_levels(self, codes: SparseCodes) -> list[Tensor]:
        widths, rows = self.cfg.matryoshka_widths, self._memory.rows()
        return list(self.parts().decode_levels(codes, self.W_dec, self.b_dec, widths, rows).unbind(1))

    def dead_loss(self, inputs: StepInputs, outs: list[Tensor], unhooked: Tensor) -> Tensor:
        if not self.cfg.use_matryoshka_aux_loss or inputs.dead is None or not bool(inputs.dead.any()):
            return super().dead_loss(inputs, outs, unhooked)
        outs = [*outs[:-1], self.run_time_activation_norm_fn_out(unhooked)]
        bounds = [0, *self.cfg.matryoshka_widths]
        losses = [self.reconstruct_from_dead(inputs, out, *part) for out, *part in zip(outs, bounds, bounds[1:])]
        return torch.stack(losses).sum()

    def _needs_dense(self, step_input: TrainStepInput) -> bool:
        bounds = [0, *self.cfg.matryoshka_widths, self.W_dec.shape[0] + 1]
        ascend = all(a < b for a, b in pairwise(bounds))
        return not ascend or bounds[-2] != self.W_dec.shape[0] or super()._needs_dense(step_input)


FAST_FORMS: dict[type[TrainingSAE[Any]], type[SparseStep]] = {
    TopKTrainingSAE: SampledTopKTrainingSAE,
    BatchTopKTrainingSAE: SampledBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAE: SampledMatryoshkaBatchTopKTrainingSAE,
}


def accelerate(sae: SAE[Any], optimizer: torch.optim.Optimizer | None = None) -> SAE[Any]:
    """Gives a living SAELens SAE this package's step, or for inference its search, in place, and returns it.

    Parameters, buffers, hooks, config and files stay what they are: checkpoints say "batchtopk" and load without this
    package. Only its class changes, to a subclass of what it was: `SparseStep` for training, `SparseInference` for
    inference, which also has `encode_sparse`.

    Args:
        sae: a TopKTrainingSAE, BatchTopKTrainingSAE or MatryoshkaBatchTopKTrainingSAE; for inference a StandardSAE,
            TopKSAE, JumpReLUSAE, GatedSAE, or any transcoder.
        optimizer: the one that has trained it so far; its state is laid out in memory as W_enc now is, which
            saves time and changes no value.

    Raises:
        TypeError: another class, a subclass included: it may compute something else.
        ValueError: `training_forward_pass` was replaced on the object, as `compile_sae` does, or something that
            SAELens' step calls; a k that SAELens' step would not take. For inference, `encode`, `decode` or `forward`.
    """
    if not isinstance(sae, (SparseStep, SparseInference)):
        change_class(sae)
    if optimizer is not None:
        state = optimizer.state.get(sae.W_enc, {})
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == sae.W_enc.shape:
                state[name] = feature_major(value)
    return sae


def change_class(sae: SAE[Any]) -> None:
    """The part of `accelerate` that is done once."""
    forms: dict[Any, Any] = {**FAST_FORMS, **INFERENCE_FORMS}
    if type(sae) not in forms:
        known = ", ".join(cls.__name__ for cls in forms)
        raise TypeError(f"sae={type(sae).__name__}: must be one of SAELens' {known}, and no subclass")
    for name in METHODS if type(sae) in INFERENCE_FORMS else ("training_forward_pass", *DENSE_METHODS):
        if name in vars(sae):
            raise ValueError(f"sae.{name}: was replaced on this object; accelerate before compiling or replacing it")
    fast = forms[type(sae)]
    if type(sae) in FAST_FORMS:
        check_budget(getattr(sae.activation_fn, "k", 1), None, sae.W_dec.shape[0], fast.selection)
    sae.__class__ = fast
    sae.prepare()
