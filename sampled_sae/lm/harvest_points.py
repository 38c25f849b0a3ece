"""Harvest two places of a language model at once, such as what an MLP reads and writes: what a transcoder needs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sampled_sae.lm.finite_rows import check_finite_rows
from sampled_sae.lm.harvest_files import check_kind, check_resumes, checked_settings, write_stores
from sampled_sae.lm.models import device_of
from sampled_sae.residual_stream.hook_points import HookPoint, capture_points, check_points, mlp_points
from sampled_sae.support.all_ranks import ranks_of
from sampled_sae.support.argument_checks import check_integer
from sampled_sae.support.output_folder import check_output_place, held_by_first
from sampled_sae.support.remote_files import AnyPath, output_place
from sampled_sae.training.opening import PAIR
from sampled_sae.training.paired_activations import PairedActivations

OPTIONS: dict[str, Any] = {
    "source": "",
    "batch_size": 8,
    "rows_per_shard": 128,
    "dtype": "float32",
    "drop_first": True,
    "drop_tokens": None,
    "max_norm_ratio": 10.0,
    "holdout_rows": 0,
}


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
    if unknown := sorted(set(options) - set(OPTIONS)):
        raise TypeError(f"{', '.join(unknown)}: unknown, options are {', '.join(OPTIONS)}")
    points = [point if isinstance(point, HookPoint) else HookPoint.parse(point) for point in (read, target)]
    if points[0] == points[1]:
        raise ValueError(f"target={target}: is what is read; an SAE of one place has no targets, harvest another")
    given = {**OPTIONS, **options, "model": model_name, "compute_dtype": "float32"}

    def batches(part: Tensor, first_row: int) -> Iterator[tuple[Tensor, list[Tensor]]]:
        return point_batches(model, part, points, settings[0]["batch_size"], first_row)

    folder, ranks = output_place(out_dir), ranks_of(mesh)
    folders = [folder / part for part in PAIR]
    with ranks.accounted():
        with ranks.together():
            settings = [checked_settings(model, rows, {"point": str(point), **given}) for point in points]
            check_points(model, points, rows[:1].to(device_of(model)))
            check_kind(folder, pair=True)
            for each in folders:
                check_output_place(each)
        with held_by_first(folder, "harvest", ranks):
            write_stores(folders, settings, rows, batches, ranks, progress)
    return PairedActivations(str(folders[0]), str(folders[1]))


def harvest_mlp(model: Any, rows: Tensor, layer: int, folder: str | Path, **options: Any) -> PairedActivations:
    """`harvest_pair` of the MLP of block `layer`: what it reads, and what it writes.

    Raises:
        ValueError: as `harvest_pair`; no such block, or no MLP in it.
    """
    return harvest_pair(model, rows, *mlp_points(model, layer), folder, **options)


def check_pair_resumes(folder: AnyPath, points: Sequence[HookPoint], known: dict[str, Any]) -> None:
    """ValueError where the folder holds a harvest of other places or settings than those `known`."""
    check_kind(folder, pair=True)
    for part, point in zip(PAIR, points):
        check_resumes(folder / part, {"point": str(point), **known})


def point_batches(
    model: Any, rows: Tensor, points: Sequence[HookPoint], batch_size: int = 8, first_row: int = 0
) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """(rows [b, T], what stands at each of the points, float32 [b, T, d]), on the device that the model's inputs go to.

    Raises:
        ValueError: values that are not finite, with their place and rows; `first_row` numbers these.
    """
    size = check_integer("batch_size", batch_size, 1)
    for start in range(0, len(rows), size):
        batch = rows[start : start + size].to(device_of(model))
        with torch.inference_mode(), capture_points(model, points) as found:
            model(input_ids=batch, use_cache=False)
        for point, x in zip(points, found):
            check_finite_rows(x, f"at {point}", first_row + start)
        yield batch, [x.to(batch.device).float() for x in found]
