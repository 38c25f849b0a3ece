"""What a transcoder costs the language model: cross-entropy with what it reconstructs replaced by it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sampled_sae.lm.dropped import check_drop_tokens, left_out
from sampled_sae.lm.models import device_of, identity_of
from sampled_sae.lm.passes import batches_at
from sampled_sae.lm.splice_figures import (
    check_has_loss,
    check_one_place,
    checked_reconstruction,
    dropped_by_harvest,
    figures,
    harvested_place,
    mean_loss,
)
from sampled_sae.residual_stream.hook_points import HookPoint, check_points, mlp_points, points_of, replaced_point
from sampled_sae.support.argument_checks import check_integer
from sampled_sae.training.evaluation import Reconstruction, reconstruct_with

Transcode = Callable[[Tensor], Tensor]


class SpliceAt:
    """The loss of a model with something else at some of its places, made from what stands there, or at others.

    What is made of is read once, from the model as it is.

    Args:
        pairs: what is read, and what is replaced by something made of it.
        max_norms: of each of these places the largest norm of a token that is replaced.
        others: as in `PointSplice`.

    Attributes:
        as of `PointSplice`, without `about`.

    Raises:
        ValueError: as `PointSplice`; several places to replace, of several widths.
    """

    def __init__(
        self,
        model: Any,
        rows: Tensor,
        pairs: Sequence[tuple[HookPoint, HookPoint]],
        max_norms: dict[HookPoint, float],
        drop_first: bool,
        drop_tokens: Iterable[int],
        batch_size: int,
    ) -> None:
        check_has_loss(model, rows)
        self._size = check_integer("batch_size", batch_size, 1)
        self._model, self._rows, self._pairs = model.eval(), rows, pairs
        width_at = dict(zip(max_norms, check_points(model, [*max_norms], rows[:1].to(device_of(model)))))
        widths = [width_at[target] for _, target in pairs]
        if len(set(widths)) > 1:
            layers = ", ".join(str(target) for _, target in pairs)
            raise ValueError(f"layers={layers}: of widths {widths}; a crosscoder reads layers of one width")
        self._width = widths[0]
        # of each batch which tokens are replaced, bool [b, T], and what is read of them, float32 [n, pairs, d]
        self._kept: list[tuple[Tensor, Tensor]] = []
        totals: list[Tensor] = []
        special = check_drop_tokens(model, drop_tokens)
        for batch, found in batches_at([(model, point) for point in max_norms], rows, self._size):
            at = dict(zip(max_norms, found))
            out, _ = left_out(batch, found, drop_first, special, [*max_norms.values()])
            self._kept.append((~out, torch.stack([at[read][~out] for read, _ in pairs], dim=1)))
            totals.append(torch.stack([at[target][~out].double().sum(0) for _, target in pairs]))
        self.spliced_tokens = sum(len(x) for _, x in self._kept)
        if self.spliced_tokens == 0:
            raise ValueError(
                f"no token would be replaced: all are dropped, or exceed max_norms={[*max_norms.values()]}"
            )
        self._mean = (torch.stack(totals).sum(0) / self.spliced_tokens).float()
        self.ce_clean = mean_loss(model, rows, self._size)
        self.ce_zero = self._cross_entropy(self._everywhere(torch.zeros_like(self._mean)))
        self.ce_mean = self._cross_entropy(self._everywhere(self._mean))

    def _everywhere(self, same: Tensor) -> list[Tensor]:
        """[n, pairs, d] a batch, each token the same [pairs, d]."""
        return [same.expand(len(x), -1, -1) for _, x in self._kept]

    def _cross_entropy(self, made: list[Tensor], which: Sequence[int] | None = None) -> float:
        """Mean over all predicted tokens, in nats, with what was made, [n, pairs, d] a batch, at all places or some."""
        with ExitStack() as stack:
            for i in range(len(self._pairs)) if which is None else which:
                put = partial(_put, iter([(where, x_hat[:, i]) for (where, _), x_hat in zip(self._kept, made)]))
                stack.enter_context(replaced_point(self._model, *self._pairs[i], put))
            return mean_loss(self._model, self._rows, self._size)


def _put(of_batches: Iterator[tuple[Tensor, Tensor]], x: Tensor, y: Tensor) -> Tensor:
    """y [b, T, d] of one batch more with its x_hat [n, d] where its `where` [b, T] says."""
    (where, x_hat), after = next(of_batches), y.clone()
    after[where.to(y.device)] = x_hat.to(y)
    return after


class PointSplice(SpliceAt):
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
        self._read, self._target = read, target
        norms = {read: max_norms[0]}
        norms[target] = min(max_norms[1], norms.get(target, math.inf))
        super().__init__(model, rows, [(read, target)], norms, drop_first, drop_tokens, batch_size)
        places: dict[str, Any] = {"point": str(read)} | ({"target": {"point": str(target)}} if read != target else {})
        self.about = {**identity_of(model), **places, "rows": len(rows)}

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
        with torch.no_grad():
            made = [checked_reconstruction(reconstruct(x[:, 0]), (len(x), self._width)) for _, x in self._kept]
        return figures(self, self._cross_entropy([x_hat[:, None] for x_hat in made]), self._rows[:, 1:].numel())


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
