"""An SAE between two formats: what every one of them says in its own names and shapes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..config import SampledSAEConfig
from ..pretrained import WEIGHT_NAMES
from ..validate import FLOATS, check_choice

if TYPE_CHECKING:
    from ..sae import SampledSAE

RULES = ("threshold", "topk")
Say = Callable[[str], None]


def silent(line: str) -> None:
    """A `say` that says nothing."""


@dataclass(frozen=True)
class Origin:
    """What the SAE reads, as far as it is known: the peers' files have places for it.

    Args:
        model_name: of the language model.
        layer: block whose output is read, from 0.
        hook_name: in TransformerLens' words; that of the residual stream after `layer` when absent.
        context_size: tokens a row of the texts.
        training: the fields of the SampledSAEConfig it was trained with.
    """

    model_name: str | None = None
    layer: int | None = None
    hook_name: str | None = None
    context_size: int | None = None
    training: dict[str, Any] | None = None

    @property
    def hook(self) -> str | None:
        """hook_name with its default filled in."""
        if self.hook_name is not None or self.layer is None:
            return self.hook_name
        return f"blocks.{self.layer}.hook_resid_post"


@dataclass(frozen=True)
class PortableSAE:
    """Weights and inference rule of an SAE, on the CPU; tensors may share memory with the SAE.

    Attributes:
        W_enc, b_enc, W_dec, b_dec: [d_in, d_sae], [d_sae], [d_sae, d_in], [d_in], of one dtype.
        rule: "threshold": a feature is active where its activation exceeds `threshold`;
            "topk": where it is among the k largest of its token.
        k: active features a token; None where a file does not say.
        threshold: 0-dim, or [d_sae] where each feature has its own; None when it was never set.
        apply_b_dec_to_input: b_dec is subtracted before encoding.
    """

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    rule: str
    k: float | None
    threshold: Tensor | None
    apply_b_dec_to_input: bool = True

    @classmethod
    def of(cls, sae: SampledSAE, rule: str, k: float | None = None) -> PortableSAE:
        """The SAE under an inference rule; k is the SAE's own when absent."""
        check_choice("rule", rule, RULES)
        weights = {name: getattr(sae, name).detach().cpu() for name in WEIGHT_NAMES}
        threshold = sae.threshold.detach().cpu()
        unset = int(sae.threshold_steps) == 0 and float(threshold) == 0
        return cls(
            **weights,
            rule=rule,
            k=sae.cfg.k if k is None else k,
            threshold=None if unset else threshold,
            apply_b_dec_to_input=sae.cfg.apply_b_dec_to_input,
        )

    @property
    def d_in(self) -> int:
        return self.W_dec.shape[1]

    @property
    def d_sae(self) -> int:
        return self.W_dec.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        return self.W_dec.dtype

    def whole_k(self, peer: str) -> int:
        """k as a whole number.

        Raises:
            ValueError: a fraction, or more than the features.
        """
        if self.k is None or self.k != int(self.k) or not 1 <= self.k <= self.d_sae:
            allowed = f"{peer} has whole numbers in [1, {self.d_sae}] only"
            raise ValueError(f"k={self.k!r}: {allowed}; choose one with k= (--k)")
        return int(self.k)

    def read_at(self, factor: float) -> PortableSAE:
        """The SAE of activations times `factor`: biases and threshold times `factor`, weights as they are.

        Codes and reconstruction come out times `factor` too, by the homogeneity of relu.

        Raises:
            ValueError: a bias that leaves the range of its dtype.
        """
        if factor == 1:
            return self

        def scaled(name: str, t: Tensor) -> Tensor:
            t = (t.double() * factor).to(t.dtype)
            if not torch.isfinite(t).all():
                raise ValueError(f"scale: {name} times {factor} leaves the range of {t.dtype}")
            return t

        return replace(
            self,
            b_enc=scaled("b_enc", self.b_enc),
            b_dec=scaled("b_dec", self.b_dec),
            threshold=None if self.threshold is None else scaled("threshold", self.threshold),
        )

    def centring(self) -> PortableSAE:
        """The same SAE with b_dec subtracted from the input: b_enc + b_dec W_enc in place of b_enc, rounded once."""
        if self.apply_b_dec_to_input:
            return self
        b_enc = self.b_enc.double() + self.b_dec.double() @ self.W_enc.double()
        return replace(self, b_enc=b_enc.to(self.dtype), apply_b_dec_to_input=True)

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
        found.update(repr((self.rule, k, self.apply_b_dec_to_input)).encode())
        for t in (self.W_enc.t(), self.b_enc, self.W_dec, self.b_dec, self.threshold):
            if t is not None:
                found.update(repr((tuple(t.shape), t.dtype)).encode())
                found.update(t.reshape(-1).view(torch.uint8).numpy().data)
        return found.hexdigest()

    def config(self, k: float | None = None) -> SampledSAEConfig:
        """Of an SAE with this rule: the pool is the whole dictionary, all else is the default."""
        number = self.k if k is None else k
        if number is None:
            raise ValueError("k: the file does not say it; give k= (--k), the mean number of active features a token")
        return SampledSAEConfig(
            d_in=self.d_in,
            d_sae=self.d_sae,
            k=int(number) if number == int(number) else number,
            l=None,
            select="token" if self.rule == "topk" else "batch",
            apply_b_dec_to_input=self.apply_b_dec_to_input,
        )

    def state(self) -> dict[str, Tensor]:
        """The state dict of an SAE with these weights, every feature alive."""
        exact = torch.promote_types(self.dtype, torch.float32)
        threshold = torch.zeros((), dtype=exact) if self.threshold is None else self.threshold.to(exact)
        return {
            **{name: getattr(self, name) for name in WEIGHT_NAMES},
            "threshold": threshold,
            "threshold_steps": torch.tensor(int(self.threshold is not None)),
            "tokens_since_active": torch.zeros(self.d_sae, dtype=torch.int64),
        }


def read_tensors(path: Path) -> dict[str, Tensor]:
    """A safetensors file.

    Raises:
        ValueError: naming the file, when it is missing, truncated or foreign.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: truncated or not a safetensors file ({error})") from None


def check_tensors(path: Path, tensors: dict[str, Tensor], shapes: dict[str, tuple[int, ...]]) -> None:
    """Exactly the tensors of `shapes`, floating and finite; those that are matrices of one dtype.

    Raises:
        ValueError: naming the file and the tensor.
    """
    if set(tensors) != set(shapes):
        missing, foreign = sorted(set(shapes) - set(tensors)), sorted(set(tensors) - set(shapes))
        raise ValueError(f"{path}: tensors missing {missing}, unknown {foreign}; must hold {sorted(shapes)}")
    for name, shape in shapes.items():
        t = tensors[name]
        if tuple(t.shape) != shape:
            raise ValueError(f"{path}: {name} is {tuple(t.shape)}, must be {shape} by the configuration")
        if t.dtype not in FLOATS:
            raise ValueError(f"{path}: {name} is {t.dtype}, must be one of {', '.join(map(str, FLOATS))}")
        if not torch.isfinite(t).all():
            raise ValueError(f"{path}: {name} holds NaN or inf")


def check_one_dtype(path: Path, sae: PortableSAE) -> PortableSAE:
    """The SAE, whose weights must be of one dtype."""
    found = {name: getattr(sae, name).dtype for name in WEIGHT_NAMES}
    if len(set(found.values())) > 1:
        raise ValueError(f"{path}: weights of several dtypes: {', '.join(f'{n} {d}' for n, d in found.items())}")
    return sae


def field(path: Path, config: dict[str, Any], name: str, kind: type | tuple[type, ...] = int) -> Any:
    """A field of a configuration file, of the type it must have.

    Raises:
        ValueError: naming the file and the field.
    """
    value = config.get(name)
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise ValueError(f"{path}: {name}={value!r}: must be of type {' or '.join(k.__name__ for k in kinds)}")
    return value


def narrowed(value: Tensor, dtype: torch.dtype) -> Tensor:
    """In `dtype` where that loses nothing, else as it is."""
    return value.to(dtype) if torch.equal(value.to(dtype).double(), value.double()) else value
