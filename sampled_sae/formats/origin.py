"""What a peer's files may say besides weights and rule: which activations the SAE reads, how it was trained."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from types import NoneType
from typing import Any

from ..config import SHAPE, SampledSAEConfig
from ..support.argument_checks import plain_number
from ..support.atomic_files import field

# These come from the weights, from the file's own rule, or from the machine; scale and set are folded into the weights.
OF_THE_FILE = (*SHAPE, "k", "apply_b_dec_to_input", "input_scale", "output_scale", "inference", "inference_pool")
NOT_OF_THE_TRAINING = (*OF_THE_FILE, "impl")
TRAINING_FIELDS = tuple(f.name for f in fields(SampledSAEConfig) if f.name not in NOT_OF_THE_TRAINING)


@dataclass(frozen=True)
class Origin:
    """Which activations the SAE reads, as far as it is known; recorded where a peer's files have a place for it.

    Args:
        model_name: name of the language model.
        layer: index of the block whose output is read, from 0.
        hook_name: TransformerLens' name of the place; when absent, that of the residual stream after `layer`.
        context_size: tokens a row of the texts.
    """

    model_name: str | None = None
    layer: int | None = None
    hook_name: str | None = None
    context_size: int | None = None

    def __post_init__(self) -> None:
        for name in ("layer", "context_size"):
            number = plain_number(getattr(self, name))
            if number is not None and number == int(number):
                object.__setattr__(self, name, int(number))

    @property
    def hook(self) -> str | None:
        """hook_name with its default filled in."""
        if self.hook_name is not None or self.layer is None:
            return self.hook_name
        return f"blocks.{self.layer}.hook_resid_post"

    def checked(self, path: Path) -> Origin:
        """This origin, read from a file.

        Raises:
            ValueError: a field of another type, naming the file.
        """
        for name, kind in (("model_name", str), ("layer", int), ("hook_name", str), ("context_size", int)):
            field(path, vars(self), name, (kind, NoneType))
        return self

    def filled_by(self, other: Origin) -> Origin:
        """This origin, with what it lacks taken from the other."""
        own, others = vars(self), vars(other)
        return Origin(**{name: others[name] if value is None else value for name, value in own.items()})


def training_fields(path: Path, values: dict[str, Any]) -> dict[str, Any]:
    """The entries of `values` that are fields of SampledSAEConfig and describe the training; others are ignored.

    Raises:
        ValueError: a value that a SampledSAEConfig does not take, naming the file.
    """
    found = {name: values[name] for name in TRAINING_FIELDS if name in values}
    try:
        d_sae = max(found["groups"]) if found.get("groups") else 1  # the last of them, which the weights confirm
        SampledSAEConfig(d_in=1, d_sae=d_sae, k=1, **found)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: recorded training: {error}") from None
    return found
