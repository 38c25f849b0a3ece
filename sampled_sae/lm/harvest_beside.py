"""Harvest several layers of a model, or several models, over the same tokens, as a crosscoder is trained on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sampled_sae.lm.finite_rows import check_finite_rows
from sampled_sae.lm.harvest_files import check_kind, check_resumes, checked_settings, write_stores
from sampled_sae.lm.harvest_points import OPTIONS
from sampled_sae.lm.models import device_of
from sampled_sae.residual_stream.blocks import check_layer
from sampled_sae.residual_stream.several_layers import capture_layers
from sampled_sae.support.all_ranks import ranks_of
from sampled_sae.support.argument_checks import check_integer
from sampled_sae.support.output_folder import check_output_place, held_by_first
from sampled_sae.support.remote_files import AnyPath, output_place
from sampled_sae.training.opening import stack_part
from sampled_sae.training.stacked_activations import StackedActivations

Place = tuple[Any, int]


def harvest_beside(
    models: Any,
    rows: Tensor,
    layers: int | Sequence[int],
    out_dir: str | Path,
    *,
    model_names: Sequence[str] | None = None,
    progress: bool = True,
    mesh: Any = None,
    **options: Any,
) -> StackedActivations:
    """Writes the residual stream of several layers, or models, to stores beside each other; a second call resumes.

    Of the same tokens in the same order: one that is left out of one is left out of all. A model is run once for all of
    its layers. `out_dir`, which holds beside_0, beside_1 and so on, is then what `Trainer`, `train`, `evaluate` and
    `sweep` take as activations for a crosscoder.

    Args:
        models: a model, or one for each layer; they must be of one width, and read the same token ids.
        rows: int64 [N, context] token ids.
        layers: blocks whose output is stored, from 0; of several models one for each, or one number for all.
        out_dir: folder, made if needed, or a URL that fsspec knows, which one harvest may write to at a time.
        model_names: as recorded, one a model; their `name_or_path` when absent.
        progress, mesh: as in `harvest`.
        options: source, batch_size, rows_per_shard, dtype, drop_first, drop_tokens, max_norm_ratio and holdout_rows of
            `harvest`. A norm is too large by the median of its own layer.

    Raises:
        TypeError: another option.
        ValueError, BlockingIOError, RankError: as `harvest`; fewer than two layers, the same one twice, several widths.
    """
    if unknown := sorted(set(options) - set(OPTIONS)):
        raise TypeError(f"{', '.join(unknown)}: unknown, options are {', '.join(OPTIONS)}")
    given = {**OPTIONS, **options, "compute_dtype": "float32"}

    def batches(part: Tensor, first_row: int) -> Iterator[tuple[Tensor, list[Tensor]]]:
        return layer_batches(places, part, settings[0]["batch_size"], first_row)

    folder, ranks = output_place(out_dir), ranks_of(mesh)
    with ranks.accounted():
        with ranks.together():
            places, names = _places(models, layers, model_names)
            settings = [
                checked_settings(model, rows, {"layer": layer, "model": name, **given})
                for (model, layer), name in zip(places, names)
            ]
            for name in ("batch_size", "drop_tokens"):
                found = [each[name] for each in settings]
                if any(each != found[0] for each in found):
                    raise ValueError(f"{name}={found}: must be the same for all models; give it")
            folders = [folder / stack_part(i) for i in range(len(places))]
            check_kind(folder, pair=False, beside=len(places))
            for each in folders:
                check_output_place(each)
        with held_by_first(folder, "harvest", ranks):
            write_stores(folders, settings, rows, batches, ranks, progress)
    return StackedActivations([str(each) for each in folders])


def check_beside_resumes(folder: AnyPath, layers: Sequence[int], known: dict[str, Any]) -> None:
    """ValueError where the folder holds a harvest of other layers or settings than those `known` without the model."""
    check_kind(folder, pair=False, beside=len(layers))
    for i, layer in enumerate(layers):
        check_resumes(folder / stack_part(i), {"layer": layer, **known})


def _places(
    models: Any, layers: int | Sequence[int], model_names: Sequence[str] | None
) -> tuple[list[Place], list[str | None]]:
    """(model, layer) of each store, and the name of its model."""
    several = not isinstance(models, nn.Module)
    of_models = list(models) if several else [models]
    numbers = [layers] * len(of_models) if isinstance(layers, int) else list(layers)
    if several and len(numbers) != len(of_models):
        raise ValueError(f"layers={layers}: must be one number, or one for each of {len(of_models)} models")
    if model_names is not None and (isinstance(model_names, str) or len(model_names) != len(of_models)):
        raise ValueError(f"model_names={model_names!r}: must be one for each of {len(of_models)} models")
    names: list[str | None] = [None] * len(of_models) if model_names is None else list(model_names)
    if not several:
        of_models, names = of_models * len(numbers), names * len(numbers)
    places = [(model, check_integer("layers", layer, 0)) for model, layer in zip(of_models, numbers)]
    if len(places) < 2:
        raise ValueError(f"layers={layers}: must be at least 2, or of several models; harvest stores one")
    for i, (model, layer) in enumerate(places):
        check_layer(model, layer)
        if any(model is other and layer == same for other, same in places[:i]):
            raise ValueError(f"layers={layers}: has layer {layer} twice")
    return places, names


def layer_batches(
    places: Sequence[Place], rows: Tensor, batch_size: int = 8, first_row: int = 0
) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """(rows [b, T], the residual stream at each of the places, float32 [b, T, d]), on the device of the first model.

    Raises:
        ValueError: values that are not finite, with their layer and rows; `first_row` numbers these. Several widths.
    """
    device = device_of(places[0][0])
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        found: list[Tensor] = []
        for _, of_model in groupby(places, key=lambda place: id(place[0])):
            model, layers = (list(each) for each in zip(*of_model))
            with torch.inference_mode(), capture_layers(model[0], layers) as captured:
                model[0](input_ids=batch.to(device_of(model[0])), use_cache=False)
            found += [captured[layer] for layer in layers]
        if len(widths := {x.shape[-1] for x in found}) > 1:
            raise ValueError(f"models: of widths {sorted(widths)}; a crosscoder reads layers of one width")
        for (_, layer), x in zip(places, found):
            check_finite_rows(x, f"of layer {layer}", first_row + start)
        yield batch.to(device), [x.to(device).float() for x in found]
