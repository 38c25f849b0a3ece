"""What a crosscoder costs the language model: cross-entropy with the reconstructions of its layers in their places."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from sampled_sae.lm.models import identity_of
from sampled_sae.lm.point_splice import SpliceAt
from sampled_sae.lm.splice_figures import (
    checked_reconstruction,
    dropped_by_harvest,
    figures,
    harvested_place,
    recovered,
)
from sampled_sae.residual_stream.hook_points import HookPoint, check_places, points_of
from sampled_sae.training.evaluation import Reconstruction
from sampled_sae.training.same_settings import identity, in_words, is_same_model

Crosscode = Callable[[Tensor], Tensor]


class LayersSplice(SpliceAt):
    """Puts what a crosscoder makes of several layers of one model into all of them, and measures the model's loss.

    All reconstructions are made from the activations of the model as it is, and then stand in one forward pass. A later
    layer of the residual stream holds what earlier ones have added up to: its reconstruction takes the place of theirs,
    which reach it through the tokens that are left as they are alone. So each layer is spliced alone too, with the
    others as they come: that tells what the crosscoder makes of it.

    What the harvest leaves out is left as it is at all layers: position 0, `drop_tokens`, and tokens whose norm at one
    of them exceeds the largest there.

    Args:
        model: causal language model; put in eval mode.
        rows: int64 [N, context] token ids.
        layers: blocks, from 0, whose output is replaced, and other places as `HookPoint`; at least two, of one width,
            in the order of the crosscoder.
        max_norms: the largest norm of a token that is replaced, one a layer; none where absent.
        drop_first, drop_tokens: as in `SpliceEvaluator`.
        batch_size: rows a forward pass.

    Attributes:
        ce_clean, ce_zero, ce_mean: cross-entropy of the next token in nats a token, of the model as it is, and with all
            that is replaced zero, or the mean of its layer.
        ce_zero_layers, ce_mean_layers: the same with one layer replaced, for each.
        spliced_tokens: how many tokens are replaced.
        about: name and fingerprint of the model, its layers or places, and number of rows, which a sweep records.

    Raises:
        ValueError: for bad arguments (an encoder, which predicts no next token, among them), or rows of which nothing
            would be replaced.
    """

    def __init__(
        self,
        model: Any,
        rows: Tensor,
        layers: Sequence[int | HookPoint],
        *,
        max_norms: Sequence[float] | None = None,
        drop_first: bool = True,
        drop_tokens: Iterable[int] = (),
        batch_size: int = 4,
    ) -> None:
        places = check_places(model, layers)
        points = points_of(model, places)
        if len(set(points)) < 2 or len(set(points)) < len(points):
            raise ValueError(f"layers={_in_words(places)}: must be at least 2, none twice; SpliceEvaluator is for one")
        most = [math.inf] * len(points) if max_norms is None else [float(norm) for norm in max_norms]
        if len(most) != len(points) or not all(norm > 0 for norm in most):
            raise ValueError(f"max_norms={max_norms}: must be one above 0 for each of {len(points)} layers")
        norms = dict(zip(points, most))
        super().__init__(model, rows, [(point, point) for point in points], norms, drop_first, drop_tokens, batch_size)
        self.about = {**identity_of(model), **_as_harvested(places), "rows": len(rows)}
        self.ce_zero_layers = self._of_each(self._everywhere(torch.zeros_like(self._mean)))
        self.ce_mean_layers = self._of_each(self._everywhere(self._mean))

    @classmethod
    def of_harvest(
        cls, model: Any, rows: Tensor, manifest: dict[str, Any], *, insist: bool = False, **options: Any
    ) -> LayersSplice:
        """The evaluator for what `harvest_beside` wrote, as the manifest of its `StackedActivations` says it.

        Args:
            model, rows: as for the class; rows usually those held out.
            manifest: of activations side by side, all of which were harvested.
            insist: take a model with other weights than the one that was harvested.
            options: further arguments of the class.

        Raises:
            ValueError: as the class; other weights, naming both models; activations of several models, or without one.
        """
        abouts = check_of_one_model(manifest)
        places = [harvested_place(about) for about in abouts]
        dropping = dropped_by_harvest(model, manifest, insist)
        return cls(model, rows, places, max_norms=[about["max_norm"] for about in abouts], **dropping, **options)

    def evaluate(self, reconstruct: Crosscode) -> dict[str, Any]:
        """Splice one reconstruction in.

        Args:
            reconstruct: takes the activations of all layers, float32 [n, layers, d], and returns the same shape in the
                same units, as `reconstruct_with(sae)` does.

        Returns:
            The figures of `SpliceEvaluator.evaluate`, of all layers in one forward pass; `ce_spliced_layers`,
            `ce_zero_layers`, `ce_mean_layers`, `loss_recovered_zero_layers` and `loss_recovered_mean_layers`, with one
            layer spliced and the others as they come, a list each.

        Raises:
            ValueError: another shape, values that are not finite; an SAE that is no crosscoder of as many layers.
        """
        if isinstance(reconstruct, Reconstruction) and reconstruct.sae.cfg.layers != len(self._pairs):
            raise ValueError(
                f"reconstruct: is of {reconstruct.kind} with layers={reconstruct.sae.cfg.layers}; into "
                f"{len(self._pairs)} layers goes a crosscoder of as many"
            )
        with torch.no_grad():
            made = [checked_reconstruction(reconstruct(x), x.shape) for _, x in self._kept]
        alone = self._of_each(made)
        found = figures(self, self._cross_entropy(made), self._rows[:, 1:].numel()) | {"ce_spliced_layers": alone}
        for name, ablated in (("zero", self.ce_zero_layers), ("mean", self.ce_mean_layers)):
            of_each = [recovered(gone, spliced, self.ce_clean) for gone, spliced in zip(ablated, alone)]
            found |= {f"ce_{name}_layers": ablated, f"loss_recovered_{name}_layers": of_each}
        return found

    def _of_each(self, made: list[Tensor]) -> list[float]:
        """Cross-entropy with what was made in one place after the other."""
        return [self._cross_entropy(made, [i]) for i in range(len(self._pairs))]


def check_of_one_model(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """What the manifest of activations side by side says of each of them.

    Raises:
        ValueError: it is of one layer, or of several models, naming them.
    """
    abouts = manifest.get("layers") or []
    if len(abouts) < 2:
        raise ValueError(f"manifest is of {in_words(identity(manifest))}, not of layers side by side")
    if not all(is_same_model(about, abouts[0]) for about in abouts):
        names = " beside ".join(in_words(about) for about in abouts)
        raise ValueError(f"manifest is of several models, {names}; layers of one model are spliced together")
    return list(abouts)


def _in_words(places: Sequence[int | HookPoint]) -> str:
    return f"[{', '.join(map(str, places))}]"


def _as_harvested(places: Sequence[int | HookPoint]) -> dict[str, str]:
    """The layers or places as the `identity` of activations side by side has them, where they are of one kind."""
    for name, kind in (("layer", int), ("point", HookPoint)):
        if all(isinstance(place, kind) for place in places):
            return {name: ", ".join(map(str, places))}
    return {}
