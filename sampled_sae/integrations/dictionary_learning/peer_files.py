"""The tensors of a `SampledDictionary` under dictionary_learning's names, as its files and state dicts have them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ...formats.dictionary_learning import UNSET
from ...sae import SampledSAE
from ...support.argument_checks import describe

# in an ae.pt, inside a SampledDictionary, and whether one is the other's transpose
Names = tuple[tuple[str, str, bool], ...]
NAMES: Names = (
    ("encoder.weight", "sae.W_enc", True),
    ("encoder.bias", "sae.b_enc", False),
    ("decoder.weight", "sae.W_dec", True),
    ("b_dec", "sae.b_dec", False),
    ("threshold", "sae.threshold", False),
)
OURS_ALONE = ("sae.input_scale", "sae.threshold_steps", "sae.calibrated_at", "sae.tokens_since_active")


class Named(Protocol):
    """What is asked of a `SampledDictionary`."""

    names: Names
    sae: SampledSAE
    k: Tensor


def held_k(path: Path, tensors: dict[str, Tensor], k: int | None) -> int:
    """The k of a file's tensors, or where it holds none the one that is given.

    Raises:
        ValueError: neither, or another than that of the file.
    """
    held = int(tensors["k"]) if "k" in tensors else k
    if held is None:
        raise ValueError(f"k=None: {path} does not hold k, so it must be given")
    if k is not None and k != held:
        raise ValueError(f"k={k!r}: {path} holds k={held}")
    return held


def matrix_sizes(path: Path, tensors: dict[str, Tensor], name: str, sizes: str) -> torch.Size:
    """The shape of a matrix among a file's tensors; ValueError where it is none, with what its `sizes` are."""
    weight = tensors.get(name)
    if weight is None or weight.dim() != 2:
        raise ValueError(f"{path}: {name}={describe(weight)}: must be a tensor [{sizes}]")
    return weight.shape


def to_peer_names(module: Named, state: dict[str, Tensor], prefix: str, metadata: Any) -> None:
    """Hook after `state_dict`: the peer's tensors under its names, each contiguous, and nothing else."""
    for theirs, ours, transposed in module.names:
        tensor = state.pop(prefix + ours)
        state[prefix + theirs] = tensor.t().contiguous() if transposed else tensor
    for name in OURS_ALONE:
        del state[prefix + name]


def from_peer_names(module: Named, state: dict[str, Tensor], prefix: str, *others: Any) -> None:
    """Hook before loading: the inverse. Files of some versions hold no threshold, or no k."""
    state.setdefault(prefix + "threshold", torch.tensor(UNSET))
    state.setdefault(prefix + "k", module.k)
    for theirs, ours, transposed in module.names:
        if prefix + theirs in state:
            tensor = state.pop(prefix + theirs)
            state[prefix + ours] = tensor.t() if transposed else tensor
    state[prefix + "sae.threshold_steps"] = (state[prefix + "sae.threshold"] >= 0).long()
    state[prefix + "sae.tokens_since_active"] = module.sae.tokens_since_active
    module.sae.memory.pool.reset()
    module.sae.cfg = replace(module.sae.cfg, k=int(state[prefix + "k"]))
