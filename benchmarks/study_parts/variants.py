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
        name: of its rows and its folders.
        rule: fields of its SampledSAEConfig: l, score, pool, select.
        nested: whether it is a Matryoshka SAE, of a sixteenth, a quarter and all of its features.
        batch_size: tokens a step. start: what b_dec begins as, the "median" of tokens, their "mean" or "zero".
        aligned: whether the inner product of encoder and decoder is kept at 1.
    """

    name: str
    rule: dict[str, Any] = field(default_factory=dict)
    nested: bool = False
    batch_size: int = 1024
    start: str = "median"
    aligned: bool = False

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
_SIZES = (256, 4096, 8192, 512, 2048)
_BATCH = tuple(
    replace(variant, name=f"{variant.name}-b{size}", batch_size=size)
    for size in _SIZES
    for variant in (_BATCHTOPK, pooled("top", "l2", 4), pooled("top", "l2", 16), pooled("sample", "l2", 64))
)
_DEAD = tuple(
    replace(variant, name=f"{variant.name}-{name}", rule={**variant.rule, **rule}, **other)
    for name, rule, other in (
        ("aligned", {}, {"aligned": True}),
        ("mean", {}, {"start": "mean"}),
        ("zero", {}, {"start": "zero"}),
        ("uncentred", {"apply_b_dec_to_input": False}, {}),
        ("no-aux", {"aux_coefficient": 0.0}, {}),
        ("aux-all", {"aux_pool": None}, {}),
        ("aux-8x", {"aux_coefficient": 0.25}, {}),
    )
    for variant in (_BATCHTOPK, pooled("top", "l2", 16))
)
SYNTHETIC = {variant.name: variant for variant in _SYNTHETIC}
# what is told apart on real activations: rules, sizes of a batch, ways to keep features alive
REAL = {variant.name: variant for variant in _REAL}
BATCHES = {variant.name: variant for variant in _BATCH}
DEAD = {variant.name: variant for variant in _DEAD}
PARTS = {"rules": REAL, "batches": BATCHES, "dead": DEAD}
