"""dictionary_learning's files: `ae.pt` and `config.json` of BatchTopKSAE, MatryoshkaBatchTopKSAE and AutoEncoderTopK;
those of its crosscoders are in crosscoders.py.

All carry k and a threshold. The first two encode by the threshold; AutoEncoderTopK keeps k features a token, and
encodes by the threshold with `encode(x, use_threshold=True)`. All three subtract b_dec from the input.
"""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..pretrained import PEER_FILES
from ..support.atomic_files import field, read_json, write_atomically, write_json
from . import crosscoders
from .origin import Origin, training_fields
from .portable import PortableSAE, Say, silent
from .tensor_checks import check_tensors, narrowed

NAME = "dictionary_learning"
WEIGHTS, CONFIG = PEER_FILES[NAME]
CENTRES_ALWAYS = True
NESTED = "MatryoshkaBatchTopKSAE"
RULE_OF_CLASS = {"BatchTopKSAE": "threshold", "AutoEncoderTopK": "topk", NESTED: "threshold"}
CLASSES = (*RULE_OF_CLASS, *crosscoders.CLASSES)
TRAINER_OF_CLASS = {
    "BatchTopKSAE": "BatchTopKTrainer",
    "AutoEncoderTopK": "TopKTrainer",
    NESTED: "MatryoshkaBatchTopKTrainer",
}
# Their threshold before it is first set.
UNSET = -1.0
# In config.json: what their trainers' own arguments cannot say. SampledTrainer writes it too, beside theirs.
TRAINING = "sampled_sae"
THEIR_NAMES = {"aux_coefficient": "auxk_alpha", "threshold_decay": "threshold_beta", "seed": "seed"}


def pack(sae: PortableSAE, origin: Origin, say: Say = silent) -> tuple[dict[str, Tensor], Any]:
    """(state dict, config.json) for an SAE that centres its input, or a crosscoder that does not.

    Raises:
        ValueError: k is a fraction; a crosscoder of the rule "topk".
    """
    if sae.layers > 1:
        state, described = crosscoders.pack(sae, origin, UNSET, say)
        buffer = {"d_submodule": sae.d_in // sae.layers, "ctx_len": origin.context_size}
        return state, {"trainer": {**described, TRAINING: sae.training}, "buffer": buffer}
    k = sae.whole_k("dictionary_learning")
    threshold = torch.tensor(UNSET) if sae.threshold is None else narrowed(sae.threshold, torch.float32)
    if sae.dtype != torch.float32:
        say(f"dictionary_learning computes in float32; the file keeps {sae.dtype}")
    state = {
        "k": torch.tensor(k, dtype=torch.int32),
        "threshold": threshold,
        "b_dec": sae.b_dec.contiguous(),
    }
    groups = (sae.training or {}).get("groups") if sae.rule == "threshold" else None
    dict_class = next(name for name, rule in RULE_OF_CLASS.items() if rule == sae.rule)
    trainer: dict[str, Any] = {}
    if groups is None:
        state["decoder.weight"] = sae.W_dec.t().contiguous()
        state["encoder.weight"] = sae.W_enc.t().contiguous()
        state["encoder.bias"] = sae.b_enc.contiguous()
    else:
        dict_class = NESTED
        sizes = torch.tensor(groups).diff(prepend=torch.tensor([0]))
        state |= {"W_enc": sae.W_enc.contiguous(), "b_enc": sae.b_enc.contiguous(), "W_dec": sae.W_dec.contiguous()}
        state["group_sizes"] = sizes
        trainer["group_sizes"] = sizes.tolist()
    trainer |= crosscoders.trainer_of(TRAINER_OF_CLASS[dict_class], dict_class, sae.d_in, sae, k, origin)
    trainer[TRAINING] = sae.training
    return state, {"trainer": trainer, "buffer": {"d_submodule": sae.d_in, "ctx_len": origin.context_size}}


def write(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    """Both files, each to a temporary name that is then renamed."""

    def save(path: Path) -> None:
        # given a path, torch.save would write the temporary file's name into the archive
        with open(path, "wb") as file:
            torch.save(tensors, file)

    write_atomically(folder / WEIGHTS, save)
    write_json(folder / CONFIG, config)


def read(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(state dict, config.json) as they are."""
    return read_state(folder / WEIGHTS), read_json(folder / CONFIG)


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of an `ae.pt` as they are.

    Raises:
        ValueError: naming the file, when it is missing, truncated or foreign.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        # torch's own words say how to load it all the same
        raise ValueError(f"{path}: truncated or not a state dict: nothing is ever unpickled but tensors") from None
    except Exception as error:
        raise ValueError(f"{path}: truncated or not a state dict ({type(error).__name__}: {error})") from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path}: must hold a state dict of tensors")
    return dict(state)


def check_state(path: Path, state: dict[str, Tensor], d_in: int, d_sae: int) -> None:
    """The tensors of either class, of these sizes. Some versions have written no threshold, or no k.

    Raises:
        ValueError: naming the file and the tensor.
    """
    shapes: dict[str, tuple[int, ...]] = {
        "encoder.weight": (d_sae, d_in),
        "encoder.bias": (d_sae,),
        "decoder.weight": (d_in, d_sae),
        "b_dec": (d_in,),
    }
    if "threshold" in state:
        shapes["threshold"] = ()
    check_tensors(path, {name: t for name, t in state.items() if name != "k"}, shapes)


def origin(config: dict[str, Any]) -> Origin:
    """What config.json says of it."""
    trainer, buffer = (config[name] if isinstance(config.get(name), dict) else {} for name in ("trainer", "buffer"))
    return Origin(trainer.get("lm_name"), trainer.get("layer"), trainer.get("submodule_name"), buffer.get("ctx_len"))


def unpack(tensors: dict[str, Tensor], config: dict[str, Any], folder: Path, say: Say = silent) -> PortableSAE:
    """The SAE of a state dict and config.json; `folder` is named in errors.

    Raises:
        ValueError: another class of dictionary, wrong tensors, two values of k.
    """
    weights, cfg = folder / WEIGHTS, folder / CONFIG
    trainer = field(cfg, config, "trainer", dict)
    dict_class = trainer.get("dict_class")
    if dict_class not in CLASSES:
        raise ValueError(f"{cfg}: trainer.dict_class={dict_class!r}: this package reads {', '.join(CLASSES)}")
    k = field(cfg, trainer, "k") if dict_class != crosscoders.RELU else None
    if "k" in tensors and tensors["k"].tolist() != k:
        raise ValueError(f"{cfg}: trainer.k={k}, but {WEIGHTS} has k={tensors['k'].tolist()}")
    training = _training(cfg, trainer)
    if dict_class in crosscoders.CLASSES:
        return replace(crosscoders.unpack(tensors, trainer, weights, cfg, say), training=training)
    d_in, d_sae = field(cfg, trainer, "activation_dim"), field(cfg, trainer, "dict_size")
    if dict_class == NESTED:
        training = {**(training or {}), "groups": groups_of(weights, tensors, d_sae)}
        tensors = as_linear(weights, tensors, d_in, d_sae)
    check_state(weights, tensors, d_in, d_sae)
    threshold = tensors.get("threshold")
    if threshold is not None and float(threshold) < 0:
        threshold = None
    sae = PortableSAE(
        W_enc=tensors["encoder.weight"].t(),
        b_enc=tensors["encoder.bias"],
        W_dec=tensors["decoder.weight"].t().contiguous(),
        b_dec=tensors["b_dec"],
        rule=RULE_OF_CLASS[dict_class],
        k=k,
        threshold=threshold,
        training=training,
    )
    return sae.of_one_dtype(weights)


def groups_of(weights: Path, tensors: dict[str, Tensor], d_sae: int) -> list[int]:
    """Where the groups of a Matryoshka SAE end.

    Raises:
        ValueError: sizes that are none, or do not add up to d_sae.
    """
    sizes = tensors.get("group_sizes")
    found = [] if sizes is None or sizes.dim() != 1 else sizes.tolist()
    if not found or not all(isinstance(size, int) and size > 0 for size in found) or sum(found) != d_sae:
        raise ValueError(f"{weights}: group_sizes={found!r}: must be whole numbers > 0 that add up to {d_sae}")
    return torch.tensor(found).cumsum(0).tolist()


def as_linear(weights: Path, tensors: dict[str, Tensor], d_in: int, d_sae: int) -> dict[str, Tensor]:
    """The state of a Matryoshka SAE under the names of the other classes."""
    held = {name: t for name, t in tensors.items() if name not in ("k", "group_sizes")}
    shapes = {"W_enc": (d_in, d_sae), "b_enc": (d_sae,), "W_dec": (d_sae, d_in), "b_dec": (d_in,), "threshold": ()}
    check_tensors(weights, held, shapes)
    return {
        "encoder.weight": held["W_enc"].t(),
        "encoder.bias": held["b_enc"],
        "decoder.weight": held["W_dec"].t(),
        **{name: held[name] for name in ("b_dec", "threshold")},
    }


def _training(cfg: Path, trainer: dict[str, Any]) -> dict[str, Any] | None:
    """None for a trainer of theirs, whose rule is the whole dictionary."""
    if trainer.get(TRAINING) is None:
        return None
    theirs = {ours: trainer[name] for ours, name in THEIR_NAMES.items() if trainer.get(name) is not None}
    return training_fields(cfg, {**theirs, **field(cfg, trainer, TRAINING, dict)})
