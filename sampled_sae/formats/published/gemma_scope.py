"""Gemma Scope's files: `params.npz` of the first suite, `params.safetensors` and `config.json` of the second.

JumpReLU SAEs and transcoders with a threshold for each feature; b_dec is not subtracted from the input. What they read
stands in the names of repository and folder: `google/gemma-scope-2b-pt-res`, `layer_12/width_16k/average_l0_82`.
"""

from __future__ import annotations

import re
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...inference.tensors import shapes_of
from ...pretrained import layer_of
from ...support.atomic_files import field, read_json, read_tensors, write_atomically
from ..origin import Origin
from ..portable import Say
from ..tensor_checks import check_tensors
from .reading import Place, Reading, config_of

NAME = "gemma_scope"
SECOND = "gemma_scope_2"
ARRAYS, TENSORS, CONFIG = "params.npz", "params.safetensors", "config.json"
FILES = (ARRAYS,)
FILES_OF_SECOND = (TENSORS,)
NAMES = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
SKIP = "affine_skip_connection"
# what numpy and zipfile raise for a file that is damaged or none; RuntimeError for an encrypted one
UNREADABLE = (ValueError, TypeError, OSError, EOFError, KeyError, zipfile.BadZipFile, zlib.error, RuntimeError)
# What the last part of a repository's name says of the place: hook of TransformerLens in a block.
HOOKS = {"res": "hook_resid_post", "mlp": "hook_mlp_out", "att": "attn.hook_z", "transcoders": "ln2.hook_normalized"}


def read(place: Place, say: Say) -> Reading:
    """The SAE or transcoder of a `params.npz`.

    Raises:
        ValueError: no archive of arrays, pickled objects, wrong arrays; naming the file.
    """
    path = place.path / ARRAYS
    tensors = read_arrays(path)
    named = {"W_" + name[2:] if name.startswith("w_") else name: t for name, t in tensors.items()}
    if "embedding" in place.tail:
        say("an SAE of embeddings as they stand in the table: feed it those, not the model's, which are times sqrt(d)")
    return _reading(path, named, _is_transcoder(place), _origin(place))


def read_second(place: Place, say: Say) -> Reading:
    """The SAE or transcoder of a `params.safetensors`, whose `config.json` names model and hook where it is there.

    Raises:
        ValueError: another architecture, a transcoder across layers, wrong tensors; naming the file.
    """
    path = place.path / TENSORS
    tensors = read_tensors(path)
    cfg = place.path / CONFIG
    config = read_json(cfg) if cfg.is_file() else {}
    if config.get("architecture", "jump_relu") != "jump_relu":
        raise ValueError(f"{cfg}: architecture={config['architecture']!r}: this package reads 'jump_relu'")
    if "w_dec" in tensors and tensors["w_dec"].dim() == 3:
        raise ValueError(f"{path}: w_dec {tuple(tensors['w_dec'].shape)}: a transcoder across layers has no place here")
    named = {name.replace("w_", "W_") if name in ("w_enc", "w_dec") else name: t for name, t in tensors.items()}
    if SKIP in named:
        named["W_skip"] = named.pop(SKIP).t()  # [d_in, d_out] there
    model, hook = (field(cfg, config, name, (str, type(None))) for name in ("model_name", "hf_hook_point_in"))
    origin = Origin(_published_as(model), layer_of(hook), hook).filled_by(_origin(place))
    return _reading(path, named, _is_transcoder(place) or config.get("hf_hook_point_out") is not None, origin)


def read_arrays(path: Path) -> dict[str, Tensor]:
    """The arrays of an .npz file.

    Raises:
        ValueError: naming the file, when it is missing, truncated, foreign, or holds pickled objects, which are never
            loaded.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            if not isinstance(arrays, np.lib.npyio.NpzFile):
                raise ValueError("one array, not an archive")
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    except UNREADABLE as error:
        raise ValueError(f"{path}: truncated or not an .npz file of plain arrays ({error})") from None


def pack(reading: Reading) -> dict[str, Tensor]:
    """The arrays of a `params.npz`.

    Raises:
        ValueError: what it has no place for.
    """
    c = reading.config
    plain = (c.apply_b_dec_to_input, c.scale_by_decoder_norm, c.normalize, c.input_scale, c.output_scale, c.skip)
    if c.rule not in ("jumprelu", "threshold") or plain != (False, False, "none", 1, 1, False):
        raise ValueError(f"rule={c.rule!r} with {plain}: Gemma Scope's files have no place for it")
    tensors = {name: reading.tensors[name] for name in NAMES}
    tensors["threshold"] = tensors["threshold"].expand(c.d_sae)
    return tensors


def write(folder: Path, tensors: dict[str, Tensor]) -> None:
    """`params.npz`, to a temporary name that is then renamed."""
    arrays: dict[str, Any] = {
        name: t.to(torch.promote_types(t.dtype, torch.float32)).numpy() for name, t in tensors.items()
    }

    def save(path: Path) -> None:
        # given a path, numpy would add a suffix to the temporary name
        with open(path, "wb") as file:
            np.savez(file, **arrays)

    write_atomically(folder / ARRAYS, save)


def _reading(path: Path, tensors: dict[str, Tensor], transcodes: bool, origin: Origin) -> Reading:
    if not {"W_enc", "W_dec"} <= set(tensors) or any(tensors[name].dim() != 2 for name in ("W_enc", "W_dec")):
        raise ValueError(f"{path}: must hold the matrices W_enc and W_dec, holds {sorted(tensors)}")
    (d_in, d_sae), d_out = tensors["W_enc"].shape, tensors["W_dec"].shape[1]
    transcodes = transcodes or d_out != d_in
    config = config_of(
        path,
        d_in=d_in,
        d_sae=d_sae,
        rule="jumprelu",
        d_out=d_out if transcodes else None,
        skip="W_skip" in tensors,
    )
    check_tensors(path, tensors, shapes_of(config), infinite=("threshold",))
    return Reading(f"JumpReLU {'transcoder' if transcodes else 'SAE'}", config, tensors, origin)


def _is_transcoder(place: Place) -> bool:
    return "transcoder" in place.tail


def _published_as(model: str | None) -> str | None:
    """The repository of a Gemma, which the files also call gemma-v3-1b-pt; the smallest base model has no suffix."""
    if model is None:
        return None
    name = model.replace("gemma-v3-", "gemma-3-")
    name = name if "/" in name else f"google/{name}"
    return name.removesuffix("-pt") if "-270m" in name else name


def _origin(place: Place) -> Origin:
    """By the names of repository and folder, as far as they are Gemma Scope's own."""
    layer = place.number("layer_")
    found = re.search(r"gemma-scope-(2-)?(\d+[bm])-(pt|it)-?(\w+)?", place.tail)
    if found is None:
        return Origin(layer=layer)
    second, size, tuning, kind = found.groups()
    generation = "3" if second else "2"
    # the second generation's base models were published without a suffix
    suffix = f"-{tuning}" if second or tuning == "it" else ""
    hook = HOOKS.get(kind or "")
    return Origin(
        _published_as(f"google/gemma-{generation}-{size}{suffix}"),
        layer,
        None if layer is None or hook is None or "embedding" in place.tail else f"blocks.{layer}.{hook}",
    )
