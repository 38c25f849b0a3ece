"""Qwen-Scope's files: `layer<n>.sae.pt`, one TopK SAE of the residual stream a file.

W_enc [F, d], W_dec [d, F], b_enc and b_dec; b_dec is not subtracted from the input. Model and k stand in the name of
the repository alone: `Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_50`.
"""

from __future__ import annotations

import re
from pathlib import Path

from .. import dictionary_learning
from ..origin import Origin
from ..portable import Say
from ..tensor_checks import check_tensors
from .reading import Place, Reading, config_of

NAME = "qwen_scope"
FILE = re.compile(r"layer(\d+)\.sae\.pt")


def find(path: Path) -> list[Path]:
    """The files of this layout at a path: itself, or those in a folder."""
    if path.is_dir():
        return sorted(file for file in path.iterdir() if FILE.fullmatch(file.name))
    return [path] if path.is_file() and FILE.fullmatch(path.name) else []


def read(place: Place, say: Say) -> Reading:
    """The SAE in a file.

    Raises:
        ValueError: several files, no k, wrong tensors; naming the file.
    """
    files = find(place.path)
    if len(files) != 1:
        raise ValueError(f"{place.path}: holds {len(files)} SAEs, {', '.join(f.name for f in files)}: name one with at")
    (path,) = files
    tensors = dictionary_learning.read_state(path)
    encoder = tensors.get("W_enc")
    if encoder is None or encoder.dim() != 2:
        raise ValueError(f"{path}: must hold the matrix W_enc [F, d], holds {sorted(tensors)}")
    d_sae, d_in = encoder.shape
    check_tensors(path, tensors, {"W_enc": (d_sae, d_in), "W_dec": (d_in, d_sae), "b_enc": (d_sae,), "b_dec": (d_in,)})
    named = re.search(r"SAE-Res-(.+)-W\d+K-L0_(\d+)", place.name)
    k = place.k if place.k is not None else int(named[2]) if named else None
    if k is None:
        raise ValueError(f"{path}: does not say k, the features of a token, and neither does {place.name!r}: give k")
    layer = int(FILE.fullmatch(path.name)[1])  # type: ignore[index]  # find() has looked
    origin = Origin(f"Qwen/{named[1]}" if named else None, layer, f"blocks.{layer}.hook_resid_post")
    config = config_of(path, d_in=d_in, d_sae=d_sae, rule="topk", k=k)
    return Reading("TopK SAE", config, {**tensors, "W_enc": encoder.t(), "W_dec": tensors["W_dec"].t()}, origin)
