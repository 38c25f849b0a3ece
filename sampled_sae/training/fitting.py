"""Whether activations and a config fit each other, before and at the first batch; whether a training has room."""

from __future__ import annotations

from pathlib import Path

import torch

from ..config import SampledSAEConfig
from ..pretrained import check_target
from ..support.output_folder import check_output_folder, sharing
from ..support.timing import check_memory
from .activation_stream import StreamedActivations
from .activations import Activations
from .checkpoint import CHECKPOINT
from .feed import Feed, TrainingBatch
from .sharded_checkpoint import RECORD
from .train_config import TrainConfig

# Below this share of their mean square, what tells tokens apart drowns in the rounding of float32.
LEAST_VARIANCE = 1e-7


def check_width(sae_config: SampledSAEConfig, store: Activations | StreamedActivations) -> None:
    """ValueError where an SAE cannot be trained on these activations."""
    if sae_config.d_out != store.d_out:
        none = "has no targets: PairedActivations (--targets) puts them beside it"
        held = none if store.d_out is None else f"has targets of {store.d_out}"
        raise ValueError(f"d_out={sae_config.d_out}: {store.where} {held}")
    if sae_config.layers != store.layers:
        beside = "; StackedActivations (--beside) puts several side by side" if store.layers == 1 else ""
        raise ValueError(f"layers={sae_config.layers}: {store.where} has {store.layers}{beside}")
    if sae_config.d_in != store.d_in:
        raise ValueError(f"d_in={sae_config.d_in}: the activations in {store.where} have {store.d_in}")


def check_fits(sae_config: SampledSAEConfig, feed: Feed) -> None:
    """ValueError where an SAE of their width cannot be trained on these activations in their units."""
    # the scale of a stream is known once its first block is read
    if sae_config.input_scale != 1 and sae_config.input_scale != feed.scale:
        raise ValueError(
            f"input_scale={sae_config.input_scale!r}: the training multiplies the activations in {feed.store.where} by "
            f"{feed.scale}; leave it at 1 to have it set"
        )
    if sae_config.output_scale != 1 and sae_config.output_scale != feed.output_scale:
        raise ValueError(
            f"output_scale={sae_config.output_scale!r}: the training multiplies the targets in {feed.store.where} by "
            f"{feed.output_scale}; leave it at 1 to have it set"
        )


def checkpoint_bytes(sae_config: SampledSAEConfig, train_config: TrainConfig) -> int:
    """Of the weights, in float32, and of both moments."""
    moments = 2 * getattr(torch, train_config.moments).itemsize
    return (sae_config.width_in + sae_config.width_out) * sae_config.d_sae * (4 + moments)


def check_room(sae_config: SampledSAEConfig, train_config: TrainConfig, feed: Feed, folder: Path) -> None:
    """ValueError where memory or disk are too small for a training, or `folder` is not one to write it to."""
    needed, ranks = checkpoint_bytes(sae_config, train_config), feed.ranks
    feed.stream.check_room()
    here = sharing(None, None, ranks)
    with ranks.together():
        # each process has a GPU of its own, if any
        together = 1 if feed.device.type == "cuda" else len(here)
        check_memory(f"d_sae={sae_config.d_sae}", together * needed // ranks.feature[1], feed.device)
        # A checkpoint is written beside the one before it.
        begun = any((folder / name).exists() for name in (CHECKPOINT, RECORD))
        check_output_folder(folder, needed if begun else 2 * needed)
        check_target(folder)


def check_variance(batch: TrainingBatch, n_tokens: int, where: str) -> None:
    """ValueError where the first batch of the activations in `where`, n_tokens in all, does (all but) not vary."""
    if n_tokens > 1 and batch.variance <= LEAST_VARIANCE * max(batch.square, batch.x.shape[1]):
        raise ValueError(
            f"{where}: the activations of the first {n_tokens} tokens are all but the same (variance "
            f"{batch.variance:.3g} at a mean square of {batch.square:.3g}): there is nothing to learn from them"
        )
