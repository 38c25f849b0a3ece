"""`SparseStep`: the training step that SAELens' TopK family gets here, without a [B, F] tensor.

SAELens selects by activation times decoder norm and divides by the norm again before decoding. The two cancel, in
value and gradient, so the norm is only a weight of the selection here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from sae_lens.saes.topk_sae import SparseHookPoint, TopKTrainingSAE
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from ...codes import SparseCodes
from ...impl.encoder import Encoder
from ...impl.hints import Rule
from ...impl.step_memory import StepMemory
from ...support.argument_checks import check_budget
from ...support.uncompiled import uncompiled
from ..replaced import methods_of
from .as_made import DENSE_METHODS, is_as_made, is_plain, plain_budget
from .dead_feature_loss import dead_reconstruction_loss
from .feature_rows import FeatureRows

UNUSUAL_NORMS = ("constant_norm_rescale", "layer_norm")


@dataclass
class StepInputs:
    """A batch as the step sees it.

    encoder: of the normalised activations, with decoder norms as scale where they weigh the selection. dead: bool [F]
    or None. raw: what the loss compares with, [B, d]. step: number of the training step.
    """

    encoder: Encoder
    dead: Tensor | None
    raw: Tensor
    step: int


def feature_acts(codes: SparseCodes) -> Tensor:
    """The kept activations as a coalesced COO tensor [B, F] without gradient: all that SAELens asks of them."""
    values, tokens, features = codes.entries()
    at = torch.stack((tokens, features))
    return torch.sparse_coo_tensor(at, values.detach(), codes.shape, is_coalesced=True, check_invariants=False)


class SparseStep(FeatureRows, TopKTrainingSAE):
    """Mixed into a training SAE of SAELens' TopK family, in front of it.

    Only `training_forward_pass` changes. Its `feature_acts` and `hidden_pre` are COO tensors of the kept entries,
    without gradient. With 16-bit parameters or under autocast, products are float32 on a CPU, and on a GPU take 16-bit
    operands and sum in float32; the auxiliary loss is float32 on both.

    What SAELens' step reads at each step is read at each step here, in the same place: `activation_fn.k`, not `cfg.k`.
    SAELens' own step runs instead where a hook stands on the dense activations, the batch is not [B, d], activations
    are reshaped, `normalize_activations` is "layer_norm" or "constant_norm_rescale", the activation function is another
    or has a k that SAELens would refuse, or something that SAELens' step calls was replaced (`as_made.DENSE_METHODS`).
    """

    selection = "token"
    _methods: dict[str, Any]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__module__.startswith(__name__.rpartition(".")[0]):
            cls._methods = methods_of(cls, DENSE_METHODS, "sae_lens")

    def prepare(self) -> None:
        """What a step needs beside SAELens' state: memory to work in, and W_enc feature by feature in memory."""
        super().prepare()
        self._memory = StepMemory()
        self.forget()

    def forget(self) -> None:
        """Drops what the last batch left for the next: it belongs to these weights on this device."""
        self._memory.forget()

    def initialize_weights(self) -> None:
        super().initialize_weights()
        check_budget(self.cfg.k, None, self.cfg.d_sae, self.selection)
        self.prepare()

    def _apply(self, *args: Any, **kwargs: Any) -> SparseStep:
        super()._apply(*args, **kwargs)
        self.forget()
        return self

    @uncompiled
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """As SAELens'; see the class."""
        if self._needs_dense(step_input):
            return self.dense_forward_pass(step_input)
        inputs = self.step_inputs(step_input)
        scale = inputs.encoder.scale
        codes = self.select_codes(inputs)
        levels = self.decode_levels(codes if scale is None else codes.scaled(1 / scale))
        sae_out = self.run_time_activation_norm_fn_out(self.hook_sae_recons(levels[-1]))
        inner = [self.run_time_activation_norm_fn_out(level) for level in levels[:-1]]
        *inner_errors, error = (self.mse_loss_fn(out, inputs.raw).sum(dim=-1).mean() for out in (*inner, sae_out))
        dead_loss = self.dead_loss(inputs, [*inner, sae_out], levels[-1])
        losses = {"mse_loss": error, "auxiliary_reconstruction_loss": dead_loss}
        losses |= {f"inner_mse_loss_{width}": inner_error for width, inner_error in zip(self.widths(), inner_errors)}
        acts = feature_acts(codes)
        output = TrainStepOutput(
            sae_in=step_input.sae_in,
            sae_out=sae_out.to(self.dtype),
            feature_acts=acts,
            hidden_pre=acts,
            loss=sum(losses.values(), start=losses["mse_loss"].new_zeros(())),
            losses=losses,
        )
        self.after_selection(inputs, codes, output)
        return output

    def dense_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """SAELens' own step."""
        return super().training_forward_pass(step_input)

    def select_codes(self, inputs: StepInputs) -> SparseCodes:
        """The kept activations, times `scale`."""
        budget = plain_budget(self.activation_fn, *inputs.encoder.shape)
        assert budget is not None, "_needs_dense"
        rule = Rule(budget, self.selection)
        return self.parts().select(inputs.encoder, None, rule, self._memory.hints)

    def decode_levels(self, codes: SparseCodes) -> list[Tensor]:
        """Reconstructions [B, d] by the first `widths()` features, the last by all of them."""
        return [self.parts().decode(codes, self.W_dec, self.b_dec, self._memory.rows())]

    def widths(self) -> list[int]:
        """Features of each level but the last."""
        return []

    def dead_loss(self, inputs: StepInputs, outs: list[Tensor], unhooked: Tensor) -> Tensor:
        """The auxiliary loss, its coefficient included; `unhooked`: the last level before hook_sae_recons."""
        return self.reconstruct_from_dead(inputs, outs[-1], 0, inputs.encoder.shape[1])

    def reconstruct_from_dead(self, inputs: StepInputs, sae_out: Tensor, first: int, last: int) -> Tensor:
        """SAELens' loss of the dead features in [first, last) on what `sae_out` leaves of the batch."""
        residual = (inputs.raw - sae_out).detach()
        dead = residual.new_zeros(0).long() if inputs.dead is None else inputs.dead[first:last].nonzero().squeeze(1)
        if len(dead) == 0:
            return residual.new_zeros(())
        k_aux = inputs.raw.shape[-1] // 2
        error = dead_reconstruction_loss(inputs.encoder, self.W_dec, residual, dead + first, min(k_aux, len(dead)))
        return self.cfg.aux_loss_coefficient * min(len(dead) / k_aux, 1.0) * error

    def after_selection(self, inputs: StepInputs, codes: SparseCodes, output: TrainStepOutput) -> None:
        """Thresholds and metrics."""

    def _needs_dense(self, step_input: TrainStepInput) -> bool:
        """Whether someone looks at a dense tensor, or SAELens has its own word on the case."""
        x = step_input.sae_in
        return (
            x.dim() != 2
            or len(x) == 0
            or self.cfg.normalize_activations in UNUSUAL_NORMS
            or self.cfg.apply_b_dec_to_input not in (False, True)
            or self.dtype != self.W_enc.dtype
            or not self._selects_as_made(len(x))
            or not is_as_made(self, self._methods)
            or not is_plain(self.hook_sae_acts_pre, HookPoint, nn.Identity)
            or not is_plain(self.hook_sae_acts_post, HookPoint, SparseHookPoint, nn.Identity)
        )

    def _selects_as_made(self, n_tokens: int) -> bool:
        return plain_budget(self.activation_fn, n_tokens, self.W_dec.shape[0]) is not None

    def step_inputs(self, step_input: TrainStepInput) -> StepInputs:
        """`process_sae_in` but for the bias, which the selection subtracts."""
        x = self.hook_sae_input(step_input.sae_in.to(self.dtype))
        x = self.run_time_activation_norm_fn_in(x)
        encoder = self.encoder_of(x.reshape(-1, x.shape[-1]))
        return StepInputs(encoder, step_input.dead_neuron_mask, step_input.sae_in, step_input.n_training_steps)

    def encoder_of(self, x: Tensor, b_dec_subtracted: bool = False) -> Encoder:
        """The encoder of normalised activations x [B, d]."""
        scale = self.decoder_norms() if self.cfg.rescale_acts_by_decoder_norm else None
        b_dec = self.b_dec if self.cfg.apply_b_dec_to_input and not b_dec_subtracted else None
        # an option of our own architecture; SAELens' configs have none
        screen = getattr(self.cfg, "screen", "auto")
        return self.parts().encoder(x, self.W_enc.t(), self.b_enc, b_dec, scale, self._memory.rows(), screen)
