"""What a training's checkpoint holds, and a training that goes on from it.

A process alone writes `checkpoint.pt`; several ranks write shards, which one process goes on with too.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..config import LATER
from ..pretrained import scale_of_state
from ..support.all_ranks import AllRanks
from ..support.argument_checks import check_finite
from ..support.atomic_files import field
from ..support.json_states import as_json, of_json
from .checkpoint import CHECKPOINT, read_checkpoint, write_checkpoint
from .same_settings import check_same_settings, completed
from .sharded_checkpoint import RECORD, read_record, read_shards, write_shards

if TYPE_CHECKING:
    from .training_run import TrainingRun


def settings(run: TrainingRun) -> dict[str, Any]:
    """What a checkpoint must have been made with. Model and layer too: their shards may be of equal sizes."""
    manifest = run.feed.about
    return {
        # first: other activations have another scale, and so another SAE
        "activations": {name: manifest.get(name) for name in ("model", "layer", "source", "scale")},
        "sae": run.target.settings(),
        "train": asdict(run.config),
        "data": run.feed.data,
        "init": run.init,
    }


def save(run: TrainingRun) -> None:
    """Writes the checkpoint; of several ranks each its shard."""
    ranks, lanes = run.feed.ranks, run.feed.stream.lanes
    state: dict[str, Any] = {
        "settings": settings(run),
        "step": run.step,
        "seconds": run.seconds,
        "metrics": run.metrics,
    }
    if (place := run.feed.stream.state_dict()) is not None:
        state["stream"] = place
    if ranks.size == 1 and lanes == 1 and not (run.folder / RECORD).exists():
        whole = {
            "sae": run.sae.state_dict(),
            "generator": run.sae.generator.get_state(),
            "pool": run.sae.memory.pool.state_dict(),
            "hints": run.sae.memory.hints.state_dict(),
            "optimizer": run.optimizer.state_dict(),
        }
        write_checkpoint(run.folder / CHECKPOINT, {**state, **whole})
        return
    tensors = _tensors(run)
    pool = {name: value for name, value in run.sae.memory.pool.state_dict().items() if not isinstance(value, Tensor)}
    plain = {"pool": pool, "tensors": sorted(tensors), "hints": _hints(run)}
    if "stream" in state:
        state["stream"] = as_json(state["stream"])
    record = {**state, "lanes": lanes, "plain": plain}
    write_shards(run.folder, tensors, record, ranks)


def saved(folder: Path, ranks: AllRanks) -> tuple[Path, dict[str, Any]] | None:
    """The file of the checkpoint in a folder, and what that holds; None where there is none.

    Raises:
        ValueError: a damaged one.
    """
    with ranks.together():
        kinds = [name for name in (RECORD, CHECKPOINT) if (folder / name).exists()]
    kinds = ranks.share(kinds)
    if not kinds:
        return None
    path = folder / kinds[0]
    with ranks.together():
        if kinds[0] == CHECKPOINT:
            return path, read_checkpoint(path)
        record = read_record(folder)
        return path, {**record, "stream": of_json(f"{path}: stream", record.get("stream"))}


def load(run: TrainingRun, path: Path, state: dict[str, Any]) -> None:
    """Goes on from a checkpoint, as `saved` gives it.

    Raises:
        ValueError: one of other settings, or a damaged one.
    """
    ranks = run.feed.ranks
    with ranks.together():
        then, now = state["settings"], settings(run)
        # an earlier version's: the scale stands among the settings of the activations
        then["sae"] = {**LATER, "input_scale": now["sae"]["input_scale"], **field(path, then, "sae", dict)}
        now["sae"] = {**LATER, **now["sae"]}
        then["train"] = _extended(completed(then.get("train")), state["step"], run.config.steps)
        check_same_settings(path, then, now)
        lanes = state.get("lanes", 1)
        if lanes != run.feed.stream.lanes:
            raise ValueError(f"{path}: made with {lanes} lanes, this training has {run.feed.stream.lanes}")
    # a pool that is kept is that of the last step
    run.follow_schedule(max(0, state["step"] - 1))
    try:
        if path.name == RECORD:
            _load_shards(run, state)
        elif ranks.size == 1:
            _load_whole(run, state)
        else:
            _spread_whole(run, state)
    except (LookupError, AttributeError, TypeError, ValueError) as error:
        said = " ".join(str(error).split())
        raise ValueError(f"{path}: damaged, it does not fit its own settings ({said})") from error
    run.step, run.seconds, run.metrics = state["step"], state["seconds"], state["metrics"]


def _extended(train: Any, step: int, steps: int) -> Any:
    """The settings of a training that has ended with another number of steps, where it is to take more."""
    ended = isinstance(train, dict) and step == train.get("steps")
    return {**train, "steps": steps} if ended and steps > step else train


def _load_whole(run: TrainingRun, state: dict[str, Any]) -> None:
    try:
        run.sae.load_state_dict(state["sae"])
        run.sae.generator.set_state(state["generator"])
        run.sae.memory.pool.load_state_dict(state["pool"], run.feed.device)
        run.sae.memory.hints.load_state_dict(state.get("hints", []), run.feed.device)  # earlier versions: none
        run.optimizer.load_state_dict(state["optimizer"])
    except RuntimeError as error:
        raise ValueError(str(error)) from error


def _load_shards(run: TrainingRun, record: dict[str, Any]) -> None:
    from torch.distributed.tensor import DTensor  # seconds, which one process alone never needs

    run.optimizer.allocate()
    own = _tensors(run, kept=record["plain"]["pool"])
    wanted = {name: own[name] for name in record["plain"]["tensors"]}
    read_shards(run.folder, record, wanted, run.feed.ranks)
    for name, tensor in wanted.items():
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if local.is_floating_point():
            check_finite(local, name)
    _take_over(run, wanted, record["plain"]["pool"])
    _take_hints(run, record["plain"].get("hints"))  # earlier versions: none


def _spread_whole(run: TrainingRun, state: dict[str, Any]) -> None:
    """Each rank has read a checkpoint of one process, and keeps what is its own of it."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    run.optimizer.allocate()
    groups = state["optimizer"]["param_groups"]
    moments = {group["name"]: state["optimizer"]["state"][group["params"][0]] for group in groups}
    whole = {f"sae.{name}": tensor for name, tensor in state["sae"].items()}
    whole |= {f"optimizer.{name}.{key}": t for name, kept in moments.items() for key, t in kept.items()}
    whole["generator"] = state["generator"]
    pool = state["pool"]
    if "members" in pool:
        mask = torch.zeros(run.sae.cfg.d_sae, dtype=torch.bool)
        mask.index_fill_(0, pool["members"], True)
        taken = mask.clone()
        taken[pool["members"]] = pool.get("taken", taken[pool["members"]])
        whole |= {"pool.members": mask, "pool.taken": taken, "pool.scores": pool["scores"]}
    own = _tensors(run, kept=pool)
    for name, tensor in own.items():
        part = whole[name].to(tensor.device)
        tensor.copy_(
            distribute_tensor(part, tensor.device_mesh, tensor.placements) if isinstance(tensor, DTensor) else part
        )
    _take_over(run, own, pool)


def _tensors(run: TrainingRun, kept: dict[str, Any] | None = None) -> dict[str, Tensor]:
    """By name all that a run goes on from, or is to read: of a pool that is kept, members and those taken are masks.

    kept: what a checkpoint says of its pool; that of the run itself where None.
    """
    found: dict[str, Tensor] = {f"sae.{name}": tensor for name, tensor in run.sae.state_dict().items()}
    for group in run.optimizer.param_groups:
        for key, tensor in run.optimizer.state[group["params"][0]].items():
            found[f"optimizer.{group['name']}.{key}"] = tensor
    found["generator"] = run.sae.generator.get_state()
    layout, local = run.sae.layout, run.sae.layout.local(run.sae.b_enc)
    pool = run.sae.memory.pool.state_dict() if kept is None else {}
    if "uses" in (pool if kept is None else kept):
        masks = torch.zeros(2, len(local), dtype=torch.bool, device=local.device)
        if kept is None:
            members = pool["members"]
            masks[0, members] = True
            masks[1, members] = pool.get("taken", masks[0, members])
        columns = dict(zip(("members", "taken"), masks), scores=pool.get("scores", torch.zeros_like(local)))
        found |= {f"pool.{name}": layout.like(column, "b_enc") for name, column in columns.items()}
    return found


def _hints(run: TrainingRun) -> dict[str, Any]:
    """Where searches start, which moves last bits: on all ranks, and on each of this layout alone."""
    ranks, own = run.feed.ranks, run.sae.layout.own_hints
    of_ranks = ranks.gather([] if own is None else own.state_dict())
    return {"layout": [ranks.data[1], ranks.feature[1]], "all": run.sae.memory.hints.state_dict(), "own": of_ranks}


def _take_hints(run: TrainingRun, hints: dict[str, Any] | None) -> None:
    """Those of single ranks at the same layout alone."""
    ranks, own = run.feed.ranks, run.sae.layout.own_hints
    if hints is None:
        return
    run.sae.memory.hints.load_state_dict(hints["all"], run.feed.device)
    if own is not None and hints["layout"] == [ranks.data[1], ranks.feature[1]]:
        own.load_state_dict(hints["own"][ranks.rank], run.feed.device)


def _take_over(run: TrainingRun, tensors: dict[str, Tensor], pool: dict[str, Any]) -> None:
    """What is not filled in place."""
    scale = scale_of_state(tensors["sae.input_scale"])
    if scale != run.sae.cfg.input_scale:
        raise ValueError(f"input_scale={scale}, the SAE has {run.sae.cfg.input_scale}")
    run.sae.generator.set_state(tensors["generator"])
    kept = dict(pool)
    if "uses" in kept:
        local = run.sae.layout.local
        members = local(tensors["pool.members"]).nonzero().squeeze(1)
        kept |= {"members": members, "scores": local(tensors["pool.scores"])}
        taken = local(tensors.get("pool.taken", tensors["pool.members"]))[members]  # earlier versions: all of them
        kept |= {} if taken.all() else {"taken": taken}
    run.sae.memory.pool.load_state_dict(kept, run.feed.device)
