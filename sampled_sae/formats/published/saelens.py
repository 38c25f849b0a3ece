"""SAELens' files for inference: `sae_weights.safetensors` and `cfg.json` of every architecture that has a place here.

Files from before its release 6 are read in that release's words. A checkpoint of its training is read as SAELens would
save it for inference.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from ...inference.config import InferenceConfig
from ...inference.tensors import shapes_of
from ...pretrained import layer_of
from ...support.atomic_files import field
from .. import saelens
from ..origin import Origin
from ..portable import Say
from ..tensor_checks import check_tensors
from .reading import Place, Reading, config_of, in_dtype_of_weights, of_portable

NAME = saelens.NAME
FILES = (saelens.WEIGHTS, saelens.CONFIG)
# architecture there: rule here
SAES = {"standard": "relu", "topk": "topk", "jumprelu": "jumprelu", "gated": "gated"}
TRANSCODERS = {name: "jumprelu" if name.startswith("jumprelu") else "relu" for name in saelens.TRANSCODERS}
RULES = {**SAES, **TRANSCODERS}
# read as training checkpoints
TRAINED = ("batchtopk", "matryoshka_batchtopk", "sampled", "sampled_batchtopk", "sampled_matryoshka_batchtopk")
REFUSED = {
    "abstopk": "keeps features of negative activation",
    "matching_pursuit": "chooses one feature after another by what is left of the token",
    "temporal": "looks at the tokens before",
}
NORMALIZED = {"layer_norm": "layer_norm", "constant_norm_rescale": "constant_norm"}


def read(place: Place, say: Say) -> Reading:
    """The SAE in a folder.

    Raises:
        ValueError: an architecture or a normalisation that has no place here, wrong tensors; naming the file.
    """
    tensors, config = saelens.read(place.path)
    cfg = place.path / saelens.CONFIG
    architecture = config.get("architecture")
    architecture = {"sampled_topk": "topk"}.get(str(architecture), architecture)
    origin = saelens.origin(config).checked(cfg)
    origin = Origin(layer=layer_of(origin.hook_name)).filled_by(origin) if origin.layer is None else origin
    if architecture in TRAINED:
        return of_portable(saelens.unpack(tensors, config, place.path, say), str(architecture), origin, say)
    if architecture in REFUSED:
        raise ValueError(f"{cfg}: architecture={architecture!r}: {REFUSED[architecture]}, which has no place here")
    if architecture not in RULES:
        known = ", ".join((*RULES, *TRAINED))
        raise ValueError(f"{cfg}: architecture={architecture!r}: this package reads {known}")
    inference = _config(place.path, config, str(architecture), say)
    activation = config.get("activation_fn_str") or config.get("activation_fn") or "relu"
    if activation not in ("relu", "topk"):
        raise ValueError(f"{cfg}: activation_fn={activation!r}: this package reads 'relu' and 'topk'")
    check_tensors(place.path / saelens.WEIGHTS, tensors, shapes_of(inference), infinite=("threshold",))
    return Reading(str(architecture), inference, tensors, origin)


def pack(reading: Reading) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, cfg.json) as SAELens has them.

    Raises:
        ValueError: what its files have no place for.
    """
    config, origin = reading.config, reading.origin
    rule = "jumprelu" if config.rule == "threshold" else config.rule
    of_kind = TRANSCODERS if config.is_transcoder else SAES
    names = {name for name, of in of_kind.items() if of == rule and ("skip" in name) == config.skip}
    by_norm = config.scale_by_decoder_norm and rule != "topk"
    if not names or by_norm or config.input_scale != 1 or config.output_scale != 1:
        what = f"rule={config.rule!r}, d_out={config.d_out}, skip={config.skip}, input_scale={config.input_scale}"
        what += f", scale_by_decoder_norm={config.scale_by_decoder_norm}"
        raise ValueError(f"{what}: SAELens' files have no place for it")
    (name,) = names
    tensors = in_dtype_of_weights(reading.tensors)
    if "threshold" in tensors:
        tensors["threshold"] = tensors["threshold"].expand(config.d_sae)
    described = saelens.described(name, config, tensors["W_dec"].dtype, origin, {})
    described |= {"normalize_activations": {of: word for word, of in NORMALIZED.items()}.get(config.normalize, "none")}
    if name == "topk":
        described |= {"k": config.k, "rescale_acts_by_decoder_norm": config.scale_by_decoder_norm}
    if config.is_transcoder:
        described["d_out"] = config.d_out
    return {name: t.contiguous() for name, t in tensors.items()}, described


write = saelens.write


def _config(folder: Path, config: dict[str, Any], architecture: str, say: Say) -> InferenceConfig:
    cfg = folder / saelens.CONFIG
    known = {"apply_b_dec_to_input": architecture in SAES, "rescale_acts_by_decoder_norm": False, **config}
    made: dict[str, Any] = {
        "d_in": field(cfg, config, "d_in", int, 1),
        "d_sae": field(cfg, config, "d_sae", int, 1),
        "rule": RULES[architecture],
        "normalize": NORMALIZED.get(str(config.get("normalize_activations")), "none"),
        "input_scale": saelens.check_inputs(folder, config, say, NORMALIZED),
        "apply_b_dec_to_input": field(cfg, known, "apply_b_dec_to_input", bool),
    }
    if architecture in TRANSCODERS:
        made |= {"d_out": field(cfg, config, "d_out", int, 1), "skip": "skip" in architecture}
    if architecture == "topk":
        made["k"] = field(cfg, config, "k", int, 1)
        made["scale_by_decoder_norm"] = field(cfg, known, "rescale_acts_by_decoder_norm", bool)
    return config_of(cfg, **made)
