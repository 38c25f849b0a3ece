"""What a peer's files may say besides weights and rule: what the SAE reads, and how it was trained."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..config import SampledSAEConfig

# Of the weights, of the file's own rule, or of the machine it was trained on.
NOT_OF_THE_TRAINING = ("d_in", "d_sae", "k", "apply_b_dec_to_input", "impl")
TRAINING_FIELDS = tuple(f.name for f in fields(SampledSAEConfig) if f.name not in NOT_OF_THE_TRAINING)


@dataclass(frozen=True)
class Origin:
    """What the SAE reads, as far as it is known: the peers' files have places for it.

    Args:
        model_name: of the language model.
        layer: block whose output is read, from 0.
        hook_name: in TransformerLens' words; that of the residual stream after `layer` when absent.
        context_size: tokens a row of the texts.
    """

    model_name: str | None = None
    layer: int | None = None
    hook_name: str | None = None
    context_size: int | None = None

    @property
    def hook(self) -> str | None:
        """hook_name with its default filled in."""
        if self.hook_name is not None or self.layer is None:
            return self.hook_name
        return f"blocks.{self.layer}.hook_resid_post"

    def filled_by(self, other: Origin) -> Origin:
        """What is not known here is the other's."""
        own, others = vars(self), vars(other)
        return Origin(**{name: others[name] if value is None else value for name, value in own.items()})


def training_fields(path: Path, values: dict[str, Any]) -> dict[str, Any]:
    """Those of `values` that are a SampledSAEConfig's and outlive the training; others are not looked at.

    Raises:
        ValueError: a value that a SampledSAEConfig does not take, naming the file.
    """
    found = {name: values[name] for name in TRAINING_FIELDS if name in values}
    try:
        SampledSAEConfig(d_in=1, d_sae=1, k=1, **found)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: recorded training: {error}") from None
    return found
