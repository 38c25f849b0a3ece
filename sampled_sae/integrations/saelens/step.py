"""`SparseStep`: the training step that SAELens' TopK family gets here, without a [B, F] tensor.

SAELens selects by activation times decoder norm and divides by the norm again before decoding. The two cancel, in
value and gradient, so the norm is only a weight of the selection here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from sae_lens.saes.topk_sae import TopKTrainingSAE
from torch import Tensor

from ...codes import SparseCodes
from ...impl.encoder import Encoder
from ...impl.hints import Rule
from ...impl.interface import Implementation, implementation, resolve_impl
from ...impl.step_memory import StepMemory
from ...support.argument_checks import check_budget
from .dead_feature_loss import dead_reconstruction_loss

UNUSUAL_NORMS = ("constant_norm_rescale", "layer_norm")
# what SAELens' step calls and the sparse one does without
DENSE_METHODS = (
    "process_sae_in",
    "encode_with_hidden_pre",
    "get_activation_fn",
    "decode",
    "calculate_aux_loss",
    "calculate_topk_aux_loss",
    "update_topk_threshold",
    "_iterable_decode",
    "calculate_matryoshka_aux_loss",
)
KNOWN_PACKAGES = ("sae_lens", __name__.partition(".")[0])


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


def feature_major(t: Tensor) -> Tensor:
    """The same [d, F], each feature's weights contiguous."""
    return t if t.t().is_contiguous() else t.t().contiguous().t()


def feature_acts(codes: SparseCodes) -> Tensor:
    """The kept activations as a coalesced COO tensor [B, F] without gradient: all that SAELens asks of them."""
    values, tokens, features = codes.entries()
    at = torch.stack((tokens, features))
    return torch.sparse_coo_tensor(at, values.detach(), codes.shape, is_coalesced=True, check_invariants=False)


def has_other_methods(sae: TopKTrainingSAE) -> bool:
    """Whether the object or its class has one of `DENSE_METHODS` from someone else than SAELens and this package."""
    for name in DENSE_METHODS:
        method = getattr(type(sae), name, None)
        package = str(getattr(method, "__module__", None)).partition(".")[0]
        if name in vars(sae) or (method is not None and package not in KNOWN_PACKAGES):
            return True
    return False


class SparseStep(TopKTrainingSAE):
    """Mixed into a training SAE of SAELens' TopK family, in front of it.

    Only `training_forward_pass` changes. Its `feature_acts` and `hidden_pre` are COO tensors of the kept entries,
    without gradient. With 16-bit parameters or under autocast, products are float32 on a CPU, and on a GPU take 16-bit
    operands and sum in float32; the auxiliary loss is float32 on both.

    SAELens' own step runs instead where a hook stands on the dense activations, the batch is not [B, d], activations
    are reshaped for hook_z, `normalize_activations` is "layer_norm" or "constant_norm_rescale", or one of
    `DENSE_METHODS` was overridden.
    """

    selection = "token"

    def prepare(self) -> None:
        """What a step needs beside SAELens' state: memory to work in, and W_enc feature by feature in memory.

        Raises:
            ValueError: a k that is not in (0, d_sae], or for TopK not whole.
        """
        check_budget(self.cfg.k, None, self.cfg.d_sae, self.selection)
        self.W_enc.data = feature_major(self.W_enc.data)
        self._memory = StepMemory()
        self.forget()

    def forget(self) -> None:
        """Drops what the last batch left for the next: it belongs to these weights on this device."""
        self._memory.forget()

    def initialize_weights(self) -> None:
        super().initialize_weights()
        self.prepare()

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        result = super().load_state_dict(*args, **kwargs)
        self.prepare()
        return result

    def _apply(self, *args: Any, **kwargs: Any) -> SparseStep:
        super()._apply(*args, **kwargs)
        self.forget()
        return self

    def process_state_dict_for_saving(self, state_dict: dict[str, Any]) -> None:
        """safetensors takes row-major tensors alone."""
        super().process_state_dict_for_saving(state_dict)
        state_dict["W_enc"] = state_dict["W_enc"].contiguous()

    @torch.compiler.disable
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """As SAELens'; see the class."""
        if self._needs_dense(step_input):
            return self.dense_forward_pass(step_input)
        inputs = self.step_inputs(step_input)
        scale = inputs.encoder.scale
        codes = self.select_codes(inputs)
        unscaled = codes if scale is None else codes.scaled(1 / scale)
        levels = [self.run_time_activation_norm_fn_out(level) for level in self.decode_levels(unscaled)]
        levels[-1] = self.hook_sae_recons(levels[-1])
        errors = [self.mse_loss_fn(level, inputs.raw).sum(dim=-1).mean() for level in levels]
        losses = {"mse_loss": errors[-1], "auxiliary_reconstruction_loss": self.dead_loss(inputs, levels)}
        losses |= {f"inner_mse_loss_{width}": error for width, error in zip(self.widths(), errors[:-1])}
        acts = feature_acts(codes)
        output = TrainStepOutput(
            sae_in=step_input.sae_in,
            sae_out=levels[-1].to(self.dtype),
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
        rule = Rule(self.budget(inputs.encoder.shape[0]), self.selection)
        return self.parts().select(inputs.encoder, None, rule, self._memory.hints)

    def budget(self, n_tokens: int) -> float:
        """Entries a token, on average over a batch of n_tokens."""
        return self.cfg.k

    def decode_levels(self, codes: SparseCodes) -> list[Tensor]:
        """Reconstructions [B, d] by the first `widths()` features, the last by all of them."""
        return [self.parts().decode(codes, self.W_dec, self.b_dec, self._memory.rows())]

    def widths(self) -> list[int]:
        """Features of each level but the last."""
        return []

    def dead_loss(self, inputs: StepInputs, levels: list[Tensor]) -> Tensor:
        """The auxiliary loss, its coefficient included."""
        return self.reconstruct_from_dead(inputs, levels[-1], 0, self.cfg.d_sae)

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

    def input_bias(self) -> Tensor | None:
        return self.b_dec if self.cfg.apply_b_dec_to_input else None

    def parts(self) -> Implementation:
        return implementation(resolve_impl("auto", self.W_enc.device, self.W_enc.dtype))

    def _needs_dense(self, step_input: TrainStepInput) -> bool:
        """Whether someone looks at a dense tensor, or SAELens has its own word on the case."""
        if (
            step_input.sae_in.dim() != 2
            or self.hook_z_reshaping_mode
            or self.cfg.normalize_activations in UNUSUAL_NORMS
            or has_other_methods(self)
        ):
            return True
        points = (self.hook_sae_acts_pre, self.hook_sae_acts_post)
        return any(p._forward_hooks or p._forward_pre_hooks or p._backward_hooks for p in points)

    def step_inputs(self, step_input: TrainStepInput) -> StepInputs:
        """`process_sae_in` but for the bias, which the selection subtracts."""
        x = self.hook_sae_input(step_input.sae_in.to(self.dtype))
        x = self.run_time_activation_norm_fn_in(x)
        encoder = self.encoder_of(x.reshape(-1, x.shape[-1]))
        return StepInputs(encoder, step_input.dead_neuron_mask, step_input.sae_in, step_input.n_training_steps)

    def encoder_of(self, x: Tensor, b_dec_subtracted: bool = False) -> Encoder:
        """The encoder of normalised activations x [B, d]."""
        scale = None
        if self.cfg.rescale_acts_by_decoder_norm:
            dtype = torch.promote_types(x.dtype, torch.float32)
            scale = torch.linalg.vector_norm(self.W_dec.detach(), dim=-1, dtype=dtype)
            scale.clamp_min_(torch.finfo(scale.dtype).tiny)  # rows of zeros stay finite when divided by it
        b_dec = None if b_dec_subtracted else self.input_bias()
        return self.parts().encoder(x, self.W_enc.t(), self.b_enc, b_dec, scale, self._memory.rows())
