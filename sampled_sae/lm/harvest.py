"""Harvest activations into stores on disk, resumable at any moment: of one layer, or of several places side by side."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sampled_sae.lm.harvest_places import Stores, harvest_places
from sampled_sae.residual_stream.hook_points import HookPoint, mlp_points
from sampled_sae.support.argument_checks import check_integer
from sampled_sae.training.joined_activations import PairedActivations, StackedActivations


def harvest(
    model: Any,
    rows: Tensor,
    layer: int,
    out_dir: str | Path,
    *,
    model_name: str | None = None,
    source: str = "",
    batch_size: int = 8,
    rows_per_shard: int = 128,
    dtype: str | torch.dtype = "float32",
    compute_dtype: str = "float32",
    drop_first: bool = True,
    drop_tokens: Iterable[int] | None = None,
    max_norm_ratio: float = 10.0,
    holdout_rows: int = 0,
    progress: bool = True,
    mesh: Any = None,
) -> dict[str, Any]:
    """Write the residual stream after block `layer` (see `hooks`) for all rows; a second call resumes.

    Several processes may call it together, all with the same arguments and a folder that all of them see: they share
    the rows, and what they write is what one would. Each loses at most the shard under way when it is killed, and
    another number of them may go on.

    Args:
        model: causal language model or encoder; put in eval mode.
        rows: int64 [N, context] token ids.
        layer: index of the block, from 0.
        out_dir: folder, made if needed, or a URL that fsspec knows, which one harvest may write to at a time.
        model_name: as recorded; default the model's `name_or_path`.
        source: where the texts come from, as recorded.
        batch_size: rows a forward pass.
        rows_per_shard: rows a shard (a shard holds rows_per_shard * (context - 1) vectors, or a few less).
        dtype: of the stored activations: "float32", "float16" or "bfloat16", or torch's own.
        compute_dtype: "float32" runs the model as it was loaded; "bfloat16" multiplies matrices in bfloat16
            (autocast): about twice as fast on a CPU with bfloat16 instructions, and an error of about 1e-4 of
            the variance (SmolLM2, layer 15); slower on one without.
        drop_first: leave out position 0 of each row, an attention sink of enormous norm in most models.
        drop_tokens: ids that are left out wherever they stand; default the special tokens that the model's
            configuration names. `special_tokens(tokenizer)` has those of a tokenizer; () leaves out none.
        max_norm_ratio: leave out vectors whose norm exceeds this multiple of the median norm of the first
            batch (without those left out before); at least 1.
        holdout_rows: the last rows, kept out of the shards for evaluation.
        progress: show a progress bar.
        mesh: the processes that share the work, as a DeviceMesh of "data", "feature" or both, of all there are.

    Returns:
        The manifest, as in manifest.json: format, version, model, layer, context, d_in, dtype, scale (with
        x the training vectors, mean ||x * scale||^2 = d_in), max_norm, source, shards (file, tokens, bytes,
        sum_squares, dropped), holdout (file, tokens, rows, bytes, dropped; None without), dropped, complete,
        settings, versions. `dropped` counts the vectors left out by reason: first_position, special_token, norm.

    Raises:
        ValueError: for bad arguments, a folder that cannot be written to or was harvested with other settings
            (names the field), a manifest that is none, or activations that are not finite (names the rows;
            finished shards stay).
        BlockingIOError: for a folder in which another process is at work.
        RankError: what one of these is on another rank, or a rank that does not answer; names the rank.
    """
    options = {
        "source": source,
        "batch_size": batch_size,
        "rows_per_shard": rows_per_shard,
        "dtype": dtype,
        "compute_dtype": compute_dtype,
        "drop_first": drop_first,
        "drop_tokens": drop_tokens,
        "max_norm_ratio": max_norm_ratio,
        "holdout_rows": holdout_rows,
    }
    (manifest,) = harvest_places(lambda: [(model, layer, model_name)], rows, out_dir, options, progress, mesh).values()
    return manifest


def harvest_pair(
    model: Any,
    rows: Tensor,
    read: HookPoint | str,
    target: HookPoint | str,
    out_dir: str | Path,
    *,
    model_name: str | None = None,
    progress: bool = True,
    mesh: Any = None,
    **options: Any,
) -> PairedActivations:
    """Writes what stands at two places to the stores `out_dir`/inputs and `out_dir`/outputs; a second call resumes.

    Both in one pass, of the same tokens in the same order: a token that is left out of one is left out of the other.
    `out_dir` is then what `Trainer`, `train`, `evaluate` and `sweep` take as activations with targets.

    Args:
        model, rows: as in `harvest`; rows int64 [N, context].
        read, target: what a transcoder reads and what it reconstructs, as `HookPoint` or as "model.layers.3.mlp:in".
        out_dir: folder, made if needed, or a URL that fsspec knows, which one harvest may write to at a time.
        model_name, progress, mesh: as in `harvest`.
        options: source, batch_size, rows_per_shard, dtype, drop_first, drop_tokens, max_norm_ratio and holdout_rows of
            `harvest`. A norm is too large by the median of its own place.

    Raises:
        TypeError: another option.
        ValueError, BlockingIOError, RankError: as `harvest`; a place that the model has not, or passes more than once.
    """
    points = [point if isinstance(point, HookPoint) else HookPoint.parse(point) for point in (read, target)]
    if points[0] == points[1]:
        raise ValueError(f"target={target}: is what is read; an SAE of one place has no targets, harvest another")
    stores = [(model, point, model_name) for point in points]
    inputs, outputs = harvest_places(lambda: stores, rows, out_dir, _of_several(options), progress, mesh)
    return PairedActivations(inputs, outputs)


def harvest_mlp(model: Any, rows: Tensor, layer: int, folder: str | Path, **options: Any) -> PairedActivations:
    """`harvest_pair` of the MLP of block `layer`: what it reads, and what it writes.

    Raises:
        ValueError: as `harvest_pair`; no such block, or no MLP in it.
    """
    return harvest_pair(model, rows, *mlp_points(model, layer), folder, **options)


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
    written = harvest_places(
        lambda: _places(models, layers, model_names), rows, out_dir, _of_several(options), progress, mesh
    )
    return StackedActivations(list(written))


def _of_several(options: dict[str, Any]) -> dict[str, Any]:
    """Those of `harvest`, where absent as there; TypeError for another."""
    of_one = {name: p.default for name, p in signature(harvest).parameters.items() if p.kind is p.KEYWORD_ONLY}
    known = {name: of_one[name] for name in of_one if name not in ("model_name", "compute_dtype", "progress", "mesh")}
    if unknown := sorted(set(options) - set(known)):
        raise TypeError(f"{', '.join(unknown)}: unknown, options are {', '.join(known)}")
    return {**known, **options, "compute_dtype": "float32"}


def _places(models: Any, layers: int | Sequence[int], model_names: Sequence[str] | None) -> Stores:
    """Model, layer and name of the model of each store."""
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
        if any(model is other and layer == same for other, same in places[:i]):
            raise ValueError(f"layers={layers}: has layer {layer} twice")
    return [(model, layer, name) for (model, layer), name in zip(places, names)]
