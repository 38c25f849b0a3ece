"""What all splices measure: the cross-entropy of the next token, and how much of it a reconstruction recovers."""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as nnf

from sampled_sae.lm.models import check_rows, device_of, identity_of, predicts_next_token
from sampled_sae.lm.passes import Place
from sampled_sae.residual_stream.hook_points import HookPoint
from sampled_sae.training.same_settings import check_harvested_model, identity, in_words


class Measured(Protocol):
    """Cross-entropies in nats a token, of the model as it is and with what is replaced all zero, or all its mean."""

    ce_clean: float
    ce_zero: float
    ce_mean: float
    spliced_tokens: int


def check_has_loss(model: Any, rows: Tensor) -> None:
    """ValueError for rows that the model does not take, or a model without a head for the next token."""
    check_rows(model, rows)
    if not predicts_next_token(model):
        raise ValueError(f"model must predict the next token: {type(model).__name__} has no head to do it with")


def check_one_place(manifest: dict[str, Any]) -> None:
    """ValueError for the manifest of layers side by side, which a crosscoder reads."""
    if beside := manifest.get("layers"):
        raise ValueError(f"manifest is of {len(beside)} layers side by side: LayersSplice is for it")


def harvested_place(about: dict[str, Any]) -> Place:
    """The block or other place of what a manifest or an `identity` tells of; ValueError where it says none."""
    if about.get("point"):
        return HookPoint.parse(about["point"])
    if about.get("layer") is None:
        raise ValueError(f"manifest is of {in_words(about)}, that no harvest wrote: nothing to splice")
    return int(about["layer"])


def dropped_by_harvest(model: Any, manifest: dict[str, Any], insist: bool) -> dict[str, Any]:
    """What a splice leaves out as the harvest did; ValueError for a model of other weights, unless `insist`."""
    if not insist:
        check_harvested_model(identity(manifest), identity_of(model))
    settings = manifest["settings"]
    return {"drop_first": settings.get("drop_first", True), "drop_tokens": settings.get("drop_tokens", ())}


def figures(measured: Measured, ce: float, predicted: int) -> dict[str, Any]:
    """What `evaluate` of a splice returns: `ce` is the spliced model's, over so many predicted tokens."""
    clean, zero, mean = measured.ce_clean, measured.ce_zero, measured.ce_mean
    return {
        "ce_clean": clean,
        "ce_spliced": ce,
        "ce_zero": zero,
        "ce_mean": mean,
        "loss_recovered_zero": recovered(zero, ce, clean),
        "loss_recovered_mean": recovered(mean, ce, clean),
        "predicted_tokens": predicted,
        "spliced_tokens": measured.spliced_tokens,
    }


def next_token_loss(logits: Tensor, rows: Tensor) -> float:
    """Cross-entropy of logits [b, T, V] against token ids [b, T], in nats, summed over b (T - 1) tokens."""
    total = 0.0
    for row, of_row in zip(rows.to(logits.device), logits, strict=True):  # row by row: the softmax is another copy
        total += float(nnf.cross_entropy(of_row[:-1].float(), row[1:], reduction="sum"))
    return total


@torch.no_grad()
def mean_loss(model: Any, rows: Tensor, size: int) -> float:
    """Cross-entropy of the next token over rows of token ids [N, T], so many at a time, in nats a predicted token."""
    total = 0.0
    for batch in rows.split(size):
        batch = batch.to(device_of(model))
        total += next_token_loss(model(input_ids=batch, use_cache=False).logits, batch)
    return total / rows[:, 1:].numel()


def checked_reconstruction(x_hat: Any, shape: tuple[int, ...]) -> Tensor:
    """What somebody's function has made; TypeError, ValueError for another shape or values that are not finite."""
    if not isinstance(x_hat, Tensor):
        raise TypeError(
            f"reconstruct returned {type(x_hat).__name__}: must be a tensor; for an SAE give reconstruct_with(sae)"
        )
    if x_hat.shape != shape:
        raise ValueError(f"reconstruct returned {list(x_hat.shape)} for activations {list(shape)}")
    if not x_hat.isfinite().all():
        raise ValueError("reconstruct returned values that are not finite (NaN or inf)")
    return x_hat


def recovered(ce_ablated: float, ce_spliced: float, ce_clean: float) -> float:
    """1 where nothing is lost, 0 where as much as by the ablation; NaN where that changes nothing."""
    if ce_ablated == ce_clean:
        return math.nan
    return (ce_ablated - ce_spliced) / (ce_ablated - ce_clean)
