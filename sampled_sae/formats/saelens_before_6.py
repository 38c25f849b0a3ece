"""SAELens' files from before its release 6 in the words of that release, as SAELens itself reads them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

ORIGIN = ("model_name", "hook_name", "hook_layer", "context_size")


def config(found: dict[str, Any]) -> dict[str, Any]:
    """cfg.json; as it is from release 6 on, which puts its version into the metadata."""
    metadata = found.get("metadata")
    version = metadata.get("sae_lens_version") if isinstance(metadata, dict) else found.get("sae_lens_version")
    if isinstance(version, str) and version.split(".")[0].isdigit() and int(version.split(".")[0]) >= 6:
        return found
    named = {"hook_name": found.get("hook_point"), "architecture": "standard", **found}
    of_activation = found.get("activation_fn_kwargs")
    words = (found.get(name) for name in ("activation_fn_str", "activation_fn", "architecture"))
    if "topk" in words and isinstance(of_activation, dict):
        named |= {"architecture": "topk", "k": of_activation.get("k")}
    if isinstance(named.get("normalize_activations"), bool):
        named["normalize_activations"] = "expected_average_only_in" if named["normalize_activations"] else "none"
    if "reshape_activations" not in named and "hook_z" in str(named["hook_name"]):
        named["reshape_activations"] = "hook_z"
    if not isinstance(metadata, dict):
        named["metadata"] = {name: named[name] for name in ORIGIN if named.get(name) is not None}
    return named


def tensors(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights: without a factor for each feature that is 1, and the threshold in place of its logarithm."""
    named = dict(found)
    factor = named.get("scaling_factor")
    if factor is not None and torch.allclose(factor, torch.ones_like(factor)):
        del named["scaling_factor"]
    if "log_threshold" in named:
        named["threshold"] = named.pop("log_threshold").exp()
    return named
