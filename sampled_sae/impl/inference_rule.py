"""How evaluation mode selects: by one threshold, by the rule of training on the batch, or inside a fixed set."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..config import MEMBERS, SampledSAEConfig
from . import threshold
from .encoder import Encoder
from .interface import Implementation
from .layer_weights import LayerWeights

NO_SET = "sae.inference_members is empty: inference='pool' needs a set, which sae.calibrate(x) chooses"


class Inference(NamedTuple):
    """One way to select codes.

    mode: "threshold" and "pool": every activation above `floors`. "batch": the rule of training. "token": the k largest
    of each token, of a TopK SAE. threshold: 0-dim. members: bool [F], for "pool", of a spread layer of the features
    here. Both None where they have no part.
    """

    mode: str
    threshold: Tensor | None = None
    members: Tensor | None = None

    @property
    def floors(self) -> Tensor:
        """What an activation must exceed: 0-dim, or [F], infinite outside the fixed set."""
        assert self.threshold is not None
        return self.threshold if self.members is None else torch.where(self.members, self.threshold, torch.inf)


def missing(sae: LayerWeights, cfg: SampledSAEConfig) -> str | None:
    """Why evaluation mode cannot select yet; None where it can."""
    if cfg.is_topk or cfg.inference == "batch":
        return None
    if cfg.inference == "pool" and not has_set(sae):
        return NO_SET
    return None if threshold.is_set(sae) else threshold.NEVER_SET


def of_evaluation(sae: LayerWeights, cfg: SampledSAEConfig) -> Inference:
    """That of evaluation mode.

    Raises:
        ValueError: a fixed set that was never chosen.
    """
    if cfg.is_topk:
        return Inference("token")
    return Inference("batch") if cfg.inference == "batch" else by_threshold(sae, cfg)


def by_threshold(sae: LayerWeights, cfg: SampledSAEConfig) -> Inference:
    """By the threshold that the SAE holds, and inside its fixed set where it has one.

    Raises:
        ValueError: a fixed set that was never chosen.
    """
    if cfg.inference != "pool":
        return Inference("threshold", sae.threshold)
    if not has_set(sae):
        raise ValueError(NO_SET)
    return Inference("pool", sae.threshold, sae.layout.local(getattr(sae, MEMBERS)))


def has_set(sae: LayerWeights) -> bool:
    """Whether the fixed set was ever chosen; it may be empty on one of several processes."""
    return bool(sae.layout.whole(getattr(sae, MEMBERS)).any())


def calibrated(parts: Implementation, encoder: Encoder, cfg: SampledSAEConfig, mode: str, l0: float) -> Inference:
    """ "threshold" or "pool" so that l0 features a token are active on the encoder's tokens, or all where fewer are.

    The set of "pool" holds the `cfg.inference_size` features of highest score over all these tokens; ties go to the
    lower feature.
    """
    members, mask, size = None, None, cfg.d_sae
    if mode == "pool":
        size = cfg.inference_size
        scores = parts.column_scores(encoder.operands.in_full(), cfg.score)
        members = parts.candidate_pool(scores, size, "top", None)
        mask = torch.zeros_like(scores, dtype=torch.bool).index_fill_(0, members, True)
    return Inference(mode, threshold.between(parts, encoder, l0, members, size), mask)


def adopt(sae: LayerWeights, found: Inference) -> None:
    """Makes a calibrated "threshold" or "pool" that of the SAE."""
    assert found.threshold is not None
    threshold.set_calibrated(sae, found.threshold)
    if found.members is not None:
        sae.layout.local(getattr(sae, MEMBERS)).copy_(found.members)


def follow(sae: LayerWeights, before: SampledSAEConfig | None, now: SampledSAEConfig) -> None:
    """The buffers of an SAE whose config becomes `now`: a threshold inside one set is none for another set."""
    sizes = [c.inference_size if c is not None and c.inference == "pool" else None for c in (before, now)]
    if sizes[0] == sizes[1]:
        return
    if sizes[1] is None:
        delattr(sae, MEMBERS)
    else:
        nothing = torch.zeros(now.d_sae, dtype=torch.bool, device=sae.threshold.device)
        sae.register_buffer(MEMBERS, sae.layout.adopt(nothing, MEMBERS))
    if before is not None:
        threshold.void(sae)
