"""What every harvest does: rows of token ids to one store or several side by side, resumable at any moment.

The files are those of `sampled_sae.training.store_writer`. The manifests are written after each of them: a killed
harvest loses at most the shard under way.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from sampled_sae.lm.dropped import check_drop_tokens, dropped
from sampled_sae.lm.models import check_rows, name_of, weights_digest
from sampled_sae.support.all_ranks import AllRanks
from sampled_sae.support.argument_checks import check_choice, check_flag, check_integer, check_number
from sampled_sae.support.atomic_files import field
from sampled_sae.support.token_places import TokenPlaces
from sampled_sae.training.opening import PAIR, stack_folders
from sampled_sae.training.store_writer import (
    DTYPES,
    MANIFEST,
    StoreWriter,
    as_stored,
    installed_version,
    new_manifest,
    read_manifest,
)

# (rows, number of the first) to batches of rows [b, T] and, for each store, float32 [b, T, d]
Batches = Callable[[Tensor, int], Iterator[tuple[Tensor, list[Tensor]]]]
Settings = dict[str, Any]
# what a manifest says of its activations beside the settings
ABOUT = ("model", "layer", "point", "context", "source")
READING = ("batch_size", "rows_per_shard", "dtype", "compute_dtype", "drop_first", "drop_tokens", "max_norm_ratio")


def checked_settings(model: Any, rows: Tensor, given: Settings) -> Settings:
    """What a harvest of `model` over `rows` is made with, checked; puts the model in eval mode.

    given: of `harvest` the arguments "model", which may be None, "source", those of `READING` and "holdout_rows"; what
        else there is names the place, and stays as it is.

    Raises:
        ValueError, TypeError: naming the argument, its value and what is allowed.
    """
    check_rows(model, rows)
    place = {name: value for name, value in given.items() if name not in ("model", "source", "holdout_rows", *READING)}
    tokens, first = check_drop_tokens(model, given["drop_tokens"]), check_flag("drop_first", given["drop_first"])
    settings = {
        "model": name_of(model) if given["model"] is None else str(given["model"]),
        **place,
        "context": rows.shape[1],
        "source": str(given["source"]),
        "rows": len(rows),
        "rows_sha256": hashlib.sha256(rows.cpu().contiguous().numpy().tobytes()).hexdigest(),
        "weights_sha256": weights_digest(model),
        "batch_size": check_integer("batch_size", given["batch_size"], 1),
        "rows_per_shard": check_integer("rows_per_shard", given["rows_per_shard"], 1),
        "dtype": check_choice("dtype", str(given["dtype"]).removeprefix("torch."), tuple(DTYPES)),
        "compute_dtype": given["compute_dtype"],
        "drop_first": first,
        "drop_tokens": tokens,
        "max_norm_ratio": float(check_number("max_norm_ratio", given["max_norm_ratio"], 1, None)),
        "holdout_rows": check_holdout(given["holdout_rows"], len(rows)),
    }
    for part in (rows[: settings["batch_size"]], rows[len(rows) - settings["holdout_rows"] :]):
        if len(part) and bool(torch.isin(part[:, int(first) :], torch.tensor(tokens, dtype=torch.int64)).all()):
            raise ValueError(f"drop_tokens={tokens} leaves nothing of {len(part)} rows: drop fewer, or check the texts")
    model.eval()
    return settings


def check_holdout(holdout_rows: int, rows: int) -> int:
    """`holdout_rows` as an int; ValueError unless it leaves some of the rows to train on."""
    count = check_integer("holdout_rows", holdout_rows, 0)
    if count >= rows:
        raise ValueError(f"holdout_rows={count} must be from 0 to {rows - 1}: there are {rows} rows")
    return count


def check_kind(folder: Path, pair: bool, beside: int = 0) -> None:
    """ValueError where the folder holds the harvest of other places than one, a `pair`, or so many layers `beside` each
    other, whichever is to be written."""
    held = [name for name in (".", *PAIR) if (folder / name / MANIFEST).exists()]
    stack = stack_folders(folder)
    layers = len(stack)
    # one that was killed as it began has written some of its manifests
    begins = layers < beside and not any(read_manifest(Path(each))["complete"] for each in stack)
    if (held and (beside or (held != ["."]) != pair)) or not (begins or layers in (0, beside)):
        what = f"{layers} layers" if layers else "one place" if held == ["."] else "two places"
        raise ValueError(f"{folder}: holds a harvest of {what}; use another folder")


def check_resumes(folder: Path, known: Settings) -> None:
    """ValueError where the folder holds a harvest with other settings than those `known` without the model."""
    if (folder / MANIFEST).exists():
        _check_same(folder, read_manifest(folder)["settings"], known)


def write_stores(
    folders: Sequence[Path], settings: Sequence[Settings], rows: Tensor, batches: Batches, ranks: AllRanks, show: bool
) -> list[dict[str, Any]]:
    """Stores of the same tokens in shards of the same sizes, each in its folder; returns their manifests.

    A token that is left out of one store is left out of all. The caller holds the folders.

    Args:
        folders, settings: of each store, as `checked_settings` gives them; the stores differ in their place alone.
        rows: int64 [N, context]; the last `holdout_rows` are held out.
        batches: what there is to store.
        ranks: share the rows.
        show: a progress bar.
    """
    manifests = _begun(folders, settings, rows, batches, ranks)
    writers = [StoreWriter(folder, manifest) for folder, manifest in zip(folders, manifests)]
    common = settings[0]
    train_rows = len(rows) - common["holdout_rows"]
    starts = range(0, train_rows, common["rows_per_shard"])
    # the held-out part comes last
    parts = [rows[start : min(start + starts.step, train_rows)] for start in starts]
    parts += [rows[train_rows:]] if common["holdout_rows"] else []

    def is_written(i: int) -> bool:
        return all(writer.has_shard(i) if i < len(starts) else writer.has_holdout() for writer in writers)

    def write(i: int, bar: Any) -> list[dict[str, Any]]:
        first_row = starts[i] if i < len(starts) else train_rows
        activations, places, counts = _activations(batches(parts[i], first_row), parts[i], manifests, bar)
        about: dict[str, Any] = {"dropped": counts, "places_crc32": places.crc32()}
        if i < len(starts):
            return [writer.write_shard(i, x, places, **about) for writer, x in zip(writers, activations)]
        return [writer.write_holdout(x, parts[i], **about) for writer, x in zip(writers, activations)]

    with ranks.together():
        looked_at = range(ranks.rank, len(parts), ranks.size)
        found = [i for i in looked_at if not is_written(i)]
    missing = sorted(i for of_rank in ranks.gather(found) for i in of_rank)
    with tqdm(
        total=rows.numel(), unit="token", unit_scale=True, desc="harvest", disable=not (show and ranks.first)
    ) as bar:
        bar.update(sum(part.numel() for i, part in enumerate(parts) if i not in missing))
        bar.initial = bar.n  # so that the speed shown is that of this call
        for start in range(0, len(missing), ranks.size):
            these = missing[start : start + ranks.size]
            entries: list[dict[str, Any]] = []
            with ranks.together():
                if ranks.rank < len(these):
                    entries = write(these[ranks.rank], bar)
            for others in ranks.gather(entries):
                for writer, entry in zip(writers, others):
                    writer.list_file(entry)
            _write_manifests(writers, ranks)
            bar.update(sum(parts[i].numel() for i in these[1:]))
    for manifest in manifests:
        if all("dropped" in shard for shard in manifest["shards"]):
            manifest["dropped"] = {
                reason: sum(shard["dropped"][reason] for shard in manifest["shards"])
                for reason in manifest["shards"][0]["dropped"]
            }
    _write_manifests(writers, ranks, complete=True)
    return ranks.share(manifests)


def _write_manifests(writers: list[StoreWriter], ranks: AllRanks, complete: bool = False) -> None:
    with ranks.together():
        if ranks.first:
            for writer in writers:
                writer.write_manifest(complete)


def _begun(
    folders: Sequence[Path], settings: Sequence[Settings], rows: Tensor, batches: Batches, ranks: AllRanks
) -> list[dict[str, Any]]:
    """The manifests of a harvest that goes on or begins, which the first rank has read or written."""
    ours = ranks.share(list(settings))
    with ranks.together():
        of_store = [[name for name, value in own.items() if our.get(name) != value] for own, our in zip(settings, ours)]
        if differ := list(dict.fromkeys(name for names in of_store for name in names)):
            raise ValueError(f"{', '.join(differ)}: other than those of the first rank; give all ranks the same")
    manifests: list[dict[str, Any]] = []
    with ranks.together():
        if ranks.first:
            before = [_read_manifest(folder, own) for folder, own in zip(folders, settings)]
            new = _new_manifests(rows, batches, settings) if None in before else []
            for i, (folder, was) in enumerate(zip(folders, before)):
                if was is None:
                    StoreWriter(folder, new[i]).write_manifest()
                manifests.append(new[i] if was is None else was)
    return ranks.share(manifests)


def _read_manifest(folder: Path, settings: Settings) -> dict[str, Any] | None:
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


def _check_same(folder: Path, before: Settings, settings: Settings) -> None:
    if "model" not in before:
        raise ValueError(f"{folder} holds activations that no harvest wrote: choose another folder")
    for name, value in settings.items():
        if before.get(name) != value:
            raise ValueError(
                f"{folder} was harvested with {name}={before.get(name)!r}, this call has {name}={value!r}: "
                "use the same settings or another folder"
            )


def _new_manifests(rows: Tensor, batches: Batches, settings: Sequence[Settings]) -> list[dict[str, Any]]:
    """Of stores without files; the largest norm of each is that of the first batch."""
    batch, found = next(batches(rows[: settings[0]["batch_size"]], 0))
    manifests = []
    for x, own in zip(found, settings):
        norms = x[~dropped(batch, x, own["drop_first"], own["drop_tokens"], math.inf)[0]].norm(dim=-1)
        max_norm = own["max_norm_ratio"] * float(norms.median())
        about = {name: own[name] for name in ABOUT if name in own}
        manifest = new_manifest(x.shape[-1], own["dtype"], own, max_norm=max_norm, **about)
        manifest["versions"]["transformers"] = installed_version("transformers")
        manifests.append(manifest)
    return manifests


def _activations(
    batches: Iterator[tuple[Tensor, list[Tensor]]], rows: Tensor, manifests: Sequence[dict[str, Any]], bar: Any
) -> tuple[list[Tensor], TokenPlaces, dict[str, int]]:
    """(of each store the vectors [n, d] of the rows that stay, on the CPU in the stored dtype; where they stand; how
    many do not stay, by reason)."""
    kept: list[list[Tensor]] = [[] for _ in manifests]
    stay: list[Tensor] = []
    counts: Counter[str] = Counter()
    for batch, found in batches:
        out, left = _left_out(batch, found, manifests)
        for parts, x, manifest in zip(kept, found, manifests):
            parts.append(as_stored(x[~out], manifest["dtype"]))
        stay.append(~out.cpu())
        counts.update(left)
        bar.update(batch.numel())
    return [torch.cat(parts) for parts in kept], TokenPlaces.of_rows(rows, torch.cat(stay)), dict(counts)


def _left_out(batch: Tensor, found: list[Tensor], manifests: Sequence[dict[str, Any]]) -> tuple[Tensor, dict[str, int]]:
    """`dropped` of the first store, and what the norms of the others leave out besides."""
    settings = manifests[0]["settings"]
    by_place = settings["drop_first"], settings.get("drop_tokens", ())
    out, counts = dropped(batch, found[0], *by_place, manifests[0]["max_norm"])
    for x, manifest in zip(found[1:], manifests[1:]):
        also = dropped(batch, x, False, (), manifest["max_norm"])[0].to(out.device) & ~out
        counts["norm"] += int(also.sum())
        out = out | also
    return out, counts
