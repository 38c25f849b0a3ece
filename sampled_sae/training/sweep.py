"""A sweep: SAEs over pool multipliers, scores and seeds, trained at equal k, evaluated at equal L0, compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..config import SampledSAEConfig
from ..pretrained import EVALUATION
from ..run_logs import LogPlace
from ..sae import SampledSAE
from ..support.all_ranks import ranks_of
from ..support.argument_checks import check_integer
from ..support.atomic_files import without_nan, write_json
from ..support.output_folder import check_output_folder, held_by_first
from .activation_stream import StreamedActivations
from .activations import Activations
from .evaluation import closing_line, evaluate_activations, reconstruct_with
from .feed import Feed
from .fitting import check_fits
from .opening import Readable, as_readable
from .precision import settled
from .sae_group import SAEGroup, check_configs
from .same_settings import check_same_settings, completed, identity, in_words, is_same_kind
from .sharded_checkpoint import remove_checkpoint
from .sweep_table import read_result, write_table
from .train_config import TrainConfig, check_schedule
from .training_loop import closed_logs
from .training_run import TrainingRun

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Splice = Callable[[Callable[[Tensor], Tensor]], dict[str, float]]
# The sweep's own record of a member: what its table has, whatever is evaluated later.
RESULT = "result.json"


@dataclass(frozen=True)
class SpliceSource:
    """A language model to measure reconstructions in, loaded once all else is known to be right.

    Attributes:
        about: what the measure depends on, such as the model's name; a sweep goes on with the same alone.
        model: loads the model, in this process alone.
        measure: of the model; several processes call it together.
    """

    about: dict[str, Any]
    model: Callable[[], Any]
    measure: Callable[[Any], Splice]

    def load(self) -> Splice:
        return self.measure(self.model())


def variants(
    base: SampledSAEConfig,
    ls: Sequence[float | None],
    scores: Sequence[str],
    seeds: Sequence[int],
    topk: bool,
) -> dict[str, SampledSAEConfig]:
    """name -> config, all combinations. BatchTopK (l=None) uses no score: one a seed; `topk` adds the TopK SAE.

    Raises:
        ValueError: values of l that look alike in a name.
    """
    found: dict[str, SampledSAEConfig] = {}
    if len({f"{l:g}" for l in set(ls) if l is not None}) < len(set(ls) - {None}):
        raise ValueError(f"ls={list(ls)}: some look alike with six digits, which name the folders; leave some out")
    for seed in seeds:
        suffix = f"_seed{seed}" if len(seeds) > 1 else ""
        for l in ls:
            if l is None:
                found[f"batchtopk{suffix}"] = replace(base, l=None, select="batch", seed=seed)
                continue
            for score in scores:
                found[f"l{l:g}_{score}{suffix}"] = replace(base, l=l, score=score, select="batch", seed=seed)
        if topk:
            found[f"topk{suffix}"] = replace(base, l=None, select="token", seed=seed)
    return found


def run_sweep(
    configs: dict[str, SampledSAEConfig],
    train: TrainConfig,
    store: Readable,
    folder: Path,
    splice: Splice | SpliceSource | None = None,
    progress: bool = True,
    say: Callable[[str], None] = lambda line: None,
    together: int = 4,
    device: torch.device | str = "cpu",
    mesh: DeviceMesh | None = None,
    log: LogPlace | None = None,
) -> list[dict[str, Any]]:
    """Trains and evaluates each config in `folder`/name, then writes the table. What is evaluated is not redone.

    Trains `together` configs at a time as one SAEGroup, on `device`; the results do not depend on how many. All
    see the tokens in the order of `train.seed`; a config's own seed is that of its initial weights alone. A stream is
    read again from its beginning for each group: with `together` of all configs in one pass.

    Writes `results.csv`, `results.md` and `sweep.json`, and in each run's folder the trainer's files,
    `evaluation.json` and `result.json`: the evaluation with the settings it was made with, from which the sweep goes
    on. A run's checkpoint is removed once the run is evaluated.

    Args:
        configs: name -> config.
        store: activations as `Trainer` takes them, with a held-out part, as a stream of a `ModelSource` may have too.
        splice: measures a reconstruction in the language model, such as `SpliceEvaluator.evaluate`, or loads what does.
        log: as in Trainer, a run for each SAE.
        mesh: as in Trainer; each SAE is trained and evaluated by all its processes, and the first one writes.
        progress, say: whether to show a progress bar; what to call with each line of news.

    Returns:
        A dict for each config, in their order.

    Raises:
        ValueError: activations without held-out part, results of other settings, model or activations in `folder`, what
            SAEGroup raises; all but a training's own troubles before anything is loaded or computed.
        BlockingIOError: another process trains there.
        Interrupted: a signal came; all that was done is saved.
    """
    together, store = check_integer("together", together, 1), as_readable(store)
    check_configs(configs, dict.fromkeys(configs, store))
    check_output_folder(folder)
    ranks = ranks_of(mesh)
    feed = Feed(store, train.batch_size, train.seed, device, ranks, steps=train.steps)
    common = {"activations": identity(store.manifest), "splice": _about(splice, store), "data": feed.data}
    settings = {name: {**_settings(name, config, train, feed), **common} for name, config in configs.items()}
    place = {name: f"[{i}/{len(configs)}] {name}" for i, name in enumerate(configs, 1)}
    with ranks.together():
        results = {name: found for name in configs if (found := _recorded(folder / name, settings[name])) is not None}
    results = ranks.share(results)
    for name in results:
        say(f"{place[name]}: already evaluated")
    with ranks.together():
        held_out, _ = store.holdout()

    def train_and_evaluate(names: list[str], measure: Splice | None) -> None:
        """One group; its memory is free when this returns, before the next is made."""
        for name in names:
            say(f"{place[name]}: training in {folder / name}")
        group = SAEGroup({name: configs[name] for name in names}, train, store, folder, device, mesh)
        for name, member in group.members.items():
            member.show_in(log, name)
        with closed_logs(group.members.values()):
            for name, sae in group.run(progress).items():
                found = evaluate(sae, held_out, train.batch_size, measure)
                record(name, found, group.members[name])

    def record(name: str, found: dict[str, Any], member: TrainingRun) -> None:
        """What was measured of a member, in its folder, in the log and in a line."""
        results[name] = merged(found, {"settings": settings[name], "seconds": round(member.seconds, 1)})
        with ranks.together():
            if ranks.first:
                write_json(folder / name / EVALUATION, found)
                write_json(folder / name / RESULT, results[name])
                remove_checkpoint(folder / name)
        member.log.result(found)
        say(f"{place[name]}: {closing_line(found, folder / name)}")

    with held_by_first(folder, "a sweep", ranks):
        measure = splice.load() if isinstance(splice, SpliceSource) else splice
        waiting = [name for name in configs if name not in results]
        for start in range(0, len(waiting), together):
            train_and_evaluate(waiting[start : start + together], measure)
        rows = [_row(name, config, results[name]) for name, config in configs.items()]
        with ranks.together():
            if ranks.first:
                write_table(rows, folder)
                write_json(folder / "sweep.json", {"rows": rows, "train": asdict(train)})
    return rows


def _about(splice: Splice | SpliceSource | None, store: Activations | StreamedActivations) -> dict[str, Any] | None:
    """What the measure depends on; ValueError where it is in another model than the activations are of."""
    if splice is None:
        return None
    # of a SpliceSource, or of the SpliceEvaluator that a bound method belongs to
    about: dict[str, Any] = getattr(getattr(splice, "__self__", splice), "about", {})
    if about.get("weights_sha256") and not is_same_kind(about, harvested := identity(store.manifest)):
        raise ValueError(
            f"splice is in {in_words(about)}, but {store.where} holds {in_words(harvested)}; take the evaluator of "
            "SpliceEvaluator.of_harvest, or a function that calls another"
        )
    return about


def _settings(name: str, config: SampledSAEConfig, train: TrainConfig, feed: Feed) -> dict[str, Any]:
    """Of a member and its training; ValueError where the activations do not fit it."""
    try:
        check_fits(config, feed)
        check_schedule(config, train)
    except ValueError as error:
        raise ValueError(f"configs[{name!r}]: {error}") from None
    return {"sae": config.settings(), "train": asdict(settled(train, config, feed.device))}


def _recorded(folder: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The result of a member, which earlier versions kept in evaluation.json; None where there is none yet.

    Raises:
        ValueError: one that was made with other settings.
    """
    for path in (folder / RESULT, folder / EVALUATION):
        found = read_result(path) if path.exists() else {}
        if "settings" in found:
            then = found["settings"]
            check_same_settings(path, {**then, "train": completed(then.get("train"))}, settings)
            return found
    return None


def _row(name: str, config: SampledSAEConfig, result: dict[str, Any]) -> dict[str, Any]:
    score = None if config.l is None else config.score
    measured = {key: value for key, value in result.items() if key != "settings"}
    return merged({"name": name, "l": config.l, "score": score, "seed": config.seed}, measured)


def evaluate(sae: SampledSAE, held_out: Tensor, batch_size: int, splice: Splice | None) -> dict[str, Any]:
    """The metrics of `evaluate_activations` and, where there is `splice`, those in the language model.

    held_out: [n, d_in], and of a transcoder [n, d_in + d_out], as `PairedActivations` gives it.

    `tokens` counts the held-out activations, `predicted_tokens` those that the language model predicts. What is not a
    number is None.

    Raises:
        ValueError: `splice` gives a metric that there is already.
    """
    d_in, transcodes, width = sae.cfg.width_in, sae.cfg.is_transcoder, sae.cfg.width_in + (sae.cfg.d_out or 0)
    if held_out.shape[1] != width:
        behind = ", a transcoder's targets (--targets) behind what it reads" if transcodes else ""
        behind = f", the {sae.cfg.layers} layers of a crosscoder (--beside)" if sae.cfg.is_crosscoder else behind
        raise ValueError(f"held-out activations {list(held_out.shape)}: must be [n, {width}]{behind}")
    result = evaluate_activations(sae, held_out[:, :d_in], batch_size, held_out[:, d_in:] if transcodes else None)
    if splice is not None:
        with torch.no_grad():
            spliced = splice(reconstruct_with(sae))
        counted = {"predicted_tokens": spliced["tokens"]} if "tokens" in spliced else {}
        result = merged(result, merged(counted, {name: v for name, v in spliced.items() if name != "tokens"}))
    return dict(without_nan(result))


def merged(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Both; ValueError where one value would replace another."""
    if both := sorted(set(one) & set(other)):
        raise ValueError(f"two results are named {', '.join(both)}: each needs a name of its own")
    return {**one, **other}
