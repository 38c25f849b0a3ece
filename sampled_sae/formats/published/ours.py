"""A `SampledSAE`'s own files, read for inference alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ... import pretrained
from ...config import MEMBERS, SampledSAEConfig
from ...impl.inference_rule import NO_SET
from ...impl.threshold import NEVER_SET, OF_ANOTHER_SET, RUNNING_MEAN, VOID
from ..origin import Origin
from ..portable import PortableSAE, Say
from .reading import Place, Reading, of_portable

NAME = pretrained.FORMAT


def read(place: Place, say: Say) -> Reading:
    """The SAE in a folder, under the rule of its evaluation mode.

    Raises:
        ValueError: as `load_pretrained`; a threshold or a fixed set that was never set, where the rule is by it;
            `inference="batch"`, which depends on the whole batch.
    """
    fields, tensors = pretrained.load_pretrained(place.path)
    config = SampledSAEConfig.from_dict(fields)
    threshold = tensors["threshold"]
    if not config.is_topk:
        if config.inference == "batch":
            instead = "load it with SampledSAE.from_pretrained, or save it with inference='threshold'"
            raise ValueError(
                f"{place.path / pretrained.CONFIG}: inference='batch' depends on the whole batch, an InferenceSAE does "
                f"not; {instead}"
            )
        _check_threshold(place.path, tensors, say)
        if config.inference == "pool":
            threshold = torch.where(tensors[MEMBERS], threshold, torch.inf)
    names = (*pretrained.WEIGHT_NAMES, pretrained.SKIP)
    weights: dict[str, Any] = {name: tensors[name] for name in names if name in tensors}
    sae = PortableSAE.by_config(config, weights, "topk" if config.is_topk else "threshold", threshold)
    kind = "transcoder" if config.is_transcoder else "SAE"
    if config.is_crosscoder:
        kind = f"crosscoder of {config.layers} layers, one behind the other,"
        sae = sae.read_at(1.0) if isinstance(config.input_scale, tuple) else sae
    return of_portable(sae, f"TopK {kind}" if config.is_topk else f"threshold {kind}", origin(place.path), say)


def _check_threshold(folder: Path, tensors: dict[str, Tensor], say: Say) -> None:
    """Whether codes by it are to be relied on; a file of an earlier version counts as calibrated."""
    steps = int(tensors["threshold_steps"])
    if steps == 0 and float(tensors["threshold"]) <= 0:
        raise ValueError(f"{folder / pretrained.WEIGHTS}: {NEVER_SET}, and save it again")
    if MEMBERS in tensors and not bool(tensors[MEMBERS].any()):
        raise ValueError(f"{folder / pretrained.WEIGHTS}: {NO_SET}, and save it again")
    calibrated_at = int(tensors.get("calibrated_at", steps))
    if calibrated_at != steps:
        say(OF_ANOTHER_SET if calibrated_at == VOID else RUNNING_MEAN)


def origin(folder: Path) -> Origin:
    """What an SAE reads, as its training or its import left it.

    Raises:
        ValueError: a file that does not say it, with its name.
    """
    path = folder / (pretrained.RUN if (folder / pretrained.RUN).is_file() else pretrained.ORIGIN)
    recorded = pretrained.recorded_origin(folder)
    recorded.pop("scale", None)  # in config.json since there is input_scale
    try:
        return Origin(**recorded).checked(path)
    except TypeError as error:
        raise ValueError(f"{path}: {error}") from None
