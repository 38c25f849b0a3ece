"""SAELens' SAEs for inference with our search for active features: `SparseInference`."""

from __future__ import annotations

from typing import Any

import torch
from sae_lens.saes.gated_sae import GatedSAE
from sae_lens.saes.jumprelu_sae import JumpReLUSAE
from sae_lens.saes.sae import SAE, _disable_hooks
from sae_lens.saes.standard_sae import StandardSAE
from sae_lens.saes.topk_sae import SparseHookPoint, TopK, TopKSAE
from sae_lens.saes.transcoder import JumpReLUSkipTranscoder, JumpReLUTranscoder, SkipTranscoder, Transcoder
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from ...codes import SparseCodes
from ...impl.hints import ThresholdHints
from ...impl.interface import Implementation
from ...inference.config import InferenceConfig
from ...inference.encoding import TokensToEncode, active_codes, active_dense, tokens_to_encode
from ...support.uncompiled import uncompiled
from ..replaced import has_other_methods
from .as_made import FUNCTIONS, is_plain, plain_budget
from .feature_rows import FeatureRows

# methods of SAELens' classes that are ours in the fast ones
METHODS = ("encode", "decode", "forward")
# a matrix of codes with a larger share of active entries is decoded as SAELens does it
FEW_ACTIVE = 1 / 8


class SparseInference(FeatureRows):
    """Mixed into a SAE of SAELens for inference, in front of it.

    `encode` and `decode` take and give what SAELens' do, dense matrices; `forward` makes none, and neither does
    `encode_sparse`. Everything is read where SAELens reads it, at each call: weights, `cfg`, `activation_fn`, hooks,
    `use_error_term`; normalisation and reshaping are SAELens' own methods. Nothing that depends on weights is kept.

    SAELens' own code runs instead where a hook stands on the activations before the rule (and for `forward`, on those
    after it), where the activation function is another, where NaN or inf comes in, where something was replaced, and
    where a gradient is asked for that goes through more than the active entries: of a gated SAE's weights, of decoder
    norms, and of codes that are given to `decode`. A second derivative is an error. With 16-bit weights products are
    summed and compared in float32.
    """

    rule: str
    theirs: type[SAE[Any]]
    _methods: dict[str, Any]
    _ours: dict[str, Any]
    _hints: ThresholdHints

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "theirs" in vars(cls):
            cls._methods = {name: getattr(cls.theirs, name) for name in METHODS}
            cls._ours = {name: getattr(cls, name) for name in METHODS}

    def prepare(self) -> None:
        super().prepare()
        self._hints = ThresholdHints()

    def _apply(self, *args: Any, **kwargs: Any) -> SparseInference:
        super()._apply(*args, **kwargs)
        self.prepare()
        return self

    @uncompiled
    def encode_sparse(self, x: Tensor) -> SparseCodes:
        """The active entries of `encode(x)`, [B, d_sae] with the leading dimensions of x flattened."""
        codes = None if self._is_seen_after() else self._active(x)
        return SparseCodes.from_dense(self.encode(x).reshape(-1, self.W_dec.shape[0])) if codes is None else codes

    @uncompiled
    def encode(self, x: Tensor) -> Tensor:
        """As SAELens'; see the class."""
        ready = self._ready(x)
        if ready is None:
            return super().encode(x)
        # a list of entries has gradients to weights, and needs more memory than the matrix where many are active
        dense = (
            active_codes(*ready, self._hints).to_dense() if self._weights_grad() else active_dense(*ready, self._hints)
        )
        return self.hook_sae_acts_post(dense.to(self.dtype).view(*self._leading(x), dense.shape[1]))

    @uncompiled
    def decode(self, feature_acts: Tensor) -> Tensor:
        """As SAELens'; a matrix of few active entries is multiplied entry by entry."""
        plain = self._is_as_made() and feature_acts.layout == torch.strided and feature_acts.dtype == self.W_dec.dtype
        if not plain or (torch.is_grad_enabled() and (feature_acts.requires_grad or self._weighs_by_norms())):
            return super().decode(feature_acts)
        flat = feature_acts.reshape(-1, feature_acts.shape[-1])
        if flat.numel() == 0 or int(flat.count_nonzero()) > FEW_ACTIVE * flat.numel():
            return super().decode(feature_acts)
        return self._decode_codes(SparseCodes.from_dense(flat), feature_acts.shape[:-1])

    @uncompiled
    def forward(self, x: Tensor) -> Tensor:
        """As SAELens', without a dense matrix of codes."""
        sae_out = None if self._is_seen_after() else self._reconstruct(x)
        if sae_out is None:
            return super().forward(x)
        if self.use_error_term:
            with torch.no_grad():
                with _disable_hooks(self):
                    clean = self._reconstruct(x)
                    clean = self.decode(self.encode(x)) if clean is None else clean
                sae_error = self.hook_sae_error(x - clean)
            sae_out = sae_out + sae_error
        return self.hook_sae_output(sae_out)

    def _reconstruct(self, x: Tensor) -> Tensor | None:
        """`decode(encode(x))`; None where that is for SAELens' own code."""
        codes = self._active(x)
        return None if codes is None else self._decode_codes(codes, self._leading(x))

    def _active(self, x: Tensor) -> SparseCodes | None:
        """The active entries of each token; None where they are for SAELens' own code."""
        ready = self._ready(x)
        return None if ready is None else active_codes(*ready, self._hints)

    def _weights_grad(self) -> bool:
        return torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())

    def _ready(self, x: Tensor) -> tuple[Implementation, int | None, TokensToEncode] | None:
        """What `active_codes` and `active_dense` take; None where x is for SAELens' own code."""
        budget = plain_budget(self.activation_fn, 1, self.W_dec.shape[0]) if self.rule == "topk" else None
        if (
            not self._is_as_made()
            or not self._has_plain_rule(budget)
            or not is_plain(self.hook_sae_acts_pre, HookPoint, nn.Identity)
            or (self._weights_grad() and (self.rule == "gated" or self._weighs_by_norms()))
            or x.numel() == 0
            or not bool(x.isfinite().all())
        ):
            return None
        sae_in = self.process_sae_in(x)
        flat = sae_in.reshape(-1, sae_in.shape[-1])
        tensors = dict(self.named_parameters(recurse=False))
        if not _without_nan(flat, tensors):
            return None
        if "threshold" in tensors:
            tensors["threshold"] = tensors["threshold"].detach().to(torch.promote_types(self.dtype, torch.float32))
        scale = self.decoder_norms() if self._weighs_by_norms() else None
        parts = self.parts()
        k = None if budget is None else int(budget)
        d_in, d_sae = self.W_enc.shape
        cfg = InferenceConfig(d_in, d_sae, self.rule, k=k)
        return parts, k, tokens_to_encode(parts, cfg, tensors, flat, scale)

    def _decode_codes(self, codes: SparseCodes, leading: tuple[int, ...]) -> Tensor:
        if self._weighs_by_norms():
            codes = codes.scaled(1 / self.decoder_norms())
        out = self.parts().decode(codes, self.W_dec, self.b_dec).to(self.dtype).view(*leading, self.W_dec.shape[1])
        return self._after_decoding(self.hook_sae_recons(out))

    def _after_decoding(self, out: Tensor) -> Tensor:
        """What SAELens does to a reconstruction behind its hook."""
        return self.reshape_fn_out(self.run_time_activation_norm_fn_out(out), self.d_head)

    def _leading(self, x: Tensor) -> tuple[int, ...]:
        """The dimensions of x before its width, or before heads and their width."""
        return tuple(x.shape[: -2 if self.hook_z_reshaping_mode else -1])

    def _weighs_by_norms(self) -> bool:
        return bool(getattr(self.cfg, "rescale_acts_by_decoder_norm", False))

    def _has_plain_rule(self, budget: float | None) -> bool:
        rule: Any = self.activation_fn
        if self.rule == "topk":
            return budget is not None and is_plain(rule, TopK) and not rule.use_sparse_activations
        return is_plain(rule, nn.ReLU)

    def _is_seen_after(self) -> bool:
        """Whether somebody looks at the dense codes, or puts others in their place."""
        replaced = has_other_methods(self, self._ours)
        return replaced or not is_plain(self.hook_sae_acts_post, HookPoint, SparseHookPoint, nn.Identity)

    def _is_as_made(self) -> bool:
        return (
            all(getattr(self.theirs, name) is method for name, method in self._methods.items())
            and all(getattr(module, name) is function for module, name, function in FUNCTIONS)
            and self.dtype == self.W_enc.dtype
        )


def _without_nan(tokens: Tensor, tensors: dict[str, Tensor]) -> bool:
    """Whether neither the tokens to encode, which a norm of 0 or b_dec may have spoilt, nor biases hold a NaN.

    A search by comparison would leave it out in silence.
    """
    vectors = [tokens, *(t for t in tensors.values() if t.dim() == 1)]
    return not bool(torch.stack([t.isnan().any() for t in vectors]).any())


class SparseTranscoding(SparseInference):
    """The same of a transcoder, which undoes no normalisation, and has no error term."""

    def forward(self, x: Tensor) -> Tensor:
        """As SAELens', without a dense matrix of codes."""
        out = None if self._is_seen_after() else self._reconstruct(x)
        if out is None:
            return self.theirs.forward(self, x)
        return out + x @ self.W_skip.T.to(x.device) if isinstance(self, SkipTranscoder) else out

    def _after_decoding(self, out: Tensor) -> Tensor:
        return out

    def _leading(self, x: Tensor) -> tuple[int, ...]:
        return tuple(x.shape[:-1])


RULES: dict[type[SAE[Any]], str] = {
    StandardSAE: "relu",
    TopKSAE: "topk",
    JumpReLUSAE: "jumprelu",
    GatedSAE: "gated",
    Transcoder: "relu",
    SkipTranscoder: "relu",
    JumpReLUTranscoder: "jumprelu",
    JumpReLUSkipTranscoder: "jumprelu",
}


def form_of(theirs: type[SAE[Any]], rule: str) -> type[SparseInference]:
    """The class of SAELens with our search in it, here under its name, where pickle looks for it."""
    mixed = SparseTranscoding if issubclass(theirs, Transcoder) else SparseInference
    about = {"__module__": __name__, "__doc__": f"SAELens' {theirs.__name__}.", "rule": rule, "theirs": theirs}
    form: Any = type(f"Sparse{theirs.__name__}", (mixed, theirs), about)
    globals()[form.__name__] = form
    return form


INFERENCE_FORMS = {theirs: form_of(theirs, rule) for theirs, rule in RULES.items()}
