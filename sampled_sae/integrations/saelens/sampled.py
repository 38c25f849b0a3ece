"""The `sampled` architecture: a Sampled-SAE (arXiv 2508.21324) that SAELens trains."""

from __future__ import annotations

import copy

import torch
from sae_lens.saes.batchtopk_sae import BatchTopK
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from torch import Tensor

from ...codes import SparseCodes
from ...config import batch_budget, pool_size
from ...impl import threshold
from ...impl.dead_features import AuxRule
from ...impl.encoder import Encoder
from ...impl.hints import Rule
from ...impl.interface import Implementation, implementation, resolve_impl
from ...impl.pool import KeptPool, Pool, PoolRule, find_pool
from ...support.argument_checks import check_budget, check_number
from .accelerated import SampledBatchTopKTrainingSAE
from .as_made import is_plain
from .configs import SampledTrainingSAEConfig
from .step import StepInputs


class SampledTrainingSAE(SampledBatchTopKTrainingSAE):
    """Keeps the B*k largest activations inside a pool of k*l scored features; the aux loss is docs/method.md's.

    In training mode `encode` selects by the batch, as the next step would, and leaves that step's pool and random
    numbers as they are; in evaluation mode by `topk_threshold`, as what is saved for inference does. `calibrate` sets
    the threshold on activations of the user's. SAELens' checkpoints do not hold a pool kept by `pool_every`, nor the
    state of `pool="sample"`: a resumed run looks for a new pool and draws anew.
    """

    cfg: SampledTrainingSAEConfig

    def prepare(self) -> None:
        super().prepare()
        self._memory.pool = KeptPool(self.cfg.pool_every)
        self._generator = torch.Generator().manual_seed(self.cfg.seed)

    def forget(self) -> None:
        super().forget()
        self._in_dense_step = False
        self._pool_scores: Tensor | None = None

    @property
    def k(self) -> float:
        """`activation_fn.k`, where SAELens reads it and schedules of k set it.

        Raises:
            ValueError, TypeError: a k that the config would refuse, or another activation function.
        """
        fn = self.activation_fn
        if not is_plain(fn, BatchTopK):
            raise ValueError(f"activation_fn={fn!r}: sampled SAEs select by l, score and select; only its k can be set")
        return check_budget(fn.k, self.cfg.l, self.cfg.d_sae, self.cfg.select)[0]

    @property
    def is_batchtopk(self) -> bool:
        """Whether the smallest kept activation is the threshold that gives a mean L0 of k."""
        return self.cfg.select == "batch" and pool_size(self.k, self.cfg.l, self.cfg.d_sae) == self.cfg.d_sae

    def _selects_as_made(self, n_tokens: int) -> bool:
        return self.k > 0

    def parts(self) -> Implementation:
        return implementation(resolve_impl(self.cfg.impl, self.W_enc.device, self.W_enc.dtype))

    def next_pool(self, encoder: Encoder) -> Pool | None:
        """The pool of one more batch; None for the whole dictionary. Its scores serve the batch's aux loss."""
        pool = self._memory.pool.next(lambda: self._find_pool(encoder, self._generator))
        self._pool_scores = pool.scores.detach() if pool is not None and isinstance(pool.scores, Tensor) else None
        return pool

    def peek_pool(self, encoder: Encoder) -> Pool | None:
        """What `next_pool` would return, without a trace."""
        generator = self._generator.clone_state()
        return copy.copy(self._memory.pool).next(lambda: self._find_pool(encoder, generator))

    def _find_pool(self, encoder: Encoder, generator: torch.Generator) -> Pool | None:
        # scores that are kept for the dead-feature loss are complete
        rule = PoolRule.of(self.cfg)._replace(k=self.k)
        return find_pool(self.parts(), encoder.operands.in_full(), rule, generator)

    def select_codes(self, inputs: StepInputs) -> SparseCodes:
        pool = self.next_pool(inputs.encoder)
        members, rule = None if pool is None else pool.members, Rule(self.k, self.cfg.select)
        return self.parts().select(inputs.encoder, members, rule, self._memory.hints)

    def dead_loss(self, inputs: StepInputs, outs: list[Tensor], unhooked: Tensor) -> Tensor:
        dead, coefficient = inputs.dead, self.cfg.aux_loss_coefficient
        if coefficient == 0 or dead is None or not bool(dead.any()):
            return unhooked.new_zeros(())
        k_aux = self.cfg.k_aux if self.cfg.k_aux is not None else max(1, self.cfg.d_in // 2)
        rule = AuxRule(k_aux, self.cfg.aux_pool, self.cfg.score)
        scores = self._pool_scores if self._pool_scores is not None else self.scores_of_dead(inputs, dead)
        x_hat = outs[-1].detach()
        return coefficient * self.parts().aux_loss(inputs.encoder, x_hat, self.W_dec, dead, rule, scores)

    @torch.no_grad()
    def scores_of_dead(self, inputs: StepInputs, dead: Tensor) -> Tensor:
        """[F], column scores where more features are in `dead` than the aux loss takes, 0 for all that need none."""
        members, operands = dead.nonzero().squeeze(1), inputs.encoder.operands
        dtype = torch.promote_types(operands.x.dtype, torch.float32)
        scores = torch.zeros(self.cfg.d_sae, dtype=dtype, device=operands.x.device)
        if self.cfg.aux_pool is not None and len(members) > self.cfg.aux_pool:
            scores[members] = self.parts().column_scores(operands.of_features(members), self.cfg.score)
        return scores

    def after_selection(self, inputs: StepInputs, codes: SparseCodes, output: TrainStepOutput) -> None:
        if self.is_batchtopk:
            self.move_threshold(codes.smallest())
        elif inputs.step % self.cfg.threshold_every == 0:
            with torch.no_grad():  # of the whole dictionary
                largest = self.parts().select(inputs.encoder, None, Rule(self.k), self._memory.hints)
            self.move_threshold(largest.smallest())
        output.metrics["topk_threshold"] = self.topk_threshold

    @torch.no_grad()
    def move_threshold(self, smallest: Tensor) -> None:
        """The running mean, started at its first value; a threshold that was ever moved is above 0."""
        smallest = smallest.to(self.topk_threshold.dtype)
        steps = 1 if self.is_batchtopk else self.cfg.threshold_every
        moved = self.topk_threshold.lerp(smallest, 1 - (1 - self.cfg.topk_threshold_lr) ** steps)
        moved = torch.where(self.topk_threshold == 0, smallest, moved)
        self.topk_threshold = torch.where(smallest.isfinite(), moved, self.topk_threshold)

    @torch.no_grad()
    def calibrate(self, x: Tensor, l0: float | None = None) -> float:
        """Sets the threshold so that mean L0 on activations x [B, d_in] is l0 (default k), and returns it.

        x is what the SAE is given: for `expected_average_only_in` and `covariance_whitening` scaled during training,
        raw after `fit`.
        """
        target = self.k if l0 is None else l0
        check_number("l0", target, 0, self.cfg.d_sae)
        if target == 0 or x.dim() != 2 or len(x) == 0:
            raise ValueError(f"l0={target!r}, x.shape={tuple(x.shape)}: must be in (0, {self.cfg.d_sae}] and [B, d_in]")
        encoder = self.step_inputs(TrainStepInput(x, {}, None, 0, False)).encoder
        found = threshold.between(self.parts(), encoder, target, None, self.cfg.d_sae)
        self.topk_threshold = torch.zeros_like(self.topk_threshold) + found.to(self.topk_threshold)
        return float(self.topk_threshold)

    def encode_with_hidden_pre(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Dense codes and weighted activations before the relu, [..., d_sae], for all but the sparse step."""
        sae_in = self.process_sae_in(x)
        hidden_pre = self.hook_sae_acts_pre(sae_in @ self.W_enc + self.b_enc)
        if self.cfg.rescale_acts_by_decoder_norm:
            hidden_pre = hidden_pre * self.W_dec.norm(dim=-1)
        flat = hidden_pre.reshape(-1, self.cfg.d_sae)
        if self.training:
            mask = self._batch_mask(sae_in.detach().reshape(-1, self.cfg.d_in), flat.detach())
        else:
            mask = flat > self.topk_threshold
        acts = torch.where(mask, flat, 0).view(hidden_pre.shape)
        return self.hook_sae_acts_post(acts), hidden_pre

    def _batch_mask(self, centred: Tensor, a: Tensor) -> Tensor:
        """What a batch keeps of a [B, F], bool."""
        find = self.next_pool if self._in_dense_step else self.peek_pool
        pool = find(self.encoder_of(centred, b_dec_subtracted=True))
        rule = Rule(self.k, self.cfg.select)
        if pool is None:
            return rule.mask(a)
        kept = rule.mask(a[:, pool.members])
        return torch.zeros_like(a, dtype=torch.bool).index_copy_(1, pool.members, kept)

    def dense_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """SAELens' step around `encode_with_hidden_pre`, for hooks on dense activations."""
        self._in_dense_step, self._pool_scores = True, None
        try:
            output = super().dense_forward_pass(step_input)
        finally:
            self._in_dense_step = False
        flat = output.hidden_pre.detach().flatten()
        n = batch_budget(flat.numel() // self.cfg.d_sae, self.k)
        if self.is_batchtopk or step_input.n_training_steps % self.cfg.threshold_every == 0:
            top = flat.topk(n).values
            self.move_threshold(torch.cat((top[top > 0], top.new_tensor([torch.inf]))).min())
        output.metrics["topk_threshold"] = self.topk_threshold
        return output

    def update_topk_threshold(self, acts_topk: Tensor) -> None:
        """SAELens' own rule, which `dense_forward_pass` replaces."""

    def calculate_aux_loss(
        self, step_input: TrainStepInput, feature_acts: Tensor, hidden_pre: Tensor, sae_out: Tensor
    ) -> dict[str, Tensor]:
        inputs = self.step_inputs(step_input)
        inputs.raw = inputs.raw.reshape(-1, self.cfg.d_in)
        sae_out = sae_out.reshape(-1, self.cfg.d_in)
        return {"auxiliary_reconstruction_loss": self.dead_loss(inputs, [sae_out], sae_out)}
