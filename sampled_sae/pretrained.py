"""The saved form of an SAE: `config.json` and `sae.safetensors`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .config import MEMBERS, SampledSAEConfig
from .support.argument_checks import FLOATS
from .support.atomic_files import field, read_json, read_tensors, write_atomically, write_json
from .support.checksums import json_crc32, tensors_crc32
from .support.tensor_file import Kind, Piece, write_pieces

FORMAT = "sampled-sae"
VERSION = 1
WEIGHTS = "sae.safetensors"
CONFIG = "config.json"
WEIGHT_NAMES = ("W_enc", "b_enc", "W_dec", "b_dec")
# Earlier versions wrote none of the first, nor `input_scale` in config.json.
SINCE = ("calibrated_at",)
TENSORS = (*WEIGHT_NAMES, "threshold", "threshold_steps", "tokens_since_active", *SINCE)
# of a transcoder that has it
SKIP = "W_skip"
# What `train` leaves beside an SAE, and what `import` does: model, layer, context and scale of its activations.
RUN = "run.json"
ORIGIN = "origin.json"
# What `evaluate` leaves beside an SAE.
EVALUATION = "evaluation.json"
# The weights and configurations of other libraries, by the names that `sampled-sae import --from` takes.
PEER_FILES = {
    "saelens": ("sae_weights.safetensors", "cfg.json"),
    "dictionary_learning": ("ae.pt", "config.json"),
    "sparsify": ("sae.safetensors", "cfg.json"),
}


def tensor_shapes(config: SampledSAEConfig) -> dict[str, tuple[int, ...]]:
    """Of the tensors of an SAE, in the order of its file."""
    d_in, d_sae, d_out = config.width_in, config.d_sae, config.width_out
    weights = ((d_in, d_sae), (d_sae,), (d_sae, d_out), (d_out,))
    shapes: dict[str, tuple[int, ...]] = dict(zip(TENSORS, (*weights, (), (), (d_sae,), ())))
    shapes |= {SKIP: (d_in, d_out)} if config.skip else {}
    return shapes | ({MEMBERS: (d_sae,)} if config.inference == "pool" else {})


def check_target(folder: Path) -> None:
    """Whether an SAE may be written to a folder.

    Raises:
        ValueError: its config.json is not of an SAE of ours, but of a language model, say, or its sae.safetensors of
            sparsify, and would be lost.
    """
    path = folder / CONFIG
    foreign = read_json(path).get("format") != FORMAT if path.is_file() else False
    if not path.is_file() and (folder / WEIGHTS).is_file():
        path = folder / WEIGHTS
        foreign = _written_as(path)[:1] != [FORMAT]
    if foreign:
        raise ValueError(f"{path}: is of something else than a SampledSAE and would be replaced; use another folder")


def save_pretrained(folder: Path, config: dict[str, Any], kinds: Mapping[str, Kind], pieces: Iterable[Piece]) -> None:
    """W_enc is written as [d_in, d_sae], row-major, as SAELens and SAEBench have it.

    Args:
        config: fields of the SampledSAEConfig.
        kinds, pieces: of the tensors of `tensor_shapes`.

    Raises:
        ValueError: as `check_target`.
    """
    check_target(folder)
    write_atomically(folder / WEIGHTS, lambda path: write_pieces(path, kinds, pieces, f"{FORMAT} {VERSION}"))
    write_json(folder / CONFIG, {"format": FORMAT, "version": VERSION, "sae": config, "crc32": json_crc32(config)})


def load_pretrained(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(config fields, tensors), checked against each other.

    Raises:
        ValueError: naming the file and what is wrong with it; for the files of another library what reads them.
    """
    _check_not_of_peer(folder)
    config = read_json(folder / CONFIG)
    if config.get("format") != FORMAT or "sae" not in config:
        raise ValueError(f"{folder / CONFIG}: format={config.get('format')!r}: must be {FORMAT!r}")
    if config.get("version") != VERSION:
        raise ValueError(f"{folder / CONFIG}: version={config.get('version')!r}: this package reads {VERSION}")
    path = folder / WEIGHTS
    tensors = read_tensors(path)
    check_checksum(path, tensors)
    fields = config["sae"]
    if not isinstance(fields, dict):
        raise ValueError(f"{folder / CONFIG}: sae={fields!r}: must be the fields of a SampledSAEConfig")
    try:
        sae = SampledSAEConfig.from_dict(fields)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{folder / CONFIG}: {error}") from None
    shapes = tensor_shapes(sae)
    for name, shape in shapes.items():
        if name not in tensors:
            if name in SINCE:
                continue
            raise ValueError(f"{path}: tensor {name!r} is missing; it holds {sorted(tensors)}")
        if tuple(tensors[name].shape) != shape:
            raise ValueError(f"{path}: {name} is {tuple(tensors[name].shape)}, config.json says {shape}")
        if name in (*WEIGHT_NAMES, SKIP) and tensors[name].dtype not in FLOATS:
            raise ValueError(f"{path}: {name} is {tensors[name].dtype}, must be one of {', '.join(map(str, FLOATS))}")
        if not torch.isfinite(tensors[name]).all():
            raise ValueError(f"{path}: {name} holds NaN or inf")
    if MEMBERS in shapes:
        check_members(path, tensors[MEMBERS], sae)
    # last: what is wrong with a field says more than that it was changed; earlier versions wrote no checksum
    if config.get("crc32", json_crc32(fields)) != json_crc32(fields):
        raise ValueError(f"{folder / CONFIG}: damaged, or edited by hand: then remove its line 'crc32'")
    if "input_scale" not in fields:
        fields["input_scale"] = recorded_scale(folder)
    return fields, {name: tensors[name] for name in shapes if name in tensors}


def check_members(path: Path, members: Tensor, sae: SampledSAEConfig) -> None:
    """ValueError unless the fixed set of `inference="pool"`, bool [d_sae], is empty or of the config's size."""
    count = int(members.sum()) if members.dtype == torch.bool else None
    if count not in (0, sae.inference_size):
        found = f"{members.dtype} with {count} features" if count is not None else str(members.dtype)
        raise ValueError(f"{path}: {MEMBERS} is {found}, must be torch.bool with 0 or {sae.inference_size}")


def is_ours(folder: Path) -> bool:
    """Whether a folder's config.json is of an SAE of this package."""
    return (folder / CONFIG).is_file() and read_json(folder / CONFIG).get("format") == FORMAT


def _check_not_of_peer(folder: Path) -> None:
    for peer, files in PEER_FILES.items():
        if all((folder / file).is_file() for file in files) and not is_ours(folder):
            raise ValueError(
                f"{folder}: is an SAE of {peer}; sampled-sae import {folder} OUT makes one of this package of it, "
                "sampled_sae.formats.load reads it as one, and sampled_sae.load_inference as it is"
            )


class HasConfig(Protocol):
    """A SampledSAE, as far as its state's factor goes."""

    @property
    def cfg(self) -> SampledSAEConfig: ...


def scale_into_state(sae: HasConfig, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Hook after `state_dict`: the factors on the activations, in whose units all the other tensors are; 0-dim, or
    [layers] where each layer has its own."""
    for name in _scales(sae.cfg):
        state[f"{prefix}{name}"] = torch.tensor(getattr(sae.cfg, name), dtype=torch.float64, device="cpu")


def check_scale_of_state(sae: HasConfig, state: dict[str, Any], prefix: str, *others: Any) -> None:
    """Hook before `load_state_dict`. States of earlier versions and of peers do not say their factor.

    Raises:
        ValueError: it is not `cfg.input_scale`, or that of the targets not `cfg.output_scale`.
    """
    for name in _scales(sae.cfg):
        found, own = state.pop(f"{prefix}{name}", None), getattr(sae.cfg, name)
        if found is not None and (scale := scale_of_state(found)) != own:
            raise ValueError(
                f"{name}={own!r}: the state dict is of an SAE with {name}={scale!r}; make the SAE with that in "
                "its config"
            )


def scale_of_state(found: Tensor) -> float | tuple[float, ...]:
    """A factor on the activations as a config has it."""
    return float(found) if found.dim() == 0 else tuple(map(float, found))


def _scales(config: SampledSAEConfig) -> tuple[str, ...]:
    return ("input_scale", "output_scale") if config.is_transcoder else ("input_scale",)


def recorded_origin(folder: Path) -> dict[str, Any]:
    """What a training or an import says of the activations that its SAE reads, in the words of origin.json; empty where
    nothing does. `scale` is there of an import of an earlier version."""
    if not (folder / RUN).is_file():
        return read_json(folder / ORIGIN) if (folder / ORIGIN).is_file() else {}
    trained = field(folder / RUN, read_json(folder / RUN), "activations", dict)
    point, layer = trained.get("point"), trained.get("layer")
    layer = layer if point is None else layer_of(str(point))
    layer = None if trained.get("layers") else layer  # a crosscoder reads several
    return {
        "model_name": trained.get("model"),
        "layer": layer,
        "hook_name": point,
        "context_size": trained.get("context"),
    }


def layer_of(hook: str | None) -> int | None:
    """The block that a hook of TransformerLens or transformers names."""
    found = re.search(r"(?:blocks|layers|h)\.(\d+)(?:[.:]|$)", hook or "")
    return int(found[1]) if found else None


def recorded_scale(folder: Path) -> Any:
    """What a training or an import of an earlier version says that the SAE's activations are to be multiplied by."""
    path = folder / (RUN if (folder / RUN).is_file() else ORIGIN)
    said: Any = read_json(path) if path.is_file() else {}
    said = said.get("activations") if path.name == RUN else said
    return said.get("scale", 1.0) if isinstance(said, dict) else 1.0


def check_checksum(path: Path, tensors: dict[str, Tensor]) -> None:
    """ValueError unless the tensors have the checksum in the file's metadata; earlier versions wrote none."""
    words = _written_as(path)
    if "crc32" in words[:-1] and words[-1] != tensors_crc32(tensors):
        raise ValueError(f"{path}: damaged, its tensors do not have the checksum that was written with them")


def _written_as(path: Path) -> list[str]:
    """The words of the file's metadata: format, version, checksum; none in a foreign file."""
    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get("format", "").split()
    except SafetensorError:
        return []
