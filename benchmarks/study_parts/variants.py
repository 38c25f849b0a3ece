"""What the study compares: every SAE by a name, most telling first."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

SAELENS = "saelens-batchtopk"
# no SAE: probes of the activations themselves
DENSE = "activations"


@dataclass(frozen=True)
class Variant:
    """One SAE of the study.

    Attributes:
        name: of its rows and its folders. of: of the rule that it is a variant of, where it is of another name.
        rule: fields of its SampledSAEConfig: l, score, pool, select.
        nested: whether it is a Matryoshka SAE, of a sixteenth, a quarter and all of its features.
        batch_size: tokens a step. longer: on how many times the tokens of the others it is trained.
        start: what b_dec begins as, the "median" of tokens, their "mean" or "zero".
        rows: what decoder rows, and encoder columns with them, begin as: "random" directions, or those of "tokens".
        aligned: whether the inner product of encoder and decoder is kept at 1.
        adam: RowAdam's mode. dead_batches: how many batches without it make a feature dead; None for the study's.
    """

    name: str
    rule: dict[str, Any] = field(default_factory=dict)
    nested: bool = False
    of: str | None = None
    batch_size: int = 1024
    longer: float = 1
    start: str = "median"
    rows: str = "random"
    aligned: bool = False
    adam: str = "dense"
    dead_batches: int | None = None

    def rule_of(self, features: int) -> dict[str, Any]:
        """`rule` for an SAE of so many features, with the groups of a Matryoshka SAE."""
        return {**self.rule, "groups": (features // 16, features // 4, features) if self.nested else None}


def pooled(pool: str, score: str, l: float) -> Variant:
    return Variant(f"{pool}-{score}-l{l:g}", {"l": l, "score": score, "pool": pool})


_MATRYOSHKA = Variant("matryoshka", {"l": None}, nested=True)
_SYNTHETIC = (
    Variant("batchtopk", {"l": None}),
    # the library's own, which trains by its own code
    Variant(SAELENS, {"l": None}),
    pooled("top", "l2", 4),
    pooled("sample", "l2", 16),
    pooled("top", "l2", 16),
    pooled("sample", "l2", 4),
    pooled("sample", "l2", 32),
    pooled("top", "l2", 32),
    pooled("top", "l2", 1),
    pooled("sample", "l2", 1),
    pooled("sample", "l2_squared", 16),
    pooled("sample", "uniform", 16),
    pooled("top", "entropy", 16),
    pooled("sample", "entropy", 16),
    pooled("sample", "l2_squared", 4),
    pooled("top", "entropy", 4),
    Variant("topk", {"l": None, "select": "token"}),
    _MATRYOSHKA,
)
_BATCHTOPK = Variant("batchtopk", {"l": None})
_REAL = (
    Variant(DENSE),
    _BATCHTOPK,
    pooled("top", "l2", 4),
    pooled("sample", "l2", 64),
    pooled("top", "l2", 16),
    Variant("topk", {"l": None, "select": "token"}),
    pooled("sample", "l2", 16),
    pooled("top", "l2", 64),
    _MATRYOSHKA,
    pooled("top", "l2", 1),
    # three quarters of the dictionary, where F/k is 128
    pooled("sample", "l2", 96),
    pooled("sample", "l2", 4),
    pooled("top", "entropy", 16),
    pooled("sample", "l2_squared", 64),
    pooled("sample", "uniform", 64),
    pooled("sample", "entropy", 64),
    pooled("top", "entropy", 64),
    pooled("sample", "l2", 1),
    pooled("top", "l2", 2),
    pooled("sample", "l2", 2),
    pooled("top", "entropy", 4),
    # with the top of the scores, l2 and l2_squared are one rule, and uniform none
    *(pooled("sample", score, l) for l in (16, 4) for score in ("l2_squared", "uniform", "entropy")),
    *(pooled("top", "entropy", l) for l in (1, 2)),
    *(pooled("sample", score, l) for l in (1, 2) for score in ("l2_squared", "uniform", "entropy")),
)
# the rules beside which a part's own are read
BATCH_RULES = (_BATCHTOPK, pooled("top", "l2", 4), pooled("top", "l2", 16), pooled("sample", "l2", 64))
DEAD_RULES = (_BATCHTOPK, pooled("top", "l2", 16))
_BATCH = tuple(
    replace(variant, name=f"{variant.name}-b{size}", of=variant.name, batch_size=size)
    for size in (256, 4096, 8192, 512, 2048)
    for variant in BATCH_RULES
)
_DEAD = tuple(
    replace(variant, name=f"{variant.name}-{name}", of=variant.name, rule={**variant.rule, **rule}, **other)
    for name, rule, other in (
        ("aligned", {}, {"aligned": True}),
        ("no-aux", {"aux_coefficient": 0.0}, {}),
        ("decayed", {}, {"adam": "decayed"}),
        ("tokens", {}, {"rows": "tokens"}),
        ("aligned-no-aux", {"aux_coefficient": 0.0}, {"aligned": True}),
        ("soon", {}, {"dead_batches": 5}),
        ("uncentred", {"apply_b_dec_to_input": False}, {}),
        ("aux-8x", {"aux_coefficient": 0.25}, {}),
        ("mean", {}, {"start": "mean"}),
        ("zero", {}, {"start": "zero"}),
        ("aux-all", {"aux_pool": None}, {}),
        ("tokens-decayed", {}, {"rows": "tokens", "adam": "decayed"}),
    )
    for variant in DEAD_RULES
)
# more tokens than the faster steps of a pool, or RowAdam's faster modes, have ever bought
LONGER = 2.5
TIME_RULES = (_BATCHTOPK, pooled("top", "l2", 4), pooled("top", "l2", 16))
_TIME = tuple(replace(variant, name=f"{variant.name}-longer", of=variant.name, longer=LONGER) for variant in TIME_RULES)
# whether what a start gains in a short training is still there after a longer one
_TIME += tuple(
    replace(variant, name=f"{variant.name}-tokens-longer", of=variant.name, longer=LONGER, rows="tokens")
    for variant in DEAD_RULES
)
SYNTHETIC = {variant.name: variant for variant in _SYNTHETIC}
# what is told apart on real activations: rules, sizes of a batch, ways to keep features alive, time
REAL = {variant.name: variant for variant in _REAL}
BATCHES = {variant.name: variant for variant in _BATCH}
DEAD = {variant.name: variant for variant in _DEAD}
TIME = {variant.name: variant for variant in _TIME}
PARTS = {"rules": REAL, "batches": BATCHES, "dead": DEAD, "time": TIME}
