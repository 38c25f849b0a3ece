"""`InferenceSAE`: an SAE or a transcoder that is only used, by whatever rule it was trained for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..codes import SparseCodes
from ..impl.encoder import LateTokens
from ..impl.hints import ThresholdHints
from ..impl.interface import Implementation, implementation, resolve_impl
from ..residual_stream.splicing import Splicing
from ..support.argument_checks import HALF, check_activations, describe
from ..support.late_values import FiniteInputs
from ..support.uncompiled import uncompiled
from .config import InferenceConfig
from .encoding import NormedTokens, TokensToEncode, active_codes, active_dense, norm_tokens, tokens_to_encode
from .features import check_dense_codes, check_features, codes_of_features, dense_columns
from .products import decoder_norms, inverse_norms, product
from .tensors import WEIGHTS, check_values, prepared

# dense codes with a smaller share of active entries are decoded entry by entry
FEW_ACTIVE = 1 / 32
# and a list of a larger share is decoded as a matrix
MANY_ACTIVE = 1 / 4


@dataclass
class InferenceOutput:
    """What a forward pass gives.

    Attributes:
        x_hat: reconstruction [..., d_in], or [..., d_out] of a transcoder, of the dtype of x.
        codes: the active features, [B, d_sae] with the leading dimensions of x flattened.
    """

    x_hat: Tensor
    codes: SparseCodes


class InferenceSAE(Splicing, nn.Module):
    """A trained SAE or transcoder, its active features found without a [B, F] matrix.

    Buffers, by name as given: `W_enc` [d_in, d_sae] (each feature's weights contiguous), `W_dec` [d_sae, d_out],
    `b_dec` [d_out]; `b_enc` [d_sae], or for "gated" `b_gate`, `b_mag` and `r_mag` [d_sae]; `threshold` [d_sae] for
    "jumprelu" and 0-dim for "threshold"; with a skip `W_skip` [d_out, d_in]. Weights may have 16 bits and are never
    copied to more; biases and thresholds are kept in at least float32.

    Activations x [..., d_in] may have any float dtype. Products are computed in the wider of its dtype and that of the
    weights, 16-bit ones in float32 (on a GPU they are multiplied in 16 bits and summed in 32). Gradients reach x, codes
    and dense activations through the active entries; the weights get none.

    Equivalent, for "relu", to `a = relu((x - b_dec) @ W_enc + b_enc); x_hat = a @ W_dec + b_dec`. docs/method.md,
    "Rules of inference", has every rule and convention.

    Args:
        cfg: an `InferenceConfig`.
        tensors: by name; those that lie as they should are kept and not copied.

    Raises:
        ValueError, TypeError: naming the tensor and what is wrong with it.
    """

    W_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    W_skip: Tensor

    def __init__(self, cfg: InferenceConfig, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        if not isinstance(cfg, InferenceConfig):
            raise TypeError(f"cfg={cfg!r}: must be an InferenceConfig")
        self.cfg = cfg
        for name, t in prepared(cfg, tensors).items():
            self.register_buffer(name, t)
        resolve_impl(cfg.impl, self.W_enc.device, self.W_enc.dtype)
        self._renew()
        self._inputs = FiniteInputs()

    @property
    def impl_in_use(self) -> str:
        """The implementation that `cfg.impl` stands for on this device."""
        return resolve_impl(self.cfg.impl, self.W_enc.device, self.W_enc.dtype)

    @uncompiled
    def forward(self, x: Tensor) -> InferenceOutput:
        """x [..., d_in] to its active features and the reconstruction, skip included."""
        given, tokens = self._tokens(x)
        codes = self._codes(x, tokens.x, None)
        x_hat = self._in_units(self._decode_sparse(codes), tokens)
        if self.cfg.skip:
            x_hat = x_hat + product(given, self.W_skip) / self.cfg.factor_out
        return InferenceOutput(x_hat.to(x.dtype).view(*x.shape[:-1], self.cfg.width_out), codes)

    @uncompiled
    def encode_sparse(self, x: Tensor) -> SparseCodes:
        """The active features of x [..., d_in], [B, d_sae]; values of at least float32, with gradient to x."""
        return self._codes(x, *self._to_encode(x))

    @uncompiled
    def encode(self, x: Tensor, features: Sequence[int] | Tensor | None = None) -> Tensor:
        """Dense activations [..., d_sae] of x [..., d_in]; with `features` those columns alone, [..., P].

        Args:
            features: P distinct features. Their rows alone are multiplied, but for "topk", whose k largest are of all.

        Equivalent to `encode_sparse(x).to_dense()` up to rounding, to its columns with `features`; of the dtype of x.
        """
        chosen = self._chosen(features)
        a = self._dense(x, chosen).to(x.dtype)
        return a.view(*x.shape[:-1], a.shape[1])

    @uncompiled
    def decode(
        self,
        codes: SparseCodes | Tensor,
        features: Sequence[int] | Tensor | None = None,
        x: Tensor | None = None,
    ) -> Tensor:
        """The reconstruction of codes, without the skip: [B, d_out] of SparseCodes, [..., d_out] of a dense tensor.

        Args:
            codes: SparseCodes [B, d_sae] or dense [..., d_sae]; with `features` a dense tensor is [..., P].
            features: P distinct features, which alone are decoded, with b_dec.
            x: the activations [..., d_in] that were encoded; needed where `cfg.normalize` is to be undone.

        Differentiable in the codes; of their dtype. Equivalent to `codes @ W_dec + b_dec`.
        """
        chosen = self._chosen(features)
        if isinstance(codes, SparseCodes):
            if codes.shape[1] != self.cfg.d_sae:
                raise ValueError(f"codes.shape={codes.shape}: must be [B, {self.cfg.d_sae}]")
            codes.check_listed()
            dtype, leading = codes.values.dtype, torch.Size(codes.shape[:1])
            x_hat = self._decode_sparse(codes if chosen is None else codes_of_features(codes, chosen))
        else:
            width = self.cfg.d_sae if chosen is None else len(chosen)
            check_dense_codes(codes, width)
            dtype, leading = codes.dtype, codes.shape[:-1]
            x_hat = self._decode_dense(codes.reshape(-1, width), chosen)
        x_hat = self._in_units(x_hat, self._norm_of(x, len(x_hat)))
        return x_hat.to(dtype).view(*leading, self.cfg.width_out)

    def extra_repr(self) -> str:
        c = self.cfg
        width = f", d_out={c.d_out}" if c.is_transcoder else ""
        k = "" if c.k is None else f", k={c.k}"
        return f"d_in={c.d_in}, d_sae={c.d_sae}{width}, rule={c.rule!r}{k}, impl={self.impl_in_use!r}"

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As in torch; what was remembered of the old weights is dropped.

        Raises:
            ValueError: NaN or inf that the constructor would refuse; nothing is loaded then.
        """
        for name, own in self.named_buffers():
            given = state_dict.get(name)
            # what torch refuses by itself is its to name
            if isinstance(given, Tensor) and given.shape == own.shape and not given.is_meta:
                check_values(name, given)
        try:
            return super().load_state_dict(state_dict, *args, **kwargs)
        finally:
            self._renew()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> InferenceSAE:
        """As in torch, but biases and thresholds stay in at least float32: rounded, others would be active."""
        before = {name: t for name, t in self.named_buffers() if name not in WEIGHTS}
        super()._apply(fn, recurse)
        for name, t in before.items():
            moved = getattr(self, name)
            if moved.dtype in HALF:
                setattr(self, name, t.to(moved.device, torch.float32))
        self._renew()
        return self

    def _reconstruction(self, codes: SparseCodes, x: Tensor) -> Tensor:
        return self.decode(codes, x=x)

    def _splice_refusal(self) -> str | None:
        if self.cfg.is_transcoder:
            return f"d_out={self.cfg.d_out}: a transcoder reconstructs other activations than the residual stream"
        return None

    def _renew(self) -> None:
        """Each feature's weights contiguous, nothing remembered of others."""
        self.W_enc = self.W_enc.t().contiguous().t()
        self._hints = ThresholdHints()

    def _checked(self, x: Tensor) -> torch.dtype:
        """The dtype to compute in, of tokens that are what they should be."""
        check_activations(x, self.cfg.d_in, may_be_empty=True)
        if x.device != self.W_enc.device:
            raise ValueError(f"x.device={x.device}: the weights are on {self.W_enc.device}; both must share one device")
        if any(t.requires_grad for t in self.buffers()):
            raise ValueError("a weight requires a gradient: an InferenceSAE gives gradients to activations alone")
        self._inputs.check(x)
        return torch.promote_types(torch.promote_types(x.dtype, self.W_enc.dtype), torch.float32)

    def _tokens(self, x: Tensor) -> tuple[Tensor, NormedTokens]:
        """[B, d_in] of x times `cfg.input_scale` in the dtype to compute in; and that normed, without b_dec."""
        dtype = self._checked(x)
        return self._prepared(x.reshape(-1, self.cfg.d_in), dtype)

    def _prepared(self, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, NormedTokens]:
        given = x.to(dtype)
        if self.cfg.input_scale != 1:
            given = given * self.cfg.input_scale
        tokens = norm_tokens(given, self.cfg.normalize)
        if self.cfg.apply_b_dec_to_input:
            tokens = tokens._replace(x=tokens.x - self.b_dec.to(dtype))
        return given, tokens

    def _to_encode(self, x: Tensor) -> tuple[Tensor, LateTokens | None]:
        """Tokens [B, d_in], normed and without b_dec; or as given, and how to make that of them, where nothing but a
        search above thresholds reads them, which needs a few at a time."""
        c, dtype = self.cfg, self._checked(x)
        flat = x.reshape(-1, c.d_in)
        if not self._is_searched(x):
            return self._prepared(flat, dtype)[1].x, None
        changed = c.apply_b_dec_to_input or c.normalize != "none" or c.input_scale != 1
        prepare = (lambda rows: self._prepared(rows, dtype)[1].x) if changed else None
        return flat, LateTokens(dtype, prepare)

    def _norm_of(self, x: Tensor | None, n_tokens: int) -> NormedTokens | None:
        """How a reconstruction of n tokens gets back to the units of x."""
        if self.cfg.normalize == "none" or self.cfg.is_transcoder:
            return None
        if x is None:
            raise ValueError(
                f"x=None: normalize={self.cfg.normalize!r} is undone with the activations that were encoded"
            )
        tokens = self._tokens(x)[1]
        if len(tokens.x) != n_tokens:
            raise ValueError(f"x={describe(x)}: has {len(tokens.x)} tokens, the codes have {n_tokens}")
        return tokens

    def _in_units(self, x_hat: Tensor, tokens: NormedTokens | None) -> Tensor:
        """A reconstruction of the weights in the units of the activations that it is of."""
        if tokens is not None and not self.cfg.is_transcoder:
            x_hat = tokens.undo(x_hat)
        return x_hat if self.cfg.factor_out == 1 else x_hat / self.cfg.factor_out

    def _chosen(self, features: Sequence[int] | Tensor | None) -> Tensor | None:
        return None if features is None else check_features(features, self.cfg.d_sae, self.W_enc.device)

    def _form_for(self, dtype: torch.dtype) -> str:
        """The implementation for activations or codes of that dtype."""
        return resolve_impl(self.cfg.impl, self.W_enc.device, torch.promote_types(dtype, self.W_enc.dtype))

    def _is_searched(self, x: Tensor) -> bool:
        """Whether nothing but a search above thresholds reads x, some tokens after others."""
        wants_grad = torch.is_grad_enabled() and x.requires_grad
        return not wants_grad and self.cfg.k is None and self._form_for(x.dtype) == "torch"

    def _ready(
        self, x: Tensor, given: Tensor, late: LateTokens | None, features: Tensor | None = None
    ) -> tuple[Implementation, TokensToEncode]:
        name = self._form_for(x.dtype)
        scale = decoder_norms(self.W_dec, features) if self.cfg.scale_by_decoder_norm else None
        if name == "triton":
            # its products are of what 16-bit activations and weights are rounded to
            given = given.to(torch.promote_types(x.dtype, self.W_enc.dtype))
        tensors, parts = dict(self.named_buffers()), implementation(name)
        return parts, tokens_to_encode(parts, self.cfg, tensors, given, scale, features, late)

    def _codes(self, x: Tensor, given: Tensor, late: LateTokens | None) -> SparseCodes:
        parts, ready = self._ready(x, given, late)
        return active_codes(parts, self.cfg.k, ready, self._hints)

    def _dense(self, x: Tensor, features: Tensor | None) -> Tensor:
        """Activations [B, F], or [B, P] of the features."""
        given, late = self._to_encode(x)
        if self.cfg.k is not None and features is not None:
            return dense_columns(self._codes(x, given, late), features)
        parts, ready = self._ready(x, given, late, features)
        return active_dense(parts, self.cfg.k, ready, self._hints)

    def _decode_sparse(self, codes: SparseCodes) -> Tensor:
        """codes W_dec + b_dec, [B, d_out]."""
        form = self._form_for(codes.values.dtype)
        if form == "torch" and len(codes.values) > MANY_ACTIVE * codes.shape[0] * codes.shape[1]:
            return self._decode_dense(codes.to_dense(), None)
        if self.cfg.scale_by_decoder_norm:
            codes = codes.scaled(inverse_norms(self.W_dec).to(codes.values.dtype))
        return implementation(form).decode(codes, self.W_dec, self.b_dec)

    def _decode_dense(self, codes: Tensor, features: Tensor | None) -> Tensor:
        """codes [B, F] times W_dec, or [B, P] times those rows, plus b_dec."""
        wants_all = features is not None or (torch.is_grad_enabled() and codes.requires_grad)
        if not wants_all and int(codes.count_nonzero()) <= FEW_ACTIVE * codes.numel():
            return self._decode_sparse(SparseCodes.from_dense(codes))
        exact = torch.promote_types(torch.promote_types(codes.dtype, self.W_dec.dtype), torch.float32)
        codes, W = codes.to(exact), self.W_dec if features is None else self.W_dec.index_select(0, features)
        if self.cfg.scale_by_decoder_norm:
            codes = codes * inverse_norms(self.W_dec, features).to(exact)
        return product(codes, W.t()) + self.b_dec.to(exact)
