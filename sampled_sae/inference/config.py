"""What an SAE computes at inference, as one frozen dataclass that checks itself and travels as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..config import IMPLS, SCREENS, Output
from ..support.argument_checks import (
    check_choice,
    check_field_names,
    check_flag,
    check_integer,
    check_positive,
    set_fields,
)

RULES = ("relu", "jumprelu", "topk", "threshold", "gated")
NORMS = ("none", "layer_norm", "constant_norm")


@dataclass(frozen=True)
class InferenceConfig(Output):
    """Shape, rule and conventions of an SAE or a transcoder that is only used: docs/method.md, "Rules of inference".

    Args:
        d_in: width of the activations.
        d_sae: number of features, F.
        rule: which features of a token are active. "relu": all that are positive. "jumprelu": those above a threshold
            for each feature. "threshold": those above one threshold (BatchTopK). "topk": the k largest. "gated": those
            whose gate is open, with a magnitude of their own.
        k: of "topk" alone.
        d_out: width of what a transcoder reconstructs; None for an SAE, which reconstructs its input.
        apply_b_dec_to_input: subtract b_dec from the activations before encoding; of an SAE alone.
        scale_by_decoder_norm: activations are multiplied by the norms of their decoder rows before they are compared,
            and codes hold these products; decoding divides by the norms again.
        normalize: "none", "layer_norm" or "constant_norm": what is done to each token first. An SAE undoes it on its
            reconstruction, a transcoder does not.
        input_scale: what activations are multiplied by before everything else, > 0. The reconstruction of an SAE is
            divided by it.
        output_scale: what the reconstruction of a transcoder is divided by, > 0; 1 for an SAE.
        skip: W_skip times the activations is added to the reconstruction.
        impl: "auto", "triton", "torch" or "reference".
        screen: "auto", "off" or "bf16": whether the search for active features looks through bfloat16 products first.
            Those found are the same.

    Raises:
        ValueError, TypeError: naming the argument, its value and what is allowed.
    """

    d_in: int
    d_sae: int
    rule: str
    k: int | None = None
    d_out: int | None = None
    apply_b_dec_to_input: bool = False
    scale_by_decoder_norm: bool = False
    normalize: str = "none"
    input_scale: float = 1.0
    output_scale: float = 1.0
    skip: bool = False
    impl: str = "auto"
    screen: str = "auto"

    def __post_init__(self) -> None:
        plain: dict[str, Any] = {name: check_integer(name, getattr(self, name), 1) for name in ("d_in", "d_sae")}
        for name in ("k", "d_out"):
            value = getattr(self, name)
            plain[name] = None if value is None else check_integer(name, value, 1)
        choices = {"rule": RULES, "normalize": NORMS, "impl": IMPLS, "screen": SCREENS}
        for name, allowed in choices.items():
            plain[name] = check_choice(name, getattr(self, name), allowed)
        for name in ("apply_b_dec_to_input", "scale_by_decoder_norm", "skip"):
            plain[name] = check_flag(name, getattr(self, name))
        for name in ("input_scale", "output_scale"):
            plain[name] = check_positive(name, getattr(self, name))
        set_fields(self, plain)
        self._check_together()

    def _check_together(self) -> None:
        if (self.rule == "topk") != (self.k is not None):
            raise ValueError(f"k={self.k!r}: must be given for rule='topk' and for no other; rule={self.rule!r}")
        if self.k is not None and self.k > self.d_sae:
            raise ValueError(f"k={self.k!r}: must be at most d_sae={self.d_sae}")
        self.check_output()

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> InferenceConfig:
        """The inverse of `to_dict`; an unknown or missing name is an error, not a silent default."""
        check_field_names(values, cls, {"d_in", "d_sae", "rule"})
        return cls(**values)
