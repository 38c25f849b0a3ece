"""What the study compares: every SAE by a name, most telling first."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

SAELENS = "saelens-batchtopk"


@dataclass(frozen=True)
class Variant:
    """One SAE of the study.

    Attributes:
        name: of its rows and its folders.
        rule: fields of its SampledSAEConfig: l, score, pool, select.
    """

    name: str
    rule: dict[str, Any] = field(default_factory=dict)


def pooled(pool: str, score: str, l: float) -> Variant:
    return Variant(f"{pool}-{score}-l{l:g}", {"l": l, "score": score, "pool": pool})


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
)
# with the top of the scores, l2 and l2_squared are one rule, and uniform none
_REAL = (
    Variant("batchtopk", {"l": None}),
    Variant("topk", {"l": None, "select": "token"}),
    *(pooled(pool, "l2", l) for l in (4, 16, 64, 1, 2) for pool in ("top", "sample")),
    *(pooled(pool, "entropy", l) for l in (4, 16, 64, 1, 2) for pool in ("top", "sample")),
    *(pooled("sample", score, l) for l in (4, 16, 64, 1, 2) for score in ("l2_squared", "uniform")),
)
SYNTHETIC = {variant.name: variant for variant in _SYNTHETIC}
REAL = {variant.name: variant for variant in _REAL}
