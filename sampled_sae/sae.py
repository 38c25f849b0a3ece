"""`SampledSAE`: the layer as a module."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import functional
from .codes import SampledSAEOutput, SparseCodes
from .config import INFERENCES, SHAPE, SampledSAEConfig
from .impl import inference_rule
from .impl.given_tokens import flat_encoded, given_back, leading, tokens_and_goal
from .impl.inference_rule import Inference
from .impl.interface import resolve_impl
from .impl.layer_parts import LayerParts
from .impl.pool import KeptPool
from .impl.row_gradients import RowGradient
from .impl.row_guard import guard_rows
from .impl.start import geometric_median, start_from_targets
from .impl.training_step import reconstruct, skipped, training_step
from .pretrained import check_scale_of_state, scale_into_state
from .residual_stream.splicing import Splicing
from .sharing import Sharing
from .support.argument_checks import check_choice, check_positive
from .support.uncompiled import uncompiled


class SampledSAE(Sharing, Splicing, LayerParts):
    """Sparse autoencoder that keeps the B*k largest activations inside a pool of k*l scored features.

    Activations x are given as the model makes them, and reconstructions are in their units: the SAE multiplies by
    `cfg.input_scale` and divides by it again. With `scaled=True` x is multiplied already, and reconstructions are in
    those units too. Codes and losses always are.

    Parameters `W_enc` [d_in, d_sae] (each feature's weights contiguous: its memory is that of [d_sae, d_in]),
    `b_enc` [d_sae], `W_dec` [d_sae, d_out], `b_dec` [d_out], and with a skip `W_skip` [d_in, d_out]. An SAE has d_out =
    d_in and reconstructs its input; a transcoder is given what it reconstructs, `sae(x, target)`. A crosscoder reads x
    [..., layers, d_in], or flat [..., layers * d_in]; d_in and d_out above are layers * d_in then. Buffers: `threshold`
    (0-dim, inference), `threshold_steps` (training steps behind it), `calibrated_at` (`threshold_steps` when it was
    last calibrated), `tokens_since_active` int64 [d_sae], with `cfg.inference="pool"` also `inference_members` bool
    [d_sae]. The state dict shares their memory: its W_enc is not contiguous,
    `safetensors.torch.save_model(sae, path)` and `load_model` store it, `save_file` takes
    `{name: t.contiguous() for name, t in sae.state_dict().items()}`.

    In training mode the codes are chosen by the batch, the threshold and the dead-feature counts move. In
    evaluation mode a feature is active where its activation is above `threshold`, whatever else is in the
    batch; `cfg.inference` has two other rules. A TopK SAE (`select="token", l=None`) keeps k features of each token in
    both modes. Of a threshold that was never calibrated a warning says so once. Trained from scratch, decoder rows
    are kept at unit norm, those of a crosscoder's layers at norms that add up to 1, by `sampled_sae.optim.RowAdam`, or
    by `normalize_decoder()` after another optimizer's step.

    Equivalent, in training mode with l=None, to BatchTopK (arXiv 2412.06410); the pool is arXiv 2508.21324's, read as
    docs/method.md says.

    Args:
        cfg: a `SampledSAEConfig`.
        device, dtype: of the parameters; float32 by default.
    """

    def __init__(
        self,
        cfg: SampledSAEConfig,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        device = torch.get_default_device() if device is None else device
        super().__init__(device, dtype)
        self.cfg = cfg
        resolve_impl(cfg.impl, device, dtype)
        self.make_weights(cfg, device, dtype)
        self.register_buffer("tokens_since_active", torch.zeros(cfg.d_sae, dtype=torch.int64, device=device))
        self.register_state_dict_post_hook(scale_into_state)
        self.register_load_state_dict_pre_hook(check_scale_of_state)
        self.row_grads: list[RowGradient] = []
        self.generator = torch.Generator().manual_seed(cfg.seed)

    @property
    def cfg(self) -> SampledSAEConfig:
        """Another one for the same weights takes effect with the next step, which looks for a new pool. Another seed
        begins the draws of `pool="sample"` anew."""
        return self._cfg

    @cfg.setter
    def cfg(self, cfg: SampledSAEConfig) -> None:
        if not isinstance(cfg, SampledSAEConfig):
            raise TypeError(f"cfg={cfg!r}: must be a SampledSAEConfig")
        before: SampledSAEConfig | None = getattr(self, "_cfg", None)
        differ = [name for name in SHAPE if before is not None and getattr(cfg, name) != getattr(before, name)]
        if differ:
            given, have = (", ".join(f"{name}={getattr(c, name)}" for name in differ) for c in (cfg, before))
            raise ValueError(f"cfg: {given}: the weights are of {have}; make another SampledSAE")
        inference_rule.follow(self, before, cfg)
        if before is not None and cfg.seed != before.seed:
            self.generator.manual_seed(cfg.seed)
        self._cfg = cfg
        self.memory.pool = KeptPool(cfg.pool_every)

    @property
    def dead(self) -> Tensor:
        """bool [d_sae]: not selected for `cfg.dead_after` tokens."""
        return self.layout.whole(self.tokens_since_active) >= self.cfg.dead_after

    def forward(self, x: Tensor, target: Tensor | None = None, *, scaled: bool = False) -> SampledSAEOutput:
        """x [..., d_in] to a `SampledSAEOutput`; in training mode moves threshold and dead-feature counts.

        Args:
            x: of the dtype and device of the SAE; under autocast 16-bit activations are taken by a float32 SAE too.
            target: [..., d_out], what a transcoder is to reconstruct; None for an SAE, which reconstructs x.
            scaled: x is multiplied by `cfg.input_scale` already, the target by `cfg.output_scale`, and x_hat shall be.

        Raises:
            ValueError, TypeError: wrong shape, dtype or device, an empty batch, NaN or inf. On a GPU NaN and inf
                are reported by the next call but one at the latest, with the number of the call they came in.
        """
        if self.training and self.impl_in_use == "triton" and self.cfg.pool_every == self.layout.size == 1:
            return self._train_batch(x, target, scaled)
        return self._forward_uncompiled(x, target, scaled)

    # Sizes depend on the data here: torch.compile would break the graph a dozen times, spend its seconds on the
    # pieces, and (torch 2.13, aot_eager) lose the threshold's update. One break around the layer is right and free.
    @uncompiled
    def _forward_uncompiled(self, x: Tensor, target: Tensor | None, scaled: bool) -> SampledSAEOutput:
        return self._train_batch(x, target, scaled) if self.training else self._evaluate(x, target, scaled)

    def _train_batch(self, x: Tensor, target: Tensor | None, scaled: bool) -> SampledSAEOutput:
        c = self.cfg
        if torch.is_grad_enabled():
            if c.row_grads:
                guard_rows(self)
            self.layout.guard(self)
        leaves = self.layout.leaves(self, c.row_grads)
        tokens, encoder = self._batch(x, target, scaled, leaves)
        pool = self.memory.pool.next(lambda: self._find_pool(encoder))
        loss, mse, aux, x_hat, codes = training_step(self, self._parts, tokens, encoder, leaves, pool)
        self.row_grads += leaves.rows.gradients
        x_hat = given_back(self.cfg, x_hat, x, scaled)
        loss = torch.add(loss, aux, alpha=c.aux_coefficient)
        return SampledSAEOutput(loss, mse, aux, x_hat, self.layout.numbered(codes))

    def _evaluate(self, x: Tensor, target: Tensor | None, scaled: bool) -> SampledSAEOutput:
        leaves = self.layout.leaves(self, keep_rows=False)
        tokens, encoder = self._batch(x, target, scaled, leaves)
        codes = self._select(encoder)
        loss, mse, x_hat = reconstruct(self.cfg, self._parts, tokens, encoder, leaves, codes)
        x_hat = given_back(self.cfg, x_hat, x, scaled)
        return SampledSAEOutput(loss, mse, mse.new_zeros(()), x_hat, self.layout.numbered(codes))

    @uncompiled
    def encode_sparse(self, x: Tensor, *, scaled: bool = False, inference: Inference | None = None) -> SparseCodes:
        """Codes of x [..., d_in]: by the batch in training mode; in evaluation mode as `cfg.inference` says, or k of
        each token for a TopK SAE; in both by `inference` where it is given. `scaled` as in `forward`."""
        if inference is None and self.training:
            inference = Inference("batch")
        found = inference or inference_rule.of_evaluation(self, self.cfg)
        codes = self._select(self._encoder_of(x, scaled, by_batch=found.mode == "batch"), inference)
        return self.layout.complete(codes)

    @uncompiled
    def encode_above_threshold(self, x: Tensor, *, scaled: bool = False) -> SparseCodes:
        """Codes of x [..., d_in] by the threshold (of `cfg.inference="pool"` inside its set), whatever the mode."""
        if not self.training:
            self._warn_before_use()
        floors = inference_rule.by_threshold(self, self.cfg).floors
        return self.layout.complete(self._parts.above_threshold(self._encoder_of(x, scaled), floors))

    def encode(self, x: Tensor, *, scaled: bool = False) -> Tensor:
        """`encode_sparse` as a dense tensor [..., d_sae]; equivalent in evaluation mode by the threshold to
        `a = relu((x * input_scale - b_dec) @ W_enc + b_enc); a * (a > threshold)`."""
        codes = self.encode_sparse(x, scaled=scaled).to_dense()
        return codes.to(x.dtype).view(*leading(self.cfg, x), self.cfg.d_sae)

    def decode(self, codes: SparseCodes | Tensor, x: Tensor | None = None, *, scaled: bool = False) -> Tensor:
        """Reconstruction [..., d_out], of a crosscoder [..., layers, d_in], of SparseCodes [B, d_sae] or a dense tensor
        [..., d_sae]: in the units of what is reconstructed, or with `scaled` times `cfg.factor_out`. A skip adds
        its part of x [..., d_in], which was encoded; without x that is an error, and an SAE needs none."""
        if not isinstance(codes, (SparseCodes, Tensor)):
            raise TypeError(f"codes={type(codes).__name__}: must be SparseCodes or a torch.Tensor")
        if x is None and self.cfg.skip:
            raise ValueError("x=None: a skip transcoder adds x W_skip; give what was encoded, or zeros to leave it out")
        if codes.shape[-1:] != (self.cfg.d_sae,):
            raise ValueError(f"codes.shape={tuple(codes.shape)}: the last dimension must be {self.cfg.d_sae}")
        if self.layout.size > 1:
            leaves = self.layout.leaves(self, keep_rows=False)
            x_hat = self._parts.decode(self.layout.here(codes), leaves.W_dec, leaves.b_out, leaves.rows)
            x_hat = x_hat.to(self.W_dec.dtype).view(*codes.shape[:-1], self.cfg.width_out)
        elif isinstance(codes, SparseCodes):
            x_hat = functional.decode(codes, self.W_dec, self.b_dec, self.cfg.impl)
        else:
            x_hat = codes.to(self.W_dec.dtype) @ self.W_dec + self.b_dec
        if x is not None and self.W_skip is not None:
            tokens, W_skip = flat_encoded(self, x, x_hat.shape[:-1].numel(), scaled), self.layout.local(self.W_skip)
            x_hat = x_hat + skipped(tokens, W_skip, x_hat.dtype).view(x_hat.shape)
        x_hat = given_back(self.cfg, x_hat, x_hat, scaled)
        return x_hat.unflatten(-1, (self.cfg.layers, -1)) if self.cfg.is_crosscoder else x_hat

    @torch.no_grad()
    def calibrate(self, x: Tensor, l0: float | None = None, *, scaled: bool = False) -> float:
        """Sets the threshold to the value that gives mean L0 = l0 (default k) on x, and returns it.

        With `cfg.inference="pool"` it first chooses the fixed set: the features of highest score on x. A TopK SAE and
        one with `cfg.inference="batch"` use the threshold in `encode_above_threshold` and where they are exported.

        Args:
            x: [..., d_in], activations of the kind the SAE will see; tens of thousands of tokens are enough.
            l0: target, in (0, d_sae].
            scaled: as in `forward`.
        """
        mode = "pool" if self.cfg.inference == "pool" else "threshold"
        inference_rule.adopt(self, self.inference_on(x, mode, l0, scaled=scaled))
        return float(self.threshold)

    @torch.no_grad()
    def inference_on(self, x: Tensor, mode: str, l0: float | None = None, *, scaled: bool = False) -> Inference:
        """An inference for `encode_sparse`, whatever `cfg.inference` is; the SAE stays as it is.

        Args:
            x, l0, scaled: as in `calibrate`, for "threshold" and "pool", which are calibrated on x.
            mode: one of "threshold", "batch" and "pool".
        """
        encoder = self._encoder_of(x, scaled, by_batch=True)
        l0 = check_positive("l0", self.cfg.k if l0 is None else l0, self.cfg.d_sae)
        if check_choice("mode", mode, INFERENCES) == "batch":
            return Inference("batch")
        return inference_rule.calibrated(self._parts, encoder, self.cfg, mode, l0)

    @torch.no_grad()
    def init_b_dec(self, x: Tensor, target: Tensor | None = None, *, scaled: bool = False) -> None:
        """Sets b_dec to the geometric median of activations x [..., d_in], as before a training's first step. Of a
        transcoder, which takes its target too, to that of the target; then its decoder rows follow, and its encoder."""
        (tokens, goal), share = self.layout.read(lambda: tokens_and_goal(self, x, target, scaled))
        if self.cfg.is_transcoder:
            leaves = self.layout.leaves(self, keep_rows=False)
            encoder = partial(self._encoder, tokens, leaves, share)
            start_from_targets(self._parts, leaves, tokens, goal, lambda: self._select_together(encoder()))
            return
        totals = self._parts.totals
        median = geometric_median(tokens, total=totals.sum_of_tokens, greatest=totals.max_of_tokens)
        self.layout.local(self.b_dec).copy_(median)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch; row gradients are dropped too."""
        super().zero_grad(set_to_none)
        self.row_grads = []

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As in torch; the next step looks for a pool of the new weights. ValueError for another `input_scale`."""
        self.memory.pool.reset()
        return super().load_state_dict(*args, **kwargs)

    def _reconstruction(self, codes: SparseCodes, x: Tensor) -> Tensor:
        return self.decode(codes)

    def _splice_refusal(self) -> str | None:
        if self.training:
            return "the SAE is in training mode, where codes depend on the batch: call sae.eval() first"
        if self.cfg.inference == "batch" and not self.cfg.is_topk:
            return "cfg.inference='batch' makes codes depend on the batch: use 'threshold' or 'pool'"
        if self.cfg.is_transcoder or self.cfg.is_crosscoder:
            kind = "transcoder reconstructs" if self.cfg.is_transcoder else "crosscoder reconstructs, with its layer,"
            return f"a {kind} other activations than it reads"
        return None if self.layout.size == 1 else "an SAE that is spread over processes cannot be spliced"

    def extra_repr(self) -> str:
        c = self.cfg
        width = f", d_out={c.d_out}" if c.is_transcoder else f", layers={c.layers}" if c.is_crosscoder else ""
        return f"d_in={c.d_in}, d_sae={c.d_sae}{width}, k={c.k}, l={c.l}, score={c.score!r}, impl={self.impl_in_use!r}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SampledSAE:
        """As in torch; what was remembered of the old weights is dropped."""
        self.memory.forget()
        return super()._apply(fn, recurse)
