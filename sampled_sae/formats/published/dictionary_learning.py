"""dictionary_learning's files for inference: `ae.pt` and `config.json` of every class that its loader knows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...pretrained import layer_of
from ...support.atomic_files import field
from .. import dictionary_learning
from ..origin import Origin
from ..portable import PortableSAE, Say
from ..tensor_checks import check_tensors
from .reading import Place, Reading, config_of, of_portable

NAME = dictionary_learning.NAME
FILES = (dictionary_learning.WEIGHTS, dictionary_learning.CONFIG)
# class: {name in the file: name here}, and whether b_dec is subtracted from the input
NAMES: dict[str, tuple[dict[str, str], bool]] = {
    "AutoEncoder": ({"encoder.bias": "b_enc", "bias": "b_dec"}, True),
    "AutoEncoderNew": ({"encoder.bias": "b_enc", "decoder.bias": "b_dec"}, False),
    "GatedAutoEncoder": (
        {"decoder_bias": "b_dec", "gate_bias": "b_gate", "mag_bias": "b_mag", "r_mag": "r_mag"},
        True,
    ),
    "JumpReluAutoEncoder": ({"b_enc": "b_enc", "b_dec": "b_dec", "threshold": "threshold"}, False),
}
RULES = {"GatedAutoEncoder": "gated", "JumpReluAutoEncoder": "jumprelu"}
CLASSES = (*dictionary_learning.CLASSES, *NAMES)


def read(place: Place, say: Say) -> Reading:
    """The dictionary in a folder.

    Raises:
        ValueError: another class, wrong tensors; naming the file.
    """
    tensors, config = dictionary_learning.read(place.path)
    cfg, weights = place.path / dictionary_learning.CONFIG, place.path / dictionary_learning.WEIGHTS
    trainer = field(cfg, config, "trainer", dict)
    of = trainer.get("dict_class")
    origin = dictionary_learning.origin(config).checked(cfg)
    origin = Origin(layer=layer_of(origin.hook_name)).filled_by(origin) if origin.layer is None else origin
    if of in dictionary_learning.CLASSES:
        return of_portable(dictionary_learning.unpack(tensors, config, place.path, say), str(of), origin, say)
    if of not in NAMES:
        raise ValueError(f"{cfg}: trainer.dict_class={of!r}: this package reads {', '.join(CLASSES)}")
    d_in, d_sae = field(cfg, trainer, "activation_dim", int, 1), field(cfg, trainer, "dict_size", int, 1)
    names, centres = NAMES[str(of)]
    check_tensors(weights, tensors, _shapes(tensors, names, d_in, d_sae), infinite=("threshold",))
    found: dict[str, Any] = {**_matrices(tensors), **{ours: tensors[theirs] for theirs, ours in names.items()}}
    if of == "AutoEncoder":
        sae = PortableSAE(**found, rule="threshold", k=None, threshold=torch.zeros(()), apply_b_dec_to_input=True)
        sae = sae.of_one_dtype(weights).with_unit_rows(say, "dictionary_learning's loader does it too")
        found = {name: getattr(sae, name) for name in found}
    made = config_of(cfg, d_in=d_in, d_sae=d_sae, rule=RULES.get(str(of), "relu"), apply_b_dec_to_input=centres)
    return Reading(str(of), made, found, origin)


def _shapes(tensors: dict[str, Tensor], names: dict[str, str], d_in: int, d_sae: int) -> dict[str, tuple[int, ...]]:
    sizes = {theirs: (d_in,) if ours == "b_dec" else (d_sae,) for theirs, ours in names.items()}
    if "W_enc" in tensors:
        return {**sizes, "W_enc": (d_in, d_sae), "W_dec": (d_sae, d_in)}
    return {**sizes, "encoder.weight": (d_sae, d_in), "decoder.weight": (d_in, d_sae)}


def _matrices(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """W_enc [d_in, F] and W_dec [F, d_in], under either pair of names."""
    if "W_enc" in tensors:
        return {name: tensors[name] for name in ("W_enc", "W_dec")}
    return {"W_enc": tensors["encoder.weight"].t(), "W_dec": tensors["decoder.weight"].t()}
