"""sparsify's files: `sae.safetensors` and `cfg.json`, k features a token; SAEs, transcoders and skip transcoders.

A folder of several SAEs there has one such folder a hook, named after it (`layers.5`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..pretrained import PEER_FILES
from ..support.atomic_files import field, read_json, read_tensors, write_atomically, write_json
from .origin import Origin
from .portable import PortableSAE, Say, silent
from .tensor_checks import check_tensors

NAME = "sparsify"
WEIGHTS, CONFIG = PEER_FILES[NAME]
CENTRES_ALWAYS = True
# value that changes what is computed: what it is there
FOREIGN = {"signed": "selection by absolute value"}
UNIT = 1e-2


def pack(sae: PortableSAE, origin: Origin, say: Say = silent) -> tuple[dict[str, Tensor], Any]:
    """(tensors, cfg.json) for an SAE that centres its input, or a transcoder, that keeps k features a token.

    Raises:
        ValueError: the rule is "threshold", or k a fraction; a transcoder of another width than it reads.
    """
    if sae.d_out != sae.d_in:
        raise ValueError(f"d_out={sae.d_out}: sparsify has transcoders of d_out = d_in={sae.d_in} only")
    if sae.rule != "topk":
        raise ValueError(
            "inference='threshold': sparsify keeps the k largest activations of each token and has no threshold; "
            "inference='topk' (--inference topk) exports the SAE for that rule"
        )
    norms = torch.linalg.vector_norm(sae.W_dec.double(), dim=1)
    weights = sae.weights if sae.W_skip is None else {**sae.weights, "W_skip": sae.W_skip.t()}
    # who trains it on there normalises the rows after each step if this says so
    unit_rows = bool(((norms - 1).abs() < UNIT).all())
    return packed(weights, sae.whole_k("sparsify"), sae.transcodes, unit_rows)


def packed(
    weights: dict[str, Tensor], k: int, transcodes: bool, normalize_decoder: bool
) -> tuple[dict[str, Tensor], Any]:
    """(tensors, cfg.json) of W_enc [d_in, F], b_enc, W_dec [F, d_in], b_dec, and a W_skip as it has it."""
    names = {"b_enc": "encoder.bias", "W_enc": "encoder.weight"}
    tensors = {names.get(name, name): (t.t() if name == "W_enc" else t).contiguous() for name, t in weights.items()}
    d_sae, d_in = weights["W_dec"].shape
    config = {
        "activation": "topk",
        "expansion_factor": max(1, d_sae // d_in),
        "normalize_decoder": normalize_decoder,
        "num_latents": d_sae,
        "k": k,
        "multi_topk": False,
        "skip_connection": "W_skip" in weights,
        "transcode": transcodes,
        "d_in": d_in,
    }
    return tensors, config


def write(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    """Both files, each to a temporary name that is then renamed."""
    write_atomically(folder / WEIGHTS, lambda path: save_file(tensors, path, {"format": "pt"}))
    write_json(folder / CONFIG, config)


def read(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, cfg.json) as they are."""
    return read_tensors(folder / WEIGHTS), read_json(folder / CONFIG)


def origin(config: dict[str, Any]) -> Origin:
    """cfg.json has no place for it."""
    return Origin()


def unpack(tensors: dict[str, Tensor], config: dict[str, Any], folder: Path, say: Say = silent) -> PortableSAE:
    """The SAE of sparsify's tensors and cfg.json; `folder` is named in errors.

    Raises:
        ValueError: a skip connection of an SAE, another activation than "topk", wrong tensors.
    """
    transcodes, skip = flags(folder / CONFIG, config)
    if skip and not transcodes:
        raise ValueError(f"{folder / CONFIG}: skip_connection=True: a linear skip of an SAE has no place here")
    check_weights(tensors, config, folder)
    sae = PortableSAE(
        W_enc=tensors["encoder.weight"].t(),
        b_enc=tensors["encoder.bias"],
        W_dec=tensors["W_dec"],
        b_dec=tensors["b_dec"],
        rule="topk",
        k=field(folder / CONFIG, config, "k"),
        threshold=None,
        apply_b_dec_to_input=not transcodes,
        transcodes=transcodes,
        W_skip=tensors["W_skip"].t() if skip else None,
    )
    return sae.of_one_dtype(folder / WEIGHTS)


def flags(cfg: Path, config: dict[str, Any]) -> tuple[bool, bool]:
    """(whether it is a transcoder, whether it has a skip), False where cfg.json does not say it.

    Raises:
        ValueError: neither true nor false.
    """
    known = {"transcode": False, "skip_connection": False, **config}
    return field(cfg, known, "transcode", bool), field(cfg, known, "skip_connection", bool)


def check_weights(tensors: dict[str, Tensor], config: dict[str, Any], folder: Path) -> tuple[int, int]:
    """(d_in, d_sae) of tensors that are those of cfg.json.

    Raises:
        ValueError: naming the file, and what in it is FOREIGN or wrong.
    """
    cfg = folder / CONFIG
    for name, meaning in FOREIGN.items():
        if config.get(name):
            raise ValueError(f"{cfg}: {name}={config[name]!r}: {meaning} has no place here")
    activation = config.get("activation", "topk")
    if activation != "topk":
        raise ValueError(f"{cfg}: activation={activation!r}: this package reads 'topk'")
    d_in = field(cfg, config, "d_in", int, 1)
    d_sae = field(cfg, {"num_latents": 0, **config}, "num_latents") or d_in * field(cfg, config, "expansion_factor")
    shapes: dict[str, tuple[int, ...]] = {
        "encoder.weight": (d_sae, d_in),
        "encoder.bias": (d_sae,),
        "W_dec": (d_sae, d_in),
        "b_dec": (d_in,),
    }
    if config.get("skip_connection"):
        shapes["W_skip"] = (d_in, d_in)
    check_tensors(folder / WEIGHTS, tensors, shapes)
    return d_in, d_sae
