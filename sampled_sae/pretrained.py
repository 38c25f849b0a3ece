"""The saved form of an SAE: `config.json` and `sae.safetensors`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .config import SampledSAEConfig
from .support.argument_checks import FLOATS
from .support.atomic_files import read_json, read_tensors, write_atomically, write_json
from .support.checksums import tensors_crc32

FORMAT = "sampled-sae"
VERSION = 1
WEIGHTS = "sae.safetensors"
CONFIG = "config.json"
WEIGHT_NAMES = ("W_enc", "b_enc", "W_dec", "b_dec")
TENSORS = (*WEIGHT_NAMES, "threshold", "threshold_steps", "tokens_since_active")


def save_pretrained(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """W_enc is written as [d_in, d_sae], row-major, as SAELens and SAEBench have it."""
    tensors = {name: tensors[name].detach().cpu().contiguous() for name in TENSORS}
    # One entry: safetensors writes several in a random order, and the same SAE should give the same bytes.
    metadata = {"format": f"{FORMAT} {VERSION} crc32 {tensors_crc32(tensors)}"}
    write_atomically(folder / WEIGHTS, lambda path: save_file(tensors, path, metadata))
    write_json(folder / CONFIG, {"format": FORMAT, "version": VERSION, "sae": config})


def load_pretrained(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(config fields, tensors), checked against each other.

    Raises:
        ValueError: naming the file and what is wrong with it.
    """
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
        SampledSAEConfig.from_dict(fields)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{folder / CONFIG}: {error}") from None
    d_in, d_sae = fields.get("d_in"), fields.get("d_sae")
    shapes = {"W_enc": (d_in, d_sae), "b_enc": (d_sae,), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    shapes |= {"threshold": (), "threshold_steps": (), "tokens_since_active": (d_sae,)}
    for name in TENSORS:
        if name not in tensors:
            raise ValueError(f"{path}: tensor {name!r} is missing; it holds {sorted(tensors)}")
        if tuple(tensors[name].shape) != shapes[name]:
            raise ValueError(f"{path}: {name} is {tuple(tensors[name].shape)}, config.json says {shapes[name]}")
        if name in WEIGHT_NAMES and tensors[name].dtype not in FLOATS:
            raise ValueError(f"{path}: {name} is {tensors[name].dtype}, must be one of {', '.join(map(str, FLOATS))}")
    return fields, {name: tensors[name] for name in TENSORS}


def check_checksum(path: Path, tensors: dict[str, Tensor]) -> None:
    """ValueError unless the tensors have the checksum in the file's metadata; earlier versions wrote none."""
    with safe_open(path, "pt") as file:
        words = (file.metadata() or {}).get("format", "").split()
    if "crc32" in words[:-1] and words[-1] != tensors_crc32(tensors):
        raise ValueError(f"{path}: damaged, its tensors do not have the checksum that was written with them")
