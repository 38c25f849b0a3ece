"""An SAE between two formats: what every one of them says in its own names and shapes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..config import SampledSAEConfig
from ..impl.inference_rule import by_threshold
from ..impl.threshold import fault, is_set
from ..pretrained import SKIP, WEIGHT_NAMES
from ..support.argument_checks import check_choice, plain_number
from .layers import divided_by, scaled_by_layer

if TYPE_CHECKING:
    from ..sae import SampledSAE

RULES = ("threshold", "topk")
# Tensors that are multiplied where activations are; codes and reconstruction come out multiplied too.
IN_UNITS = ("b_enc", "b_dec", "threshold")
Say = Callable[[str], None]
# In units of the dtype's eps: decoder norms this near to 1 have been folded before, and thresholds this near to each
# other are one threshold times such norms.
ROUNDING = 8


def silent(line: str) -> None:
    """A `say` that says nothing."""


@dataclass(frozen=True)
class PortableSAE:
    """Weights and inference rule of an SAE, on the CPU; tensors may share memory with the SAE.

    Attributes:
        W_enc, b_enc, W_dec, b_dec: [d_in, d_sae], [d_sae], [d_sae, d_out], [d_out], of one dtype. Of a crosscoder d_in
            and d_out are the widths of all its layers together.
        rule: "threshold": a feature is active where its activation exceeds `threshold`;
            "topk": where it is among the k largest of its token.
        k: active features a token; None where a file does not say.
        threshold: 0-dim, or [d_sae] where each feature has its own; None when it was never set.
        apply_b_dec_to_input: b_dec is subtracted before encoding.
        training: fields of the SampledSAEConfig it was trained with, as far as they are known.
        input_scale: the SAE is to be fed activations times this, of a crosscoder perhaps one number a layer.
        transcodes: it reconstructs other activations than it reads; else d_out is d_in.
        W_skip: of a transcoder that has a skip, [d_in, d_out].
        output_scale: what a transcoder reconstructs is to be divided by this.
        layers: above 1 of a crosscoder.
    """

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    rule: str
    k: float | None
    threshold: Tensor | None
    apply_b_dec_to_input: bool = True
    training: dict[str, Any] | None = None
    input_scale: float | tuple[float, ...] = 1.0
    transcodes: bool = False
    W_skip: Tensor | None = None
    output_scale: float = 1.0
    layers: int = 1

    @classmethod
    def of(cls, sae: SampledSAE, rule: str, k: float | None = None) -> PortableSAE:
        """The SAE under an inference rule; k is the SAE's own when absent.

        Features outside the fixed set of `inference="pool"` get an encoder of zeros, so that they are never active.

        Raises:
            ValueError: NaN or inf in the SAE; a fixed set that was never chosen.
        """
        check_choice("rule", rule, RULES)
        names = (*WEIGHT_NAMES, SKIP) if sae.cfg.skip else WEIGHT_NAMES
        weights = {name: getattr(sae, name).detach().cpu() for name in names}
        if sae.cfg.inference == "pool":
            members = by_threshold(sae, sae.cfg).members
            assert members is not None
            weights |= {name: torch.where(members.cpu(), weights[name], 0) for name in ("W_enc", "b_enc")}
        threshold = sae.threshold.detach().cpu()
        for name, t in {**weights, "threshold": threshold}.items():
            if not torch.isfinite(t).all():
                raise ValueError(f"sae.{name} holds NaN or inf")
        found = cls.by_config(sae.cfg, weights, rule, threshold if is_set(sae) else None)
        return found if k is None else replace(found, k=k)

    @classmethod
    def by_config(
        cls, cfg: SampledSAEConfig, weights: dict[str, Any], rule: str, threshold: Tensor | None
    ) -> PortableSAE:
        """That of a config and weights by name."""
        return cls(
            **weights,
            rule=rule,
            k=cfg.k,
            # an active feature is positive, so that none below 0 says more than 0
            threshold=None if threshold is None else threshold.clamp(min=0),
            apply_b_dec_to_input=bool(cfg.apply_b_dec_to_input),
            training=cfg.to_dict(),
            input_scale=cfg.input_scale,
            transcodes=cfg.is_transcoder,
            output_scale=cfg.output_scale,
            layers=cfg.layers,
        )

    @property
    def d_in(self) -> int:
        return self.W_enc.shape[0]

    @property
    def d_out(self) -> int:
        return self.W_dec.shape[1]

    @property
    def weights(self) -> dict[str, Tensor]:
        """All of them by name."""
        found = {name: getattr(self, name) for name in WEIGHT_NAMES}
        return found if self.W_skip is None else {**found, SKIP: self.W_skip}

    def refuse(self, peer: str, transcoders: bool = True, crosscoders: bool = True) -> None:
        """ValueError for a transcoder or a crosscoder, where the files have no place for one."""
        if self.transcodes and transcoders:
            raise ValueError(f"d_out={self.d_out}: {peer} has no place for a transcoder")
        if self.layers > 1 and crosscoders:
            raise ValueError(f"layers={self.layers}: {peer} has no place for a crosscoder")

    @property
    def d_sae(self) -> int:
        return self.W_dec.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        return self.W_dec.dtype

    def of_one_dtype(self, path: Path) -> PortableSAE:
        """The same; ValueError that names its file where the weights are of several dtypes."""
        found = {name: t.dtype for name, t in self.weights.items()}
        if len(set(found.values())) > 1:
            raise ValueError(f"{path}: weights of several dtypes: {', '.join(f'{n} {d}' for n, d in found.items())}")
        return self

    def whole_k(self, peer: str) -> int:
        """k as a whole number.

        Raises:
            ValueError: a fraction, or more than the features.
        """
        k = plain_number(self.k)
        if k is None or not 1 <= k <= self.d_sae or k != int(k):
            allowed = f"{peer} has whole numbers in [1, {self.d_sae}] only"
            raise ValueError(f"k={self.k!r}: {allowed}; choose one with k= (--k)")
        return int(k)

    def say_of_threshold(self, sae: SampledSAE, say: Say) -> None:
        """Where the rule is by a threshold that is not to be relied on, of the SAE that this is."""
        if self.rule == "threshold" and self.threshold is None:
            say("the threshold was never set (no training step, no calibration): every positive activation is active")
        elif self.rule == "threshold" and (found := fault(sae)):
            say(found)

    def read_at(self, scale: float | tuple[float, ...], output_scale: float = 1.0) -> PortableSAE:
        """The same SAE, to be fed activations times `scale`: biases and threshold times what that is of its own scale.

        Where each layer of a crosscoder has its own scale, the weights move instead (`scaled_by_layer`).

        Else the weights are as they are, and codes come out in the new units, by the homogeneity of relu. What a
        transcoder reconstructs has a scale of its own, so that its decoder and its skip move by the quotient.

        Raises:
            ValueError: a tensor that leaves the range of its dtype.
        """
        if isinstance(scale, tuple) or isinstance(self.input_scale, tuple):
            return scaled_by_layer(self, scale)
        of_codes = scale / self.input_scale
        of_output = output_scale / self.output_scale if self.transcodes else of_codes
        factors = {"b_enc": of_codes, "threshold": of_codes, "b_dec": of_output}
        factors |= {"W_dec": of_output / of_codes, SKIP: of_output / of_codes} if self.transcodes else {}
        moved: dict[str, Any] = {}
        for name, factor in factors.items():
            if getattr(self, name) is not None:
                moved |= rescaled({name: getattr(self, name)}, factor)
        return replace(self, **moved, input_scale=scale, output_scale=output_scale if self.transcodes else 1.0)

    def centring(self) -> PortableSAE:
        """The same SAE with b_dec subtracted from the input: b_enc + b_dec W_enc in place of b_enc, rounded once.

        Raises:
            ValueError: a b_enc that leaves the range of its dtype.
        """
        if self.apply_b_dec_to_input:
            return self
        b_enc = (self.b_enc.double() + self.b_dec.double() @ self.W_enc.double()).to(self.dtype)
        if not torch.isfinite(b_enc).all():
            raise ValueError(f"b_enc + b_dec W_enc, for an input without b_dec, leaves the range of {self.dtype}")
        return replace(self, b_enc=b_enc, apply_b_dec_to_input=True)

    def with_unit_rows(self, say: Say, why: str) -> PortableSAE:
        """Unit decoder rows; equivalent to `n = W_dec.norm(dim=1); W_enc * n, b_enc * n, W_dec / n[:, None]`."""
        norms = self.W_dec.norm(dim=1).clamp(min=1e-8)
        if bool(((norms - 1).abs() <= ROUNDING * torch.finfo(self.dtype).eps).all()):
            return self
        say(f"decoder norms are folded into the encoder: {why}")
        return divided_by(self, norms)

    def one_threshold(self) -> PortableSAE:
        """The same function with one threshold t, the geometric mean of the features' own, where each has its own.

        Encoder weights and bias of feature j times t / threshold_j, its decoder row times the inverse: its codes
        come out times t / threshold_j, the reconstruction is the same up to rounding.

        Raises:
            ValueError: a threshold that is not positive.
        """
        if self.threshold is None or self.threshold.dim() == 0:
            return self
        own = self.threshold.double()
        if not bool((own > 0).all()):
            raise ValueError(
                f"threshold: {int((own <= 0).sum())} of {len(own)} are not positive, which no factor moves"
            )
        t = own.log().mean().exp()
        return replace(
            self,
            W_enc=(self.W_enc.double() * (t / own)).to(self.dtype),
            b_enc=(self.b_enc.double() * (t / own)).to(self.dtype),
            W_dec=(self.W_dec.double() * (own / t).unsqueeze(1)).to(self.dtype),
            threshold=t.to(self.threshold.dtype),
        )

    def fingerprint(self) -> str:
        """SHA-256 of everything here; equal for two files that say the same."""
        found = hashlib.sha256()
        k = None if self.k is None else float(self.k)
        kind = (self.rule, k, self.apply_b_dec_to_input)
        layers = ("layers", self.layers) if self.layers > 1 else ()
        found.update(repr((*kind, "transcoder") if self.transcodes else (*kind, *layers)).encode())
        for t in (self.W_enc.t(), self.b_enc, self.W_dec, self.b_dec, self.threshold, self.W_skip):
            if t is not None:
                found.update(repr((tuple(t.shape), t.dtype)).encode())
                found.update(t.reshape(-1).view(torch.uint8).numpy().data)
        return found.hexdigest()

    def config(self, k: float | None = None) -> SampledSAEConfig:
        """Of an SAE with this rule, trained as the file says; where it does not, the pool is the whole dictionary.

        Raises:
            ValueError: no k, neither given nor in the file; one that the rule does not take.
        """
        number = self.k if k is None else k
        if number is None:
            raise ValueError("k: the file does not say it; give k= (--k), the mean number of active features a token")
        training = {"l": None, "select": "batch", **(self.training or {})}
        if self.rule == "topk":
            training |= {"l": None, "select": "token"}
        own: dict[str, Any] = {"d_in": self.d_in // self.layers, "d_sae": self.d_sae, "k": without_fraction(number)}
        own |= {"layers": self.layers}
        own |= {"apply_b_dec_to_input": self.apply_b_dec_to_input, "input_scale": self.input_scale}
        if self.transcodes:
            own |= {"d_out": self.d_out, "skip": self.W_skip is not None, "output_scale": self.output_scale}
        return SampledSAEConfig(**{**training, **own})

    def state(self) -> dict[str, Tensor]:
        """The state dict of an SAE with these weights, every feature alive."""
        exact = torch.promote_types(self.dtype, torch.float32)
        threshold = torch.zeros((), dtype=exact) if self.threshold is None else self.threshold.to(exact)
        return {
            **self.weights,
            "threshold": threshold,
            "threshold_steps": torch.tensor(int(self.threshold is not None)),
            "tokens_since_active": torch.zeros(self.d_sae, dtype=torch.int64),
        }


def rescaled(tensors: dict[str, Tensor], factor: float) -> dict[str, Tensor]:
    """Each times `factor`, rounded once.

    Raises:
        ValueError: one that leaves the range of its dtype.
    """
    if factor == 1:
        return tensors
    found = {name: (t.double() * factor).to(t.dtype) for name, t in tensors.items()}
    for name, t in found.items():
        if not torch.isfinite(t).all():
            raise ValueError(f"scale: {name} times {factor} leaves the range of {t.dtype}")
    return found


def without_fraction(k: float) -> float:
    """5 for 5.0, so that equal configurations are the same JSON."""
    return int(k) if isinstance(k, float) and k.is_integer() else k
