"""`Reading`: an SAE as a file has it, on its way to an `InferenceSAE`."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...inference.config import InferenceConfig
from ...inference.tensors import WEIGHTS
from ...support.argument_checks import FLOATS
from ..origin import Origin
from ..portable import PortableSAE, Say
from ..tensor_checks import narrowed


@dataclass(frozen=True)
class Place:
    """Where an SAE was found.

    Attributes:
        path: the folder with its files, or the one file that holds it.
        name: the same as the user named it, with the repository's name for what came from a hub: model and layer
            stand there where no file says them.
        k: active features a token, for layouts whose files do not say it.
    """

    path: Path
    name: str
    k: int | None = None

    @property
    def tail(self) -> str:
        """The end of the name: what a repository and its folders are called, not where a user keeps them."""
        return "/".join(self.name.rstrip("/").split("/")[-5:])

    def number(self, pattern: str) -> int | None:
        """The last whole number behind `pattern` in the name, as 12 in "layer_12"."""
        found = re.findall(pattern + r"(\d+)", self.tail)
        return int(found[-1]) if found else None


@dataclass(frozen=True)
class Reading:
    """What `InferenceSAE(config, tensors)` takes, and what else the files say.

    Attributes:
        architecture: in the words of the layout.
        config, tensors: W_enc [d_in, F], b_enc [F], W_dec [F, d_out], b_dec [d_out] and those of the rule.
        origin: model, layer and hook of the activations, as far as they are known.
    """

    architecture: str
    config: InferenceConfig
    tensors: dict[str, Tensor]
    origin: Origin

    def in_one_dtype(self, dtype: torch.dtype | None, say: Say) -> Reading:
        """With all weights in `dtype`, by default in the widest that they have; nothing in 64 bits is narrowed then.

        Biases and thresholds stay as they are: rounded, others would be active.
        """
        weights = {name: t for name, t in self.tensors.items() if name in WEIGHTS}
        if dtype is None:
            found = {t.dtype for t in self.tensors.values() if t.dtype == torch.float64}
            (dtype, *others) = sorted(found | {t.dtype for t in weights.values()}, key=FLOATS.index)
            for other in others:
                dtype = torch.promote_types(dtype, other)
            if others:
                say(f"tensors of several dtypes are taken in {dtype}, which loses nothing")
        return replace(self, tensors={**self.tensors, **{name: t.to(dtype) for name, t in weights.items()}})


def config_of(path: Path, **fields: Any) -> InferenceConfig:
    """A config from what a file says.

    Raises:
        ValueError: that does not go together; naming the file.
    """
    try:
        return InferenceConfig(**fields)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


def in_dtype_of_weights(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Biases and thresholds, which are kept in at least float32, as narrow as W_dec where that loses nothing."""
    dtype = tensors["W_dec"].dtype
    return {name: t if t.dtype == dtype else narrowed(t, dtype) for name, t in tensors.items()}


def of_portable(sae: PortableSAE, architecture: str, origin: Origin, say: Say) -> Reading:
    """Of an SAE whose threshold is one for all, or that keeps k features a token; a crosscoder, which has one scale for
    all of its layers, as an SAE of their widths together."""
    assert not isinstance(sae.input_scale, tuple)
    tensors = {name: getattr(sae, name) for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    rule: dict[str, Any] = {"rule": "topk", "k": sae.whole_k(architecture)} if sae.rule == "topk" else {}
    if sae.rule == "threshold":
        if sae.threshold is None:
            say("the threshold was never set: every positive activation is active")
        threshold = torch.zeros(()) if sae.threshold is None else sae.threshold
        rule = {"rule": "jumprelu" if threshold.dim() else "threshold"}
        tensors["threshold"] = threshold
    config = InferenceConfig(
        d_in=sae.d_in,
        d_sae=sae.d_sae,
        apply_b_dec_to_input=sae.apply_b_dec_to_input,
        input_scale=sae.input_scale,
        d_out=sae.d_out if sae.transcodes else None,
        skip=sae.W_skip is not None,
        output_scale=sae.output_scale,
        **rule,
    )
    if sae.W_skip is not None:
        tensors["W_skip"] = sae.W_skip.t()
    return Reading(architecture, config, tensors, origin)


def in_one_line(layout: str, reading: Reading, place: Place) -> str:
    """Architecture, sizes, model, layer and scale, for people."""
    config, origin = reading.config, reading.origin
    sizes = f"d_in={config.d_in}, d_sae={config.d_sae}"
    if config.d_out not in (None, config.d_in):
        sizes += f", d_out={config.d_out}"
    rule = f"k={config.k}" if config.k is not None else config.rule
    dtype = str(reading.tensors["W_dec"].dtype).removeprefix("torch.")
    where = ", ".join(
        f"{word} {'not said' if value is None else value}"
        for word, value in (("model", origin.model_name), ("layer", origin.layer))
    )
    if origin.hook_name is not None:
        where += f" ({origin.hook_name})"
    scaled = "" if config.normalize == "none" else f", {config.normalize} of each token"
    return (
        f"{place.name}: {reading.architecture} of {layout}, {sizes}, {rule}, {dtype}; {where}; activations times "
        f"{config.input_scale:g}{scaled}"
    )
