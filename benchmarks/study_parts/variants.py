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


_ALL = (
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
VARIANTS = {variant.name: variant for variant in _ALL}
