"""Harvest the activations of one layer into a store on disk, resumable at any moment."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sampled_sae.lm.finite_rows import check_finite_rows
from sampled_sae.lm.harvest_files import check_kind, checked_settings, write_stores
from sampled_sae.lm.models import device_of
from sampled_sae.residual_stream.blocks import check_layer
from sampled_sae.residual_stream.hooks import capture
from sampled_sae.support.all_ranks import ranks_of
from sampled_sae.support.argument_checks import check_choice, check_integer
from sampled_sae.support.output_folder import check_output_place, held_by_first
from sampled_sae.support.remote_files import output_place


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
    folder, ranks = output_place(out_dir), ranks_of(mesh)

    def batches(part: Tensor, first_row: int) -> Iterator[tuple[Tensor, list[Tensor]]]:
        return ((batch, [x]) for batch, x in residual_batches(model, part, first_row, settings))

    with ranks.accounted():
        with ranks.together():
            check_layer(model, layer)
            given = {
                "layer": check_integer("layer", layer, 0),
                "batch_size": batch_size,
                "rows_per_shard": rows_per_shard,
                "dtype": dtype,
                "compute_dtype": check_choice("compute_dtype", compute_dtype, ("float32", "bfloat16")),
                "drop_first": drop_first,
                "drop_tokens": drop_tokens,
                "max_norm_ratio": max_norm_ratio,
                "holdout_rows": holdout_rows,
            }
            settings = checked_settings(model, rows, {"model": model_name, "source": source, **given})
            check_kind(folder, pair=False)
            check_output_place(folder)
        with held_by_first(folder, "harvest", ranks):
            return write_stores([folder], [settings], rows, batches, ranks, progress)[0]


def residual_batches(
    model: Any, rows: Tensor, first_row: int, settings: dict[str, Any]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield rows [b, T] on the model's device and their residual stream [b, T, d] in float32.

    Of the settings `batch_size`, `compute_dtype` and `layer` are read; `first_row` numbers the rows in errors.
    """
    size, device = settings["batch_size"], device_of(model)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=settings["compute_dtype"] == "bfloat16")
    for start in range(0, len(rows), size):
        batch = rows[start : start + size].to(device)
        with torch.inference_mode(), autocast, capture(model, settings["layer"]) as captured:
            model(input_ids=batch, use_cache=False)
        x = captured.value.float()
        check_finite_rows(x, f"of layer {settings['layer']}", first_row + start)
        yield batch, x
