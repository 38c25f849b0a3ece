"""What a transcoder costs the language model: cross-entropy with what it reconstructs replaced by it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from sampled_sae.lm.dropped import check_drop_tokens, dropped
from sampled_sae.lm.harvest_points import point_batches
from sampled_sae.lm.models import device_of, identity_of
from sampled_sae.lm.splice_figures import (
    check_has_loss,
    check_one_place,
    checked_reconstruction,
    dropped_by_harvest,
    figures,
    mean_loss,
)
from sampled_sae.residual_stream.hook_points import HookPoint, check_points, mlp_points, points_of, replaced_point
from sampled_sae.support.argument_checks import check_integer
from sampled_sae.training.evaluation import Reconstruction, reconstruct_with
from sampled_sae.training.same_settings import in_words

Transcode = Callable[[Tensor], Tensor]


class PointSplice:
    """Replaces what stands at `target` by what is made of what stands at `read`, and measures the model's loss.

    A spliced run leaves as it is what the harvest leaves out: position 0, `drop_tokens`, and tokens whose norm exceeds
    the largest at either place.

    Args:
        model: causal language model; put in eval mode.
        rows: int64 [N, context] token ids.
        read, target: two places, or one, of whose activations there is an SAE.
        max_norms: the largest norm at `read` and at `target` of a token that is replaced.
        drop_first, drop_tokens: as in `SpliceEvaluator`.
        batch_size: rows a forward pass.

    Attributes:
        ce_clean, ce_zero, ce_mean: cross-entropy of the next token in nats a token, of the model as it is, and with
            what is replaced all zero, or all its mean.
        spliced_tokens: how many tokens are replaced.
        about: name, fingerprint and places of the model, and number of rows, which a sweep records.

    Raises:
        ValueError: for bad arguments (an encoder, which predicts no next token, among them), or rows of which nothing
            would be replaced.
    """

    def __init__(
        self,
        model: Any,
        rows: Tensor,
        read: HookPoint,
        target: HookPoint,
        *,
        max_norms: tuple[float, float] = (math.inf, math.inf),
        drop_first: bool = True,
        drop_tokens: Iterable[int] = (),
        batch_size: int = 4,
    ) -> None:
        check_has_loss(model, rows)
        self._size = check_integer("batch_size", batch_size, 1)
        self._model, self._rows, self._read, self._target = model.eval(), rows, read, target
        self._width = check_points(model, [read, target], rows[:1].to(device_of(model)))[1]
        places: dict[str, Any] = {"point": str(read)} | ({"target": {"point": str(target)}} if read != target else {})
        self.about = {**identity_of(model), **places, "rows": len(rows)}
        self._replaced: list[Tensor] = []  # bool [b, T] each
        total, tokens = torch.zeros(self._width, dtype=torch.float64, device=device_of(model)), 0
        special = check_drop_tokens(model, drop_tokens)
        for batch, (x, y) in point_batches(model, rows, [read, target], self._size):
            out = dropped(batch, x, drop_first, special, max_norms[0])[0]
            out |= dropped(batch, y, False, (), max_norms[1])[0]
            self._replaced.append(~out)
            total += y[~out].double().sum(0)
            tokens += int((~out).sum())
        if tokens == 0:
            raise ValueError(f"no token would be replaced: all are dropped, or exceed max_norms={max_norms}")
        self.spliced_tokens = tokens
        mean = (total / tokens).float()
        self.ce_clean = self._cross_entropy(None)
        self.ce_zero = self._cross_entropy(lambda x: x.new_zeros(len(x), self._width))
        self.ce_mean = self._cross_entropy(lambda x: mean.to(x.device).expand(len(x), -1))

    @classmethod
    def of_harvest(
        cls, model: Any, rows: Tensor, manifest: dict[str, Any], *, insist: bool = False, **options: Any
    ) -> PointSplice:
        """The evaluator for what `harvest_pair` wrote, as the manifest of a pair, or of one of its stores, says it.

        Args:
            model, rows: as for the class; rows usually those held out.
            manifest: of a pair's `PairedActivations`, or of the store of one place.
            insist: take a model with other weights than the one that was harvested.
            options: further arguments of the class.

        Raises:
            ValueError: as the class; other weights, naming both models; a manifest of activations without a model.
        """
        of_target = manifest.get("target", manifest)
        check_one_place(manifest)
        read, target = points_of(model, [harvested_place(about) for about in (manifest, of_target)])
        dropping = dropped_by_harvest(model, manifest, insist)
        norms = manifest["max_norm"], of_target["max_norm"]
        return cls(model, rows, read, target, max_norms=norms, **dropping, **options)

    def evaluate(self, reconstruct: Transcode) -> dict[str, float]:
        """Splice one reconstruction in; the figures are those of `SpliceEvaluator.evaluate`.

        Args:
            reconstruct: takes what stands at `read`, float32 [n, d_in], to what is put at `target`, [n, d_out], as
                `reconstruct_with(sae)` does.

        Raises:
            ValueError: another shape, values that are not finite; an SAE where the two places differ, a transcoder
                where they are one.
        """
        needed = "an SAE" if self._read == self._target else "a transcoder"
        if isinstance(reconstruct, Reconstruction) and reconstruct.kind != needed:
            raise ValueError(f"reconstruct: from {self._read} to {self._target} goes {needed}")
        ce = self._cross_entropy(lambda x: checked_reconstruction(reconstruct(x), (len(x), self._width)))
        return figures(self, ce, self._rows[:, 1:].numel())

    def _cross_entropy(self, fn: Transcode | None) -> float:
        """Mean over all predicted tokens, in nats, with fn of what is read in the place of what is replaced."""
        kept = iter(self._replaced)

        def spliced(x: Tensor, y: Tensor) -> Tensor:
            where, after = next(kept).to(y.device), y.clone()
            if fn is not None:
                after[where] = fn(x[where.to(x.device)].float()).to(y)
            return after

        with replaced_point(self._model, self._read, self._target, spliced):
            return mean_loss(self._model, self._rows, self._size)


def harvested_place(about: dict[str, Any]) -> int | HookPoint:
    """The block or other place of what a manifest or an `identity` tells of; ValueError where it says none."""
    if about.get("point"):
        return HookPoint.parse(about["point"])
    if about.get("layer") is None:
        raise ValueError(f"manifest is of {in_words(about)}, that no harvest wrote: nothing to splice")
    return int(about["layer"])


def transcoded_cross_entropy(
    model: Any, rows: Tensor, layer: int, transcode: Transcode, **options: Any
) -> dict[str, float]:
    """Cross-entropy with the MLP of block `layer` replaced: `PointSplice` from its input to its output, once.

    Args:
        transcode: inputs [n, d] of the MLP to its outputs [n, d_out], as `transcode_with(sae)`.
        options: of `PointSplice`.
    """
    return PointSplice(model, rows, *mlp_points(model, layer), **options).evaluate(transcode)


def transcode_with(sae: Any) -> Reconstruction:
    """x [n, d_in] to the reconstruction [n, d_out] of a transcoder, skip included, in the mode it is in."""
    if not sae.cfg.is_transcoder:
        raise ValueError("sae: is no transcoder (d_out=None); reconstruct_with(sae) is that of an SAE")
    return reconstruct_with(sae)
