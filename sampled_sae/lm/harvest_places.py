"""What every harvest does before the first file: settings, places and folders are checked; then the stores are written.

One place is stored in the folder itself, two in `PAIR` inside it, several layers beside each other in `stack_part`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from sampled_sae.lm.dropped import check_drop_tokens
from sampled_sae.lm.harvest_files import Settings, check_same, write_stores
from sampled_sae.lm.models import check_rows, device_of, name_of, weights_digest
from sampled_sae.lm.passes import Place, batches_at
from sampled_sae.residual_stream.hook_points import HookPoint, check_place, check_points
from sampled_sae.support.all_ranks import ranks_of
from sampled_sae.support.argument_checks import check_choice, check_flag, check_integer, check_number
from sampled_sae.support.output_folder import check_output_place, held_by_first
from sampled_sae.support.remote_files import AnyPath, output_place
from sampled_sae.training.opening import PAIR, stack_part, stores_in
from sampled_sae.training.store_writer import DTYPES, MANIFEST, read_manifest

# of each store its model, its place there, and the model's name as recorded
Stores = Sequence[tuple[Any, Place, "str | None"]]


def harvest_places(
    stores: Callable[[], Stores], rows: Tensor, out_dir: Any, options: dict[str, Any], progress: bool, mesh: Any
) -> dict[str, dict[str, Any]]:
    """Writes what stands at several places, or at one, of the same tokens; a second call resumes. Folder -> manifest.

    Args:
        stores: gives them, or raises what is wrong with them on this rank.
        rows, out_dir, progress, mesh: as in `harvest`.
        options: of `harvest` the others.

    Raises:
        As `harvest`.
    """
    folder, ranks = output_place(out_dir), ranks_of(mesh)

    def batches(part: Tensor, first_row: int) -> Iterator[tuple[Tensor, list[Tensor]]]:
        at = [(model, here) for model, here, _ in found]
        autocast = options["compute_dtype"] == "bfloat16"
        for batch, xs in batches_at(at, part, settings[0]["batch_size"], first_row, autocast):
            if isinstance(at[0][1], int) and len(widths := {x.shape[-1] for x in xs}) > 1:
                raise ValueError(f"models: of widths {sorted(widths)}; a crosscoder reads layers of one width")
            yield batch, xs

    with ranks.accounted():
        with ranks.together():
            found = [(model, check_place(model, here), name) for model, here, name in stores()]
            settings = [_checked_settings(model, rows, here, name, options) for model, here, name in found]
            for name in ("batch_size", "drop_tokens"):
                of_models = [each[name] for each in settings]
                if any(each != of_models[0] for each in of_models):
                    raise ValueError(f"{name}={of_models}: must be the same for all models; give it")
            if points := [here for _, here, _ in found if isinstance(here, HookPoint)]:
                check_points(found[0][0], points, rows[:1].to(device_of(found[0][0])))
            folders = _folders(folder, [here for _, here, _ in found])
            _check_kind(folder, folders)
            for each in folders:
                check_output_place(each)
        with held_by_first(folder, "harvest", ranks):
            manifests = write_stores(folders, settings, rows, batches, ranks, progress)
    return dict(zip(map(str, folders), manifests))


def check_resumes(folder: AnyPath, places: Sequence[Place], known: Settings) -> None:
    """ValueError where the folder holds a harvest of other places, or with other settings than those `known` without
    the model."""
    folders = _folders(folder, places)
    _check_kind(folder, folders)
    for each, here in zip(folders, places):
        if (each / MANIFEST).exists():
            check_same(each, read_manifest(each)["settings"], {**_named(here), **known})


def check_holdout(holdout_rows: int, rows: int) -> int:
    """`holdout_rows` as an int; ValueError unless it leaves some of the rows to train on."""
    count = check_integer("holdout_rows", holdout_rows, 0)
    if count >= rows:
        raise ValueError(f"holdout_rows={count} must be from 0 to {rows - 1}: there are {rows} rows")
    return count


def rows_digest(rows: Tensor) -> str:
    """The fingerprint of token ids [N, context]."""
    return hashlib.sha256(rows.cpu().contiguous().numpy().tobytes()).hexdigest()


def _checked_settings(model: Any, rows: Tensor, here: Place, name: str | None, options: dict[str, Any]) -> Settings:
    """What a store is made with, checked; puts the model in eval mode."""
    check_rows(model, rows)
    tokens, first = check_drop_tokens(model, options["drop_tokens"]), check_flag("drop_first", options["drop_first"])
    settings = {
        "model": name_of(model) if name is None else str(name),
        **_named(here),
        "context": rows.shape[1],
        "source": str(options["source"]),
        "rows": len(rows),
        "rows_sha256": rows_digest(rows),
        "weights_sha256": weights_digest(model),
        "batch_size": check_integer("batch_size", options["batch_size"], 1),
        "rows_per_shard": check_integer("rows_per_shard", options["rows_per_shard"], 1),
        "dtype": check_choice("dtype", str(options["dtype"]).removeprefix("torch."), tuple(DTYPES)),
        "compute_dtype": check_choice("compute_dtype", options["compute_dtype"], ("float32", "bfloat16")),
        "drop_first": first,
        "drop_tokens": tokens,
        "max_norm_ratio": float(check_number("max_norm_ratio", options["max_norm_ratio"], 1, None)),
        "holdout_rows": check_holdout(options["holdout_rows"], len(rows)),
    }
    for part in (rows[: settings["batch_size"]], rows[len(rows) - settings["holdout_rows"] :]):
        if len(part) and bool(torch.isin(part[:, int(first) :], torch.tensor(tokens, dtype=torch.int64)).all()):
            raise ValueError(f"drop_tokens={tokens} leaves nothing of {len(part)} rows: drop fewer, or check the texts")
    model.eval()
    return settings


def _named(here: Place) -> Settings:
    return {"layer": here} if isinstance(here, int) else {"point": str(here)}


def _folders(folder: AnyPath, places: Sequence[Place]) -> list[AnyPath]:
    if len(places) == 1:
        return [folder]
    of_pair = isinstance(places[0], HookPoint)
    return [folder / part for part in (PAIR if of_pair else map(stack_part, range(len(places))))]


def _check_kind(folder: AnyPath, folders: list[AnyPath]) -> None:
    """ValueError where `folder` holds the harvest of other places than those whose stores are to stand in `folders`."""
    held = [folder] if (folder / MANIFEST).exists() else [folder / name for name in stores_in(folder)]
    # one that was killed as it began has written some of its manifests
    begins = held == folders[: len(held)] and not any(read_manifest(each)["complete"] for each in held)
    if held != folders and not begins:
        pair = held[0].name in PAIR
        what = "one place" if held == [folder] else "two places" if pair else f"{len(held)} layers"
        raise ValueError(f"{folder}: holds a harvest of {what}; use another folder")
