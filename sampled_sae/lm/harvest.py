"""Harvest the activations of one layer into a store on disk, resumable at any moment.

The files are those of `sampled_sae.training.store_writer`. The manifest is written after each of them: a killed
harvest loses at most the shard under way.
"""

import hashlib
import math
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from sampled_sae.corpus.token_places import TokenPlaces
from sampled_sae.lm.dropped import check_drop_tokens, dropped
from sampled_sae.lm.models import check_rows, device_of, name_of, weights_digest
from sampled_sae.residual_stream.blocks import check_layer
from sampled_sae.residual_stream.hooks import capture
from sampled_sae.support.all_ranks import AllRanks, ranks_of
from sampled_sae.support.argument_checks import check_choice, check_flag, check_integer, check_number
from sampled_sae.support.atomic_files import field
from sampled_sae.support.output_folder import check_output_folder, held_by_first
from sampled_sae.training.store_writer import (
    DTYPES,
    MANIFEST,
    StoreWriter,
    as_stored,
    installed_version,
    new_manifest,
    read_manifest,
)


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
        out_dir: folder, made if needed.
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
        mesh: the processes that share the work, as a DeviceMesh ("data", "feature") of all there are.

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
    folder, ranks = Path(out_dir), ranks_of(mesh)
    check_layer(model, layer)
    layer = check_integer("layer", layer, 0)
    check_rows(model, rows)
    batch_size = check_integer("batch_size", batch_size, 1)
    rows_per_shard = check_integer("rows_per_shard", rows_per_shard, 1)
    holdout_rows = check_holdout(holdout_rows, len(rows))
    dtype = check_choice("dtype", str(dtype).removeprefix("torch."), tuple(DTYPES))
    compute_dtype = check_choice("compute_dtype", compute_dtype, ("float32", "bfloat16"))
    drop_first = check_flag("drop_first", drop_first)
    max_norm_ratio = float(check_number("max_norm_ratio", max_norm_ratio, 1, None))
    tokens = check_drop_tokens(model, drop_tokens)
    for part in (rows[:batch_size], rows[len(rows) - holdout_rows :]):
        if len(part) and bool(torch.isin(part[:, int(drop_first) :], torch.tensor(tokens, dtype=torch.int64)).all()):
            raise ValueError(f"drop_tokens={tokens} leaves nothing of {len(part)} rows: drop fewer, or check the texts")
    model.eval()
    settings = {
        "model": name_of(model) if model_name is None else str(model_name),
        "layer": layer,
        "context": rows.shape[1],
        "source": str(source),
        "rows": len(rows),
        "rows_sha256": hashlib.sha256(rows.cpu().contiguous().numpy().tobytes()).hexdigest(),
        "weights_sha256": weights_digest(model),
        "batch_size": batch_size,
        "rows_per_shard": rows_per_shard,
        "dtype": dtype,
        "compute_dtype": compute_dtype,
        "drop_first": drop_first,
        "drop_tokens": tokens,
        "max_norm_ratio": max_norm_ratio,
        "holdout_rows": holdout_rows,
    }
    with ranks.accounted():
        with ranks.together():
            check_output_folder(folder)
        with held_by_first(folder, "harvest", ranks):
            return _write_files(folder, model, rows, settings, ranks, progress)


def _write_files(
    folder: Path, model: Any, rows: Tensor, settings: dict[str, Any], ranks: AllRanks, progress: bool
) -> dict[str, Any]:
    manifest = _begun(folder, model, rows, settings, ranks)
    writer = StoreWriter(folder, manifest)
    train_rows = len(rows) - settings["holdout_rows"]
    starts = range(0, train_rows, settings["rows_per_shard"])
    # the held-out part comes last
    parts = [rows[start : min(start + starts.step, train_rows)] for start in starts]
    parts += [rows[train_rows:]] if settings["holdout_rows"] else []

    def is_written(i: int) -> bool:
        return writer.has_shard(i) if i < len(starts) else writer.has_holdout()

    def write(i: int, bar: Any) -> dict[str, Any]:
        if i < len(starts):
            activations, places, counts = _activations(model, parts[i], starts[i], manifest, bar)
            return writer.write_shard(i, activations, places, dropped=counts)
        activations, _, counts = _activations(model, parts[i], train_rows, manifest, bar)
        return writer.write_holdout(activations, parts[i], dropped=counts)

    with ranks.together():
        looked_at = range(ranks.rank, len(parts), ranks.size)
        found = [i for i in looked_at if not is_written(i)]
    missing = sorted(i for of_rank in ranks.gather(found) for i in of_rank)
    shown = progress and ranks.first
    with tqdm(total=rows.numel(), unit="token", unit_scale=True, desc="harvest", disable=not shown) as bar:
        bar.update(sum(part.numel() for i, part in enumerate(parts) if i not in missing))
        bar.initial = bar.n  # so that the speed shown is that of this call
        for start in range(0, len(missing), ranks.size):
            these = missing[start : start + ranks.size]
            entry = None
            with ranks.together():
                if ranks.rank < len(these):
                    entry = write(these[ranks.rank], bar)
            for other in filter(None, ranks.gather(entry)):
                writer.list_file(other)
            with ranks.together():
                if ranks.first:
                    writer.write_manifest()
            bar.update(sum(parts[i].numel() for i in these[1:]))
    if all("dropped" in shard for shard in manifest["shards"]):
        manifest["dropped"] = {
            reason: sum(shard["dropped"][reason] for shard in manifest["shards"])
            for reason in manifest["shards"][0]["dropped"]
        }
    with ranks.together():
        if ranks.first:
            writer.write_manifest(complete=True)
    return ranks.share(manifest)


def _begun(folder: Path, model: Any, rows: Tensor, settings: dict[str, Any], ranks: AllRanks) -> dict[str, Any]:
    """The manifest of a harvest that goes on or begins, which the first rank has read or written."""
    ours = ranks.share(settings)
    with ranks.together():
        if differ := [name for name, value in settings.items() if ours[name] != value]:
            raise ValueError(f"{', '.join(differ)}: other than those of the first rank; give all ranks the same")
    manifest = None
    with ranks.together():
        if ranks.first:
            manifest = _read_manifest(folder, settings)
            if manifest is None:
                manifest = _new_manifest(model, rows[: settings["batch_size"]], settings)
                StoreWriter(folder, manifest).write_manifest()
    found: dict[str, Any] = ranks.share(manifest)
    return found


def check_holdout(holdout_rows: int, rows: int) -> int:
    """`holdout_rows` as an int; ValueError unless it leaves some of the rows to train on."""
    count = check_integer("holdout_rows", holdout_rows, 0)
    if count >= rows:
        raise ValueError(f"holdout_rows={count} must be from 0 to {rows - 1}: there are {rows} rows")
    return count


def _read_manifest(folder: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    path = folder / MANIFEST
    if not path.exists():
        return None
    manifest = read_manifest(folder)
    before = manifest["settings"]
    if "drop_tokens" not in before and settings.pop("drop_tokens"):
        warnings.warn(
            f"{folder} was begun without drop_tokens, and goes on without: special tokens stay in it", stacklevel=3
        )
    _check_same(folder, before, {name: settings.get(name) for name in [*settings, *before]})
    field(path, manifest, "max_norm", float)
    for i, shard in enumerate(manifest["shards"]):
        field(f"{path}: shards[{i}]", shard, "sum_squares", float, 0)
    return manifest


def check_resumes(folder: Path, known: dict[str, Any]) -> None:
    """ValueError where the folder holds a harvest with other settings than those `known` without the model."""
    if (folder / MANIFEST).exists():
        _check_same(folder, read_manifest(folder)["settings"], known)


def _check_same(folder: Path, before: dict[str, Any], settings: dict[str, Any]) -> None:
    if "model" not in before:
        raise ValueError(f"{folder} holds activations that no harvest wrote: choose another folder")
    for name, value in settings.items():
        if before.get(name) != value:
            raise ValueError(
                f"{folder} was harvested with {name}={before.get(name)!r}, this call has {name}={value!r}: "
                "use the same settings or another folder"
            )


def _new_manifest(model: Any, first_rows: Tensor, settings: dict[str, Any]) -> dict[str, Any]:
    batch, x = next(residual_batches(model, first_rows, 0, settings))
    norms = x[~dropped(batch, x, settings["drop_first"], settings["drop_tokens"], math.inf)[0]].norm(dim=-1)
    max_norm = settings["max_norm_ratio"] * float(norms.median())
    about = {field: settings[field] for field in ("model", "layer", "context", "source")}
    manifest = new_manifest(x.shape[-1], settings["dtype"], settings, max_norm=max_norm, **about)
    manifest["versions"]["transformers"] = installed_version("transformers")
    return manifest


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
        finite = x.isfinite().all(dim=-1).all(dim=-1)  # [b]
        if not finite.all():
            bad = [first_row + start + int(row) for row in (~finite).nonzero()]
            raise ValueError(
                f"activations of layer {settings['layer']} are not finite (NaN or inf) in rows {bad}: "
                "load the model in another dtype, or leave these rows out"
            )
        yield batch, x


def _activations(
    model: Any, rows: Tensor, first_row: int, manifest: dict[str, Any], bar: Any
) -> tuple[Tensor, TokenPlaces, dict[str, int]]:
    """(the vectors [n, d] of the rows that stay, on the CPU in the stored dtype; where they stand; how many do not
    stay, by reason)."""
    kept: list[Tensor] = []
    stay: list[Tensor] = []
    counts: Counter[str] = Counter()
    settings = manifest["settings"]
    for batch, x in residual_batches(model, rows, first_row, settings):
        out, found = dropped(batch, x, settings["drop_first"], settings.get("drop_tokens", ()), manifest["max_norm"])
        kept.append(as_stored(x[~out], manifest["dtype"]))
        stay.append(~out.cpu())
        counts.update(found)
        bar.update(batch.numel())
    return torch.cat(kept), TokenPlaces.of_rows(rows, torch.cat(stay)), dict(counts)
