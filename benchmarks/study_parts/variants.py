"""What the study compares: every SAE by a name, most telling first."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.workloads import three_groups

SAELENS = "saelens-batchtopk"
# no SAE: probes of the activations themselves
DENSE = "activations"


@dataclass(frozen=True)
class Variant:
    """One SAE of the study.

    Attributes:
        name: of its rows and its folders. of: of the rule that it is a variant of, where it is of another name.
        rule: fields of its SampledSAEConfig: l, score, pool, select.
        nested: whether it is a Matryoshka SAE, of three groups.
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
        return {**self.rule, "groups": three_groups(features) if self.nested else None}


_NAMED = {
    DENSE: Variant(DENSE),
    "batchtopk": Variant("batchtopk", {"l": None}),
    # the library's own, which trains by its own code
    SAELENS: Variant(SAELENS, {"l": None}),
    "topk": Variant("topk", {"l": None, "select": "token"}),
    "matryoshka": Variant("matryoshka", {"l": None}, nested=True),
}


def named(*names: str) -> dict[str, Variant]:
    """By name: one of `_NAMED`, or pool, score and l, as "top-l2-l4"."""
    pooled = {name: name.split("-") for name in names if name not in _NAMED}
    rules = {name: {"l": int(l[1:]), "score": score, "pool": pool} for name, (pool, score, l) in pooled.items()}
    return {name: _NAMED[name] if name in _NAMED else Variant(name, rules[name]) for name in names}


SYNTHETIC = named(
    *("batchtopk", SAELENS, "top-l2-l4", "sample-l2-l16", "top-l2-l16", "sample-l2-l4", "sample-l2-l32", "top-l2-l32"),
    *("top-l2-l1", "sample-l2-l1", "sample-l2_squared-l16", "sample-uniform-l16", "top-entropy-l16"),
    *("sample-entropy-l16", "sample-l2_squared-l4", "top-entropy-l4", "topk", "matryoshka"),
)
# what is told apart on real activations: rules, sizes of a batch, ways to keep features alive, time
REAL = named(
    *(DENSE, "batchtopk", "top-l2-l4", "sample-l2-l64", "top-l2-l16", "topk", "sample-l2-l16", "top-l2-l64"),
    # of 96, three quarters of the dictionary, where F/k is 128
    *("matryoshka", "top-l2-l1", "sample-l2-l96", "sample-l2-l4", "top-entropy-l16", "sample-l2_squared-l64"),
    *("sample-uniform-l64", "sample-entropy-l64", "top-entropy-l64", "sample-l2-l1", "top-l2-l2", "sample-l2-l2"),
    "top-entropy-l4",
    # with the top of the scores, l2 and l2_squared are one rule, and uniform none
    *(f"sample-{score}-l{l}" for l in (16, 4) for score in ("l2_squared", "uniform", "entropy")),
    *(f"top-entropy-l{l}" for l in (1, 2)),
    *(f"sample-{score}-l{l}" for l in (1, 2) for score in ("l2_squared", "uniform", "entropy")),
)
# the rules beside which a part's own are read
BATCH_RULES = tuple(REAL[name] for name in ("batchtopk", "top-l2-l4", "top-l2-l16", "sample-l2-l64"))
DEAD_RULES = tuple(REAL[name] for name in ("batchtopk", "top-l2-l16"))


def altered(variant: Variant, how: str, **settings: Any) -> Variant:
    """What a part makes of a rule."""
    return replace(variant, name=f"{variant.name}-{how}", of=variant.name, **settings)


_BATCH = [altered(rule, f"b{n}", batch_size=n) for n in (256, 4096, 8192, 512, 2048) for rule in BATCH_RULES]
_DEAD = [
    altered(variant, name, rule={**variant.rule, **rule}, **other)
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
]
# more tokens than the faster steps of a pool, or RowAdam's faster modes, have ever bought
LONGER = 2.5
TIME_RULES = BATCH_RULES[:3]
_TIME = [altered(variant, "longer", longer=LONGER) for variant in TIME_RULES]
# whether what a start gains in a short training is still there after a longer one
_TIME += [altered(variant, "tokens-longer", longer=LONGER, rows="tokens") for variant in DEAD_RULES]
BATCHES, DEAD, TIME = ({variant.name: variant for variant in of} for of in (_BATCH, _DEAD, _TIME))
PARTS = {"rules": REAL, "batches": BATCHES, "dead": DEAD, "time": TIME}
