"""Rows of token ids to one store of activations or several side by side, resumable at any moment.

The files are those of `sampled_sae.training.store_writer`. The manifests are written after each of them: a killed
harvest loses at most the shard under way.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from sampled_sae.lm.dropped import largest_norm, left_out
from sampled_sae.support.all_ranks import AllRanks
from sampled_sae.support.atomic_files import field
from sampled_sae.support.remote_files import AnyPath
from sampled_sae.support.token_places import TokenPlaces
from sampled_sae.training.store_writer import (
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


def write_stores(
    folders: Sequence[AnyPath],
    settings: Sequence[Settings],
    rows: Tensor,
    batches: Batches,
    ranks: AllRanks,
    show: bool,
) -> list[dict[str, Any]]:
    """Stores of the same tokens in shards of the same sizes, each in its folder; returns their manifests.

    A token that is left out of one store is left out of all. The caller holds the folders.

    Args:
        folders, settings: of each store, checked; the stores differ in their place alone.
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
    folders: Sequence[AnyPath], settings: Sequence[Settings], rows: Tensor, batches: Batches, ranks: AllRanks
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
    with ranks.together():
        for folder in folders:
            if not (folder / MANIFEST).exists():
                raise ValueError(f"{folder}: not what the first rank sees there; all ranks need one place")
    return ranks.share(manifests)


def _read_manifest(folder: AnyPath, settings: Settings) -> dict[str, Any] | None:
    path = folder / MANIFEST
    if not path.exists():
        return None
    manifest = read_manifest(folder)
    before = manifest["settings"]
    if "drop_tokens" not in before and settings.pop("drop_tokens"):
        warnings.warn(
            f"{folder} was begun without drop_tokens, and goes on without: special tokens stay in it", stacklevel=3
        )
    check_same(folder, before, {name: settings.get(name) for name in [*settings, *before]})
    field(path, manifest, "max_norm", float)
    for i, shard in enumerate(manifest["shards"]):
        field(f"{path}: shards[{i}]", shard, "sum_squares", float, 0)
    return manifest


def check_same(folder: AnyPath, before: Settings, settings: Settings) -> None:
    """ValueError where a store was harvested with other settings than these."""
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
        max_norm = largest_norm(batch, x, own["drop_first"], own["drop_tokens"], own["max_norm_ratio"])
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
    settings, max_norms = manifests[0]["settings"], [manifest["max_norm"] for manifest in manifests]
    by_place = settings["drop_first"], settings.get("drop_tokens", ())
    for batch, found in batches:
        out, left = left_out(batch, found, *by_place, max_norms)
        for parts, x, manifest in zip(kept, found, manifests):
            parts.append(as_stored(x[~out], manifest["dtype"]))
        stay.append(~out.cpu())
        counts.update(left)
        bar.update(batch.numel())
    return [torch.cat(parts) for parts in kept], TokenPlaces.of_rows(rows, torch.cat(stay)), dict(counts)
