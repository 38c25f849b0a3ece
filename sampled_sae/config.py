"""What an SAE computes, as one frozen dataclass that checks itself and travels as JSON."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from .support.argument_checks import (
    SCORES,
    check_budget,
    check_choice,
    check_field_names,
    check_flag,
    check_groups,
    check_integer,
    check_number,
    check_positive,
    check_scales,
    set_fields,
)
from .support.html_table import config_table

# the fields that the weights have to fit
SHAPE = ("d_in", "d_sae", "d_out", "skip", "layers")
POOLS = ("top", "sample")
SELECTS = ("batch", "token")
SCREENS = ("auto", "off", "bf16")
INFERENCES = ("threshold", "batch", "pool")
IMPLS = ("auto", "triton", "torch", "reference")
CHOICES = {
    "score": SCORES,
    "pool": POOLS,
    "select": SELECTS,
    "inference": INFERENCES,
    "impl": IMPLS,
    "screen": SCREENS,
}
# fields that earlier versions did not know, with what they stood for there
LATER: dict[str, Any] = {"groups": None, "d_out": None, "skip": False, "output_scale": 1.0}
LATER |= {"inference": "threshold", "inference_pool": None, "layers": 1}
# the set of an SAE with inference="pool": its buffer's name, as saved
MEMBERS = "inference_members"
LEAST = {"d_in": 1, "d_sae": 1, "pool_every": 1, "dead_after": 1, "seed": 0, "layers": 1}


def pool_size(k: float, l: float | None, d_sae: int) -> int:
    """P = min(F, ceil(k*l)); the whole dictionary for l=None. Decimal noise (0.1 * 30) does not add one."""
    return d_sae if l is None else min(d_sae, math.ceil(round(k * l, 9)))


def batch_budget(n_tokens: int, k: float) -> int:
    """n = round(B*k): how many entries a batch of B tokens keeps at most."""
    return round(n_tokens * k)


class Output:
    """What a config says of the reconstruction: a transcoder's has a width of its own, d_out."""

    d_in: int
    d_out: int | None
    apply_b_dec_to_input: bool | None
    input_scale: Any
    output_scale: float

    @property
    def is_transcoder(self) -> bool:
        """Whether it reconstructs other activations than it reads."""
        return self.d_out is not None

    @property
    def width_in(self) -> int:
        """How many numbers the encoder reads of a token."""
        return self.d_in

    @property
    def width_out(self) -> int:
        """Width of the reconstruction: d_out, or of an SAE what it reads."""
        return self.width_in if self.d_out is None else self.d_out

    @property
    def factor_out(self) -> Any:
        """What the reconstruction is divided by: output_scale, or input_scale of an SAE."""
        return self.output_scale if self.is_transcoder else self.input_scale

    def _repr_html_(self) -> str:
        return config_table(self)

    def check_output(self) -> None:
        """ValueError for what an SAE has and a transcoder has not, or the other way round."""
        if self.is_transcoder and self.apply_b_dec_to_input:
            raise ValueError(
                f"apply_b_dec_to_input=True: a transcoder's b_dec is of its output; d_out={self.d_out}; leave it out, "
                "or give None where dataclasses.replace takes it from an SAE's config"
            )
        if not self.is_transcoder and self.output_scale != 1:
            raise ValueError(f"output_scale={self.output_scale!r}: must be 1 for an SAE, whose input_scale serves both")


@dataclass(frozen=True)
class SampledSAEConfig(Output):
    """A Sampled-SAE's shape and rule.

    Args:
        d_in: width of the activations, d; of a crosscoder that of each of its layers.
        d_sae: number of features, F.
        k: average number of active features a token, 0 < k <= d_sae; a whole number for `select="token"`.
        l: pool multiplier >= 1; the candidate pool holds ceil(k*l) features. None, the default: the whole dictionary,
            so that score, pool, pool_every and score_tokens do nothing.
        score: "l2", "l2_squared", "entropy" or "uniform": what ranks the columns of the batch.
        pool: "top" takes the highest scores, "sample" draws in proportion to the score.
        pool_every: steps for which a pool is kept before the columns are scored again.
        score_tokens: share of a batch's tokens that the scores look at, in (0, 1].
        select: "batch" keeps round(B*k) entries of the pool in a batch, "token" k in each token.
        apply_b_dec_to_input: subtract b_dec from the activations before encoding; not of a transcoder, and the default
            of an SAE that is no crosscoder.
        aux_coefficient: weight of the dead-feature loss; 0 switches it off.
        k_aux: features a token that reconstruct the residual in that loss; None means half of d_in, or of d_out.
        aux_pool: at most so many dead features take part, those of highest score; None means all.
        dead_after: tokens without being selected after which a feature counts as dead.
        threshold_decay: decay of the running mean behind the inference threshold.
        row_grads: `loss.backward()` leaves the gradients of the touched features in `sae.row_grads`, for
            `sampled_sae.optim.RowAdam`, in place of dense ones in `W_enc.grad`, `b_enc.grad`, `W_dec.grad`.
        impl: "auto", "triton", "torch" or "reference".
        seed: seed of the initial weights and of `pool="sample"`.
        input_scale: what the SAE multiplies activations by before it encodes them, > 0. It is trained on the products:
            codes, losses, biases and threshold are in their units, reconstructions in those of the activations. Of a
            crosscoder also a sequence, one number a layer.
        groups: a Matryoshka SAE (arXiv 2503.17547): ascending numbers of features, the last of them d_sae. The first
            groups[0] features, the first groups[1] and so on are each trained to reconstruct on their own, and the
            loss is the mean of theirs. None: one reconstruction by all.
        d_out: width of what a transcoder reconstructs, activations other than those it reads; None for an SAE.
        skip: x W_skip is added to the reconstruction, of a transcoder alone; d_out is then d_in where it is not given.
        output_scale: what a transcoder's targets are multiplied by, and its reconstruction divided by, > 0. Loss and
            b_dec are in the units of the products. Of an SAE `input_scale` serves both.
        screen: "auto", "off" or "bf16": whether scores and searches look through bfloat16 products first, whose error
            is bounded, and compute in full what the bound leaves open. The result is the same; "auto" does so where it
            is faster.
        inference: how evaluation mode selects. "threshold": every activation above one threshold. "batch": the rule of
            training, pool and selection made for the batch given. "pool": above a threshold, inside a fixed set of
            features that `calibrate` chooses by their scores. A TopK SAE keeps k features of each token whatever it is.
        inference_pool: how many features the fixed set holds, in [1, d_sae]; None means as many as a batch's pool.
        layers: above 1 a crosscoder: activations of so many layers, or models, stand side by side, [..., layers, d_in],
            and one set of features reads and reconstructs them all. The norms of a feature's decoder rows, one a layer,
            add up to 1.

    l=None with select="batch" is BatchTopK, with select="token" TopK. Numbers of numpy, torch, decimal and fractions
    are taken and kept as ints and floats.

    Raises:
        ValueError, TypeError: naming the argument, its value and what is allowed.
    """

    d_in: int
    d_sae: int
    k: float
    l: float | None = None
    score: str = "l2"
    pool: str = "top"
    pool_every: int = 1
    score_tokens: float = 1.0
    select: str = "batch"
    apply_b_dec_to_input: bool | None = None
    aux_coefficient: float = 1 / 32
    k_aux: int | None = None
    aux_pool: int | None = 1024
    dead_after: int = 10_000_000
    threshold_decay: float = 0.999
    row_grads: bool = False
    impl: str = "auto"
    seed: int = 0
    input_scale: float | tuple[float, ...] = 1.0
    screen: str = "auto"
    groups: tuple[int, ...] | None = None
    d_out: int | None = None
    skip: bool = False
    output_scale: float = 1.0
    inference: str = "threshold"
    inference_pool: int | None = None
    layers: int = 1

    def __post_init__(self) -> None:
        plain: dict[str, Any] = {name: check_integer(name, getattr(self, name), n) for name, n in LEAST.items()}
        for name in ("k_aux", "aux_pool", "d_out", "inference_pool"):
            value = getattr(self, name)
            plain[name] = None if value is None else check_integer(name, value, 1)
        for name, allowed in CHOICES.items():
            plain[name] = check_choice(name, getattr(self, name), allowed)
        for name in ("row_grads", "skip"):
            plain[name] = check_flag(name, getattr(self, name))
        if plain["skip"] and plain["d_out"] is None:
            plain["d_out"] = plain["d_in"]
        plain_sae = plain["d_out"] is None and plain["layers"] == 1
        centred = plain_sae if self.apply_b_dec_to_input is None else self.apply_b_dec_to_input
        plain["apply_b_dec_to_input"] = check_flag("apply_b_dec_to_input", centred)
        plain["k"], plain["l"] = check_budget(self.k, self.l, plain["d_sae"], plain["select"])
        if self.inference_pool is not None and plain["inference_pool"] > plain["d_sae"]:
            most = plain["d_sae"]
            raise ValueError(f"inference_pool={self.inference_pool!r}: must be None or in [1, {most}], all features")
        plain["aux_coefficient"] = check_number("aux_coefficient", self.aux_coefficient, 0, None)
        plain["threshold_decay"] = check_number("threshold_decay", self.threshold_decay, 0, 1)
        plain["score_tokens"] = check_positive("score_tokens", self.score_tokens, 1)
        plain["input_scale"] = check_scales("input_scale", self.input_scale, plain["layers"])
        plain["output_scale"] = check_positive("output_scale", self.output_scale)
        plain["groups"] = None if self.groups is None else check_groups(self.groups, plain["d_sae"])
        set_fields(self, plain)
        self._check_together()

    def _check_together(self) -> None:
        self.check_output()
        if self.is_transcoder and self.is_crosscoder:
            raise ValueError(f"layers={self.layers}: a transcoder reads one; d_out={self.d_out}")
        if self.is_topk and self.inference == "pool":
            keeps = "a TopK SAE (select='token', l=None) keeps k features of each token"
            raise ValueError(f"inference='pool': {keeps}; must be 'threshold' or 'batch', which are the same for it")

    @property
    def is_crosscoder(self) -> bool:
        """Whether it reads several layers side by side."""
        return self.layers > 1

    @property
    def width_in(self) -> int:
        """How many numbers the encoder reads of a token: layers * d_in."""
        return self.layers * self.d_in

    @property
    def pool_size(self) -> int:
        """P, the number of candidate features of a batch."""
        return pool_size(self.k, self.l, self.d_sae)

    @property
    def inference_size(self) -> int:
        """Features in the fixed set of `inference="pool"`: inference_pool with its default filled in."""
        return self.pool_size if self.inference_pool is None else self.inference_pool

    @property
    def is_topk(self) -> bool:
        """Whether it is a TopK SAE, which keeps k features of each token in evaluation mode too."""
        return self.select == "token" and self.l is None

    @property
    def aux_features(self) -> int:
        """k_aux with its default filled in."""
        return self.k_aux if self.k_aux is not None else max(1, (self.d_out or self.d_in) // 2)

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, for JSON; without those of LATER that are not used, as earlier versions wrote it."""
        values = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
        return {name: value for name, value in values.items() if name not in LATER or value != LATER[name]}

    def settings(self) -> dict[str, Any]:
        """`to_dict` without `screen`, which changes no result."""
        return {name: value for name, value in self.to_dict().items() if name != "screen"}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SampledSAEConfig:
        """The inverse of `to_dict`; an unknown or missing name is an error, not a silent default."""
        check_field_names(values, cls, {"d_in", "d_sae", "k"})
        return cls(**values)
