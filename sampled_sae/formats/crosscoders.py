"""dictionary_learning's crosscoders, BatchTopKCrossCoder and CrossCoder, in the files of its SAEs.

Both encode x as it is, without b_dec. The first keeps f where f times a `code_normalization`, made of the decoder's
norms, is above the threshold. Ours have norms that add up to 1: CROSSCODER, their sum over the layers, changes nothing.
NONE stands for 1.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..support.atomic_files import field
from .layers import divided_by, norm_sums
from .origin import Origin
from .portable import ROUNDING, PortableSAE, Say, silent
from .tensor_checks import check_tensors, narrowed

BATCH_TOPK, RELU = "BatchTopKCrossCoder", "CrossCoder"
CLASSES = (BATCH_TOPK, RELU)
NORMALIZATIONS = {1: "CROSSCODER", 2: "SAE", 3: "MIXED", 4: "NONE", 5: "DECOUPLED"}
# of their normalizer of activations; NaN, and 1, where there is none
NORMALIZER = ("activation_mean", "activation_std", "activation_global_scale", "target_rms")
EPS = 1e-8


def pack(sae: PortableSAE, origin: Origin, unset: float, say: Say = silent) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(state dict, what config.json says of the trainer) of a crosscoder that reads activations as they are.

    Raises:
        ValueError: k is a fraction; the k largest of each token, which no class of theirs keeps.
    """
    if sae.rule == "topk":
        raise ValueError("inference='topk': dictionary_learning's crosscoders encode by a threshold; choose that")
    k = sae.whole_k("dictionary_learning")
    layers, d_in, d_sae = sae.layers, sae.d_in // sae.layers, sae.d_sae
    name = "CROSSCODER" if _is_one(norm_sums(sae), sae.dtype) else "NONE"
    if name == "NONE":
        say("code_normalization=NONE: the decoder's norms are not those by which features are selected")
    state = {
        "encoder.weight": sae.W_enc.reshape(layers, d_in, d_sae).contiguous(),
        "encoder.bias": sae.b_enc.contiguous(),
        "decoder.weight": sae.W_dec.reshape(d_sae, layers, d_in).transpose(0, 1).contiguous(),
        "decoder.bias": sae.b_dec.reshape(layers, d_in).contiguous(),
        "k": torch.tensor(k, dtype=torch.int32),
        "threshold": torch.tensor(unset) if sae.threshold is None else narrowed(sae.threshold, torch.float32),
        "code_normalization_id": torch.tensor(next(i for i, each in NORMALIZATIONS.items() if each == name)),
        "activation_mean": torch.full((layers, d_in), torch.nan),
        "activation_std": torch.full((layers, d_in), torch.nan),
        "activation_global_scale": torch.tensor(1.0),
        "target_rms": torch.tensor(1.0),
    }
    trainer = trainer_of("BatchTopKCrossCoderTrainer", BATCH_TOPK, d_in, sae, k, origin)
    return state, {**trainer, "num_layers": layers, "code_normalization": name}


def trainer_of(
    trainer_class: str, dict_class: str, activation_dim: int, sae: PortableSAE, k: int, origin: Origin
) -> dict[str, Any]:
    """What config.json says of every trainer."""
    return {
        "trainer_class": trainer_class,
        "dict_class": dict_class,
        "activation_dim": activation_dim,
        "dict_size": sae.d_sae,
        "k": k,
        "layer": origin.layer,
        "lm_name": origin.model_name,
        "submodule_name": origin.hook,
    }


def unpack(
    tensors: dict[str, Tensor], trainer: dict[str, Any], weights: Path, cfg: Path, say: Say = silent
) -> PortableSAE:
    """The crosscoder of a state dict and config.json's `trainer`, without what was recorded of a training.

    Raises:
        ValueError: wrong tensors, a normalization that depends on more than the weights; naming the file.
    """
    shape = tuple(tensors["encoder.weight"].shape) if "encoder.weight" in tensors else ()
    if len(shape) != 3:
        raise ValueError(f"{weights}: encoder.weight is {shape}, must be (layers, activation_dim, dict_size)")
    layers, d_in, d_sae = shape
    for name, found in (("activation_dim", d_in), ("dict_size", d_sae)):
        if field(cfg, trainer, name, int, 1) != found:
            raise ValueError(f"{cfg}: trainer.{name}={trainer[name]}, but {weights.name} has {found}")
    shapes: dict[str, tuple[int, ...]] = {"encoder.weight": shape, "encoder.bias": (d_sae,)}
    shapes |= {"decoder.weight": (layers, d_sae, d_in), "decoder.bias": (layers, d_in)}
    of_batch = trainer["dict_class"] == BATCH_TOPK
    shapes |= {"threshold": ()} if of_batch else {}
    apart = (*NORMALIZER, "code_normalization_id", "k")
    check_tensors(weights, {name: t for name, t in tensors.items() if name not in apart}, shapes)
    threshold = tensors["threshold"] if of_batch else torch.zeros(())
    sae = PortableSAE(
        W_enc=tensors["encoder.weight"].reshape(layers * d_in, d_sae),
        b_enc=tensors["encoder.bias"],
        W_dec=tensors["decoder.weight"].transpose(0, 1).reshape(d_sae, layers * d_in),
        b_dec=tensors["decoder.bias"].reshape(layers * d_in),
        rule="threshold",
        k=field(cfg, trainer, "k") if of_batch else None,
        threshold=None if float(threshold) < 0 else threshold,
        apply_b_dec_to_input=False,
        layers=layers,
    )
    sae = sae.of_one_dtype(weights)
    sae = _selected_as(sae, _normalization(weights, tensors, say), weights, say) if of_batch else sae
    return _normalized(sae, weights, tensors, say)


def _normalization(weights: Path, tensors: dict[str, Tensor], say: Say) -> str:
    if "code_normalization_id" not in tensors:
        say("the file names no code_normalization: CROSSCODER, as dictionary_learning takes it then")
        return "CROSSCODER"
    found: Any = tensors["code_normalization_id"].tolist()
    if found not in NORMALIZATIONS:
        raise ValueError(
            f"{weights}: code_normalization_id={found!r}: must be one of {', '.join(map(str, NORMALIZATIONS))}"
        )
    return NORMALIZATIONS[found]


def _selected_as(sae: PortableSAE, normalization: str, weights: Path, say: Say) -> PortableSAE:
    """The same function, with features selected by their activations alone."""
    if normalization == "NONE":
        return sae
    if normalization not in ("CROSSCODER", "SAE"):
        raise ValueError(
            f"{weights}: code_normalization={normalization}: this package reads CROSSCODER, SAE and NONE, one number a "
            "feature that follows from the weights"
        )
    norms = norm_sums(sae) if normalization == "CROSSCODER" else sae.W_dec.double().norm(dim=1)
    if _is_one(norms, sae.dtype):
        return sae
    if not bool((norms > 0).all()):
        raise ValueError(f"{weights}: decoder.weight has no row in any layer for {int((norms == 0).sum())} features")
    say(f"decoder norms are folded into the encoder: features are selected by activations times them ({normalization})")
    return divided_by(sae, norms)


def _normalized(sae: PortableSAE, weights: Path, tensors: dict[str, Tensor], say: Say) -> PortableSAE:
    """With their normalizer in the biases and `input_scale`: it subtracts a mean and multiplies by one factor."""
    mean, std = (tensors.get(name) for name in NORMALIZER[:2])
    if mean is None or std is None or bool(mean.isnan().any()) or bool(std.isnan().any()):
        return sae
    factor = tensors.get("activation_global_scale")
    if mean.numel() != len(sae.b_dec) or factor is None or factor.numel() != 1 or not float(factor) > 0:
        found = None if factor is None else factor.tolist()
        raise ValueError(
            f"{weights}: activation_mean is {tuple(mean.shape)} and activation_global_scale={found}; must be "
            f"{(sae.layers, sae.d_in // sae.layers)} and a number > 0"
        )
    say("the normalizer of activations is folded into biases and input_scale")
    shift = mean.double().flatten() * float(factor)
    b_enc = (sae.b_enc.double() - shift @ sae.W_enc.double()).to(sae.dtype)
    b_dec = (sae.b_dec.double() * (float(factor) / (float(factor) + EPS)) + shift).to(sae.dtype)
    W_dec = (sae.W_dec.double() * (float(factor) / (float(factor) + EPS))).to(sae.dtype)
    return replace(sae, b_enc=b_enc, b_dec=b_dec, W_dec=W_dec, input_scale=float(factor))


def _is_one(norms: Tensor, dtype: torch.dtype) -> bool:
    """Whether norms are 1 up to the rounding of weights of this dtype."""
    return bool(((norms - 1).abs() <= ROUNDING * torch.finfo(dtype).eps).all())
