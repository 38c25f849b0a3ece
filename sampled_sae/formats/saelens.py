"""SAELens' files: `sae_weights.safetensors` and `cfg.json` of the architectures jumprelu, topk and batchtopk.

A SAE with a threshold is a "jumprelu" there, a transcoder with one a "jumprelu_transcoder" or, with a skip, a
"jumprelu_skip_transcoder", an SAE of k features a token a "topk". "batchtopk" is what SAELens' own training checkpoints
hold; it is read, not written. So are files from before its release 6, by `saelens_before_6`.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..inference.config import InferenceConfig
from ..pretrained import PEER_FILES
from ..support.argument_checks import check_positive
from ..support.atomic_files import field, read_json, read_tensors, write_atomically, write_json
from . import saelens_before_6
from .origin import Origin, training_fields
from .portable import ROUNDING, PortableSAE, Say, silent
from .tensor_checks import check_tensors, narrowed

NAME = "saelens"
WEIGHTS, CONFIG = PEER_FILES[NAME]
CENTRES_ALWAYS = False
# Of a checkpoint from mid-training, whose factor on the activations is not yet folded into the weights.
SCALER = "activation_scaler.json"
TRANSCODERS = ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")
ARCHITECTURES = ("jumprelu", "topk", "batchtopk", "matryoshka_batchtopk", *TRANSCODERS)
# Of integrations.saelens: whose training checkpoints theirs are, tensor by tensor.
AS_TRAINED_HERE = {
    "sampled": "batchtopk",
    "sampled_topk": "topk",
    "sampled_batchtopk": "batchtopk",
    "sampled_matryoshka_batchtopk": "matryoshka_batchtopk",
}
# In the metadata: `pack`'s word, whose details are a SampledSAEConfig, and that of the architecture "sampled".
EXPORTED, TRAINED = "sampled_sae", "sampled"
# Without a version SAELens reads a cfg.json as one from before its release 6 and looks for other names.
FORMAT_VERSION = "6.54.12"


def pack(sae: PortableSAE, origin: Origin, say: Say = silent) -> tuple[dict[str, Tensor], Any]:
    """(tensors, cfg.json) for the SAE.

    Raises:
        ValueError: k is a fraction and the rule "topk"; a transcoder of that rule.
    """
    if sae.transcodes and sae.rule == "topk":
        raise ValueError(
            "inference='topk': SAELens has no transcoder that keeps k features of each token; inference='threshold' "
            "(--inference threshold) exports it for its threshold"
        )
    tensors = {
        "W_enc": sae.W_enc.contiguous(),
        "b_enc": sae.b_enc.contiguous(),
        "W_dec": sae.W_dec.contiguous(),
        "b_dec": sae.b_dec.contiguous(),
    }
    trained = {"training_architecture": EXPORTED, "training_architecture_details": sae.training}
    config = described("topk" if sae.rule == "topk" else "jumprelu", sae, sae.dtype, origin, trained)
    if sae.rule == "topk":
        config |= {"k": sae.whole_k("SAELens' topk"), "rescale_acts_by_decoder_norm": False}
        return tensors, config
    if sae.transcodes:
        skip = "" if sae.W_skip is None else "skip_"
        config |= {"architecture": f"jumprelu_{skip}transcoder", "d_out": sae.d_out}
    if sae.W_skip is not None:
        tensors["W_skip"] = sae.W_skip.t().contiguous()
    threshold = torch.zeros(()) if sae.threshold is None else sae.threshold
    threshold = narrowed(threshold, sae.dtype)
    if threshold.dtype != sae.dtype:
        say(f"SAELens rounds the threshold to {config['dtype']} unless it is told load_from_disk(..., dtype='float32')")
    tensors["threshold"] = threshold.expand(sae.d_sae).contiguous()
    return tensors, config


def described(
    architecture: str, sae: PortableSAE | InferenceConfig, dtype: torch.dtype, origin: Origin, trained: dict[str, Any]
) -> dict[str, Any]:
    """cfg.json of an SAE whose activations are taken as they are; `trained` goes to the metadata."""
    metadata = {
        "sae_lens_version": FORMAT_VERSION,
        **trained,
        "model_name": origin.model_name,
        "hook_name": origin.hook,
        "hook_layer": origin.layer,
        "context_size": origin.context_size,
    }
    return {
        "architecture": architecture,
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": str(dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": sae.apply_b_dec_to_input,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {name: value for name, value in metadata.items() if value is not None},
    }


def write(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    """Both files, each to a temporary name that is then renamed."""
    write_atomically(folder / WEIGHTS, lambda path: save_file(tensors, path, {"format": "pt"}))
    write_json(folder / CONFIG, config)


def read(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, cfg.json), in the words of release 6."""
    return saelens_before_6.tensors(read_tensors(folder / WEIGHTS)), saelens_before_6.config(read_json(folder / CONFIG))


def scale_of_checkpoint(folder: Path) -> float | None:
    """What SAELens multiplies the activations of a training checkpoint by; None where no file says it.

    Raises:
        ValueError: a file that holds no such number.
    """
    path = folder / SCALER
    if not path.is_file():
        return None
    factor = field(path, read_json(path), "scaling_factor", (int, float, type(None)))
    try:
        return 1.0 if factor is None else check_positive("scaling_factor", factor)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def origin(config: dict[str, Any]) -> Origin:
    """What the metadata say of it."""
    metadata = _metadata(config)
    return Origin(*(metadata.get(name) for name in ("model_name", "hook_layer", "hook_name", "context_size")))


def unpack(tensors: dict[str, Tensor], config: dict[str, Any], folder: Path, say: Say = silent) -> PortableSAE:
    """The SAE of SAELens' tensors and cfg.json; `folder` is named in errors.

    Decoder norms are folded into the encoder where the architecture selects by activation times decoder norm.

    Raises:
        ValueError: another architecture, an activation normalisation that is done at run time, wrong tensors.
    """
    weights, cfg = folder / WEIGHTS, folder / CONFIG
    architecture = config.get("architecture")
    architecture = AS_TRAINED_HERE.get(str(architecture), architecture)
    if architecture not in ARCHITECTURES:
        raise ValueError(f"{cfg}: architecture={architecture!r}: this package reads {', '.join(ARCHITECTURES)}")
    input_scale = check_inputs(folder, config, say)
    d_in, d_sae = field(cfg, config, "d_in"), field(cfg, config, "d_sae")
    transcodes, by_threshold = architecture in TRANSCODERS, str(architecture).startswith("jumprelu")
    d_out = field(cfg, config, "d_out", int, 1) if transcodes else d_in
    shapes: dict[str, tuple[int, ...]] = {
        "W_enc": (d_in, d_sae),
        "b_enc": (d_sae,),
        "W_dec": (d_sae, d_out),
        "b_dec": (d_out,),
    }
    if "skip" in str(architecture):
        shapes["W_skip"] = (d_out, d_in)
    if by_threshold:
        shapes["threshold"] = (d_sae,)
    elif architecture != "topk" and not transcodes:
        shapes["topk_threshold"] = ()
    check_tensors(weights, tensors, shapes)
    exact = torch.promote_types(tensors["W_enc"].dtype, torch.float32)
    k: float | None = None
    threshold = None
    if by_threshold:
        threshold = _one_value(tensors["threshold"].to(exact), tensors["threshold"].dtype, say)
        k = _recorded_k(config)
    elif transcodes:
        threshold, k = torch.zeros((), dtype=exact), _recorded_k(config)
    else:
        k = field(cfg, config, "k", (int, float))
        # their running mean starts at 0
        if "topk_threshold" in tensors and float(tensors["topk_threshold"]) != 0:
            threshold = tensors["topk_threshold"].to(exact)
    centres = field(cfg, {"apply_b_dec_to_input": not transcodes, **config}, "apply_b_dec_to_input", bool)
    weights_found: dict[str, Any] = {name: tensors[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    sae = PortableSAE(
        **weights_found,
        rule="topk" if architecture == "topk" else "threshold",
        k=k,
        threshold=threshold,
        apply_b_dec_to_input=centres,
        training=_training(cfg, config),
        input_scale=input_scale,
        transcodes=transcodes,
        W_skip=tensors["W_skip"].t() if "W_skip" in tensors else None,
    )
    sae = sae.of_one_dtype(weights)
    # absent, it is what SAELens takes by default: False for inference, True for training
    if not (by_threshold or transcodes) and config.get("rescale_acts_by_decoder_norm", architecture != "topk"):
        sae = sae.with_unit_rows(say, "SAELens selects by activation times decoder norm here")
    return sae


def check_inputs(folder: Path, config: dict[str, Any], say: Say, at_run_time: Collection[str] = ()) -> float:
    """What activations are to be multiplied by.

    Raises:
        ValueError: they are normalised in a way that is neither one factor nor in `at_run_time`.
    """
    cfg, scale = folder / CONFIG, 1.0
    normalize = config.get("normalize_activations") or "none"
    if normalize == "expected_average_only_in":
        found = scale_of_checkpoint(folder)
        if found is None:
            say(
                f"this is a training checkpoint without {SCALER}: feed it activations times the factor of that training"
            )
        else:
            scale = found
            say(f"this is a training checkpoint: activations are multiplied by {scale!r}, as {SCALER} says")
    elif normalize == "covariance_whitening":
        raise ValueError(f"{cfg}: normalize_activations={normalize!r}: must be 'none'; fold it in with SAELens first")
    elif normalize != "none" and normalize not in at_run_time:
        allowed = "'none'; what is done to each token at run time has no place in a SampledSAE"
        if at_run_time:
            allowed = f"one of 'none', {', '.join(map(repr, at_run_time))}"
        raise ValueError(f"{cfg}: normalize_activations={normalize!r}: must be {allowed}")
    if config.get("reshape_activations") not in (None, "none"):
        say(f"reshape_activations={config['reshape_activations']!r}: feed it the heads' activations side by side")
    return scale


def _one_value(threshold: Tensor, stored: torch.dtype, say: Say) -> Tensor:
    """0-dim where all are equal up to rounding, else [d_sae]."""
    low, high = threshold.min(), threshold.max()
    if low == high:
        return low
    if low > 0 and high - low <= ROUNDING * torch.finfo(stored).eps * high:
        say(f"threshold: {float(low)!r} to {float(high)!r}, equal up to rounding, is taken as its median")
        return threshold.median()
    return threshold


def _metadata(config: dict[str, Any]) -> dict[str, Any]:
    found = config.get("metadata")
    return found if isinstance(found, dict) else {}


def _details(config: dict[str, Any]) -> dict[str, Any]:
    """Fields of the training's configuration, in the words of its architecture."""
    found = _metadata(config).get("training_architecture_details")
    return found if isinstance(found, dict) else {}


def _training(cfg: Path, config: dict[str, Any]) -> dict[str, Any] | None:
    """None where it was trained neither by this package's rule nor as a Matryoshka SAE."""
    details = dict(_details(config))
    architecture = _metadata(config).get("training_architecture")
    widths = config.get("matryoshka_widths", details.get("matryoshka_widths"))
    if widths is not None:
        field(cfg, {"matryoshka_widths": widths}, "matryoshka_widths", list)
        d_sae = config["d_sae"]
        # SAELens adds a level of all features where there is none
        return training_fields(cfg, {"groups": widths if d_sae in widths[-1:] else [*widths, d_sae]})
    if architecture not in (EXPORTED, TRAINED):
        return None
    if "aux_loss_coefficient" in details:
        details["aux_coefficient"] = details["aux_loss_coefficient"]
    if "topk_threshold_lr" in details:
        details["threshold_decay"] = 1 - field(cfg, details, "topk_threshold_lr", (int, float))
    return training_fields(cfg, details)


def _recorded_k(config: dict[str, Any]) -> float | None:
    """k of the training, or the L0 measured in it, of a jumprelu."""
    for value in (_details(config).get("k"), _metadata(config).get("l0")):
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0:
            return value
    return None
