"""circuit-tracer's files: `config.yaml` and `layer_0.safetensors`, `layer_1.safetensors`, ...: a transcoder a layer.

What stands in the files is what that library reads: W_enc and W_dec [F, d], b_enc, b_dec, where there is a skip W_skip
[d, d], where there are thresholds "activation_function.threshold" [F]. One rule holds for all layers: a feature is
active above its threshold (or above 0), or among the k largest of its token. Every layer has to have its transcoder
before that library opens the folder; they are written one by one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..sae import SampledSAE
from ..support.argument_checks import check_choice, check_integer
from ..support.atomic_files import field, read_tensors, write_atomically, write_text
from .layers import with_one_threshold
from .origin import Origin
from .portable import RULES, PortableSAE, Say, silent
from .tensor_checks import check_tensors, narrowed

NAME = "circuit_tracer"
CONFIG = "config.yaml"
THRESHOLD = "activation_function.threshold"
KIND = "transcoder_set"
# where in a block that library has what an MLP reads and what it writes
INPUT_HOOK, OUTPUT_HOOK = "mlp.hook_in", "mlp.hook_out"
# in config.yaml, of all layers
OF_SET = ("model_name", "model_kind", "feature_input_hook", "feature_output_hook", "activation", "k")


def file_of(layer: int) -> str:
    """The name of a layer's file."""
    return f"layer_{layer}.safetensors"


def layers_in(folder: Path) -> list[int]:
    """The layers whose files are there, ascending."""
    found = (re.fullmatch(r"layer_(\d+)\.safetensors", path.name) for path in Path(folder).glob("layer_*.safetensors"))
    return sorted(int(match[1]) for match in found if match)


def export_transcoder(
    sae: SampledSAE,
    folder: str | Path,
    layer: int,
    *,
    model_name: str,
    rule: str | None = None,
    input_hook: str = INPUT_HOOK,
    output_hook: str = OUTPUT_HOOK,
    say: Say = silent,
) -> list[Path]:
    """Adds a transcoder to a folder that circuit-tracer reads; returns the two files.

    Args:
        sae: a `SampledSAE` that is a transcoder with d_out = d_in, or a skip transcoder; its weights are not changed.
            Scales are folded into them.
        folder: made if need be; the file of the same layer is replaced.
        layer: whose MLP it reconstructs, from 0.
        model_name: of the language model, as in its configuration there.
        rule: "threshold" or "topk"; that of `sae.eval()` when absent.
        input_hook, output_hook: what it reads and reconstructs, as that library calls them in a block.
        say: called with a line for each convention that was changed.

    Raises:
        ValueError: an SAE, another d_out, `groups`, `inference="batch"`, a fraction k of the rule "topk", NaN or inf, a
            folder whose other layers are of another model, size or rule. Nothing is written then.
    """
    folder, layer, cfg = Path(folder), check_integer("layer", layer, 0), sae.cfg
    if rule is not None:
        check_choice("rule", rule, RULES)
    if not cfg.is_transcoder or cfg.d_out != cfg.d_in:
        raise ValueError(f"d_out={cfg.d_out}: {NAME} reads transcoders with d_out = d_in={cfg.d_in}, and no SAEs")
    if cfg.groups is not None:
        raise ValueError(
            f"groups={cfg.groups}: {NAME} has no place for them, all features reconstruct together there; "
            "sae.cfg = dataclasses.replace(sae.cfg, groups=None) exports the transcoder without them"
        )
    if rule is None and cfg.inference == "batch" and not cfg.is_topk:
        raise ValueError("cfg.inference='batch' depends on the whole batch, which no file says; give rule='threshold'")
    chosen = rule or ("topk" if cfg.is_topk else "threshold")
    portable = PortableSAE.of(sae, chosen).read_at(1.0)
    portable.say_of_threshold(sae, say)
    if cfg.input_scale != 1 or cfg.output_scale != 1:
        say(f"scales {cfg.input_scale!r} and {cfg.output_scale!r} are folded into the weights")
    about: dict[str, Any] = {"model_name": model_name, "model_kind": KIND}
    about |= {"feature_input_hook": input_hook, "feature_output_hook": output_hook}
    if chosen == "topk":
        about |= {"activation": "topk", "k": portable.whole_k(NAME)}
        say("it keeps k activations of each token, those below 0 too where fewer than k are above it")
    tensors = pack(portable)
    _check_set(folder, layer, about, tensors)
    write_atomically(folder / file_of(layer), lambda path: save_file(tensors, path, {"format": "pt"}))
    write_text(folder / CONFIG, "".join(f"{name}: {json.dumps(value)}\n" for name, value in about.items()))
    return [folder / file_of(layer), folder / CONFIG]


def load_transcoder(
    folder: str | Path, layer: int, *, k: float | None = None, rescale_features: bool = False, say: Say = silent
) -> SampledSAE:
    """The transcoder of a layer in circuit-tracer's files, in evaluation mode.

    Args:
        folder: with `config.yaml`.
        layer: from 0.
        k: active features a token, where the files do not say it.
        rescale_features, say: as in `formats.load`.

    Raises:
        ImportError: no PyYAML, which reads config.yaml.
        ValueError: a missing, damaged or foreign file, one of another kind; naming it and what is wrong.
    """
    folder = Path(folder)
    path = folder / file_of(check_integer("layer", layer, 0))
    portable = unpack(path, say)
    portable = with_one_threshold(portable, path, rescale_features, say)
    sae = SampledSAE(portable.config(k), dtype=portable.dtype)
    sae.load_state_dict(portable.state())
    return sae.eval()


def pack(sae: PortableSAE) -> dict[str, Tensor]:
    """The tensors of a layer's file."""
    tensors = {"W_enc": sae.W_enc.t(), "b_enc": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    if sae.W_skip is not None:
        tensors["W_skip"] = sae.W_skip.t()
    # without one every feature is active above 0
    if sae.rule == "threshold" and sae.threshold is not None and bool((sae.threshold > 0).any()):
        tensors[THRESHOLD] = narrowed(sae.threshold, sae.dtype).expand(sae.d_sae)
    return {name: t.contiguous() for name, t in tensors.items()}


def unpack(path: Path, say: Say = silent) -> PortableSAE:
    """The transcoder in a layer's file, whose folder has config.yaml.

    Raises:
        ValueError: as `load_transcoder`.
    """
    config, tensors = read_config(path.parent), read_tensors(path)
    shape = list(tensors["W_enc"].shape) if "W_enc" in tensors else None
    if shape is None or len(shape) != 2:
        raise ValueError(f"{path}: W_enc={shape}: must be a matrix [F, d]")
    d_sae, d = shape
    shapes: dict[str, tuple[int, ...]] = {"W_enc": (d_sae, d), "W_dec": (d_sae, d), "b_enc": (d_sae,), "b_dec": (d,)}
    shapes |= {name: of for name, of in (("W_skip", (d, d)), (THRESHOLD, (d_sae,))) if name in tensors}
    check_tensors(path, {name: t for name, t in tensors.items() if name != "k"}, shapes)
    by_k = config.get("activation") == "topk"
    threshold = tensors.get(THRESHOLD)
    if threshold is not None and config.get("activation") in ("topk", "relu"):
        raise ValueError(f"{path}: {THRESHOLD}, but {CONFIG} says activation {config['activation']!r}")
    if threshold is not None and bool((threshold < 0).any()):
        raise ValueError(
            f"{path}: {THRESHOLD} is below 0 for {int((threshold < 0).sum())} features, where {NAME} keeps activations "
            "below 0 too, as no SampledSAE does"
        )
    if threshold is not None and bool((threshold == threshold[0]).all()):
        threshold = threshold[0]
    sae = PortableSAE(
        W_enc=tensors["W_enc"].t(),
        b_enc=tensors["b_enc"],
        W_dec=tensors["W_dec"],
        b_dec=tensors["b_dec"],
        rule="topk" if by_k else "threshold",
        k=config["k"] if by_k else None,
        threshold=None if by_k else torch.zeros(()) if threshold is None else threshold,
        apply_b_dec_to_input=False,
        transcodes=True,
        W_skip=tensors["W_skip"].t() if "W_skip" in tensors else None,
    )
    return sae.of_one_dtype(path)


def read_config(folder: Path) -> dict[str, Any]:
    """config.yaml as a dict.

    Raises:
        ImportError: no PyYAML.
        ValueError: a missing or foreign file, another kind than a set of transcoders, a rule that is none here.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        load: Callable[[str], Any] = import_module("yaml").safe_load
    except ImportError as error:
        raise ImportError(f"{path}: is read by PyYAML: pip install pyyaml") from error
    try:
        found = load(path.read_text(encoding="utf-8"))
    except Exception as error:
        raise ValueError(f"{path}: is no YAML ({' '.join(str(error).split())})") from None
    if not isinstance(found, dict) or found.get("model_kind") != KIND:
        kind = found.get("model_kind") if isinstance(found, dict) else None
        raise ValueError(f"{path}: model_kind={kind!r}: must be {KIND!r}, a transcoder a layer")
    if found.get("transcoders"):
        raise ValueError(f"{path}: transcoders={found['transcoders']!r}: names files elsewhere; must be layer_N files")
    if found.get("activation") not in (None, "relu", "jump_relu", "jumprelu", "topk"):
        raise ValueError(f"{path}: activation={found['activation']!r}: must be relu, jumprelu or topk")
    if found.get("activation") == "topk":
        field(path, found, "k", int, 1)
    return found


def origin_of(path: Path) -> Origin:
    """Model and layer of a layer's file."""
    config, layer = read_config(path.parent), int(path.stem.rpartition("_")[2])
    hook = config.get("feature_input_hook")
    return Origin(config.get("model_name"), layer, None if hook is None else f"blocks.{layer}.{hook}").checked(path)


def _check_set(folder: Path, layer: int, about: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """ValueError where the folder holds something else than such transcoders of other layers."""
    if not (folder / CONFIG).exists():
        if layers_in(folder):
            raise ValueError(f"{folder}: has layers without {CONFIG}; use another folder")
        return
    there = read_config(folder)
    for name in OF_SET:
        if there.get(name) != about.get(name):
            raise ValueError(
                f"{folder / CONFIG}: {name}={there.get(name)!r}, this transcoder has {about.get(name)!r}; use another "
                "folder, one set has one for all its layers"
            )
    for other in layers_in(folder):
        if other == layer:
            continue
        shapes = {name: tuple(t.shape) for name, t in read_tensors(folder / file_of(other)).items()}
        for name in ("W_enc", "W_skip"):
            own = tuple(tensors[name].shape) if name in tensors else None
            if shapes.get(name) != own:
                raise ValueError(
                    f"{folder / file_of(other)}: {name} is {shapes.get(name)}, that of layer {layer} {own}; all layers "
                    "of a set have one shape"
                )
        return
