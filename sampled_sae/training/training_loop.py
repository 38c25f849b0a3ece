"""`train_to_end`: the loop over one or several runs, which a signal stops between two steps with all of them saved."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

from tqdm import tqdm

from ..support.all_ranks import AllRanks
from ..support.interruption import Interrupted, Interruption
from ..support.output_folder import held_by_first
from .precision import is_as_set
from .training_run import TrainingRun


def train_to_end(runs: Mapping[str, TrainingRun], progress: bool) -> None:
    """Trains runs of one TrainConfig, starting from the smallest of their steps; a run ahead waits for the others.

    At the end each run is saved, calibrated and written out. `runs` is name -> run. Ctrl-C or SIGTERM ends the step
    under way and saves checkpoints; a second one stops at once.

    Raises:
        FloatingPointError: a loss that is NaN or inf, with the run's name where there are several.
        Interrupted: a signal came; the checkpoints are those of the step that it names.
        BlockingIOError: another process trains in the folder of a run.
        RankError: one of these on another rank, or a rank that does not answer; names it.
    """
    ranks = next(iter(runs.values())).feed.ranks
    with ranks.accounted(), ExitStack() as stack:
        for run in runs.values():
            stack.enter_context(held_by_first(run.folder, "a training", ranks))
        with ranks.together():
            for run in runs.values():
                run.start_metrics()
        feeds = {id(run.feed): run.feed for run in runs.values()}.values()
        if all(is_as_set(run.config.precision, run.feed.device) for run in runs.values()):
            for feed in feeds:
                stack.enter_context(feed.stream.reading_ahead())
        with Interruption() as interruption:
            _steps(runs, progress and ranks.first, interruption)
        for run in runs.values():
            run.save()
        # One feed after another: the tokens of each take up to CALIBRATION_TOKENS * d_in floats.
        for feed in feeds:
            x = feed.calibration()
            for run in runs.values():
                if run.feed is feed:
                    run.finish(x)


@contextmanager
def closed_logs(runs: Iterable[TrainingRun]) -> Iterator[None]:
    """At its end the logs of the runs are closed, as failed where an error ends it."""
    failed = True
    try:
        yield
        failed = False
    finally:
        for run in runs:
            run.log.close(failed)


def _steps(runs: Mapping[str, TrainingRun], progress: bool, interruption: Interruption) -> None:
    config, ranks = next(iter(runs.values())).config, next(iter(runs.values())).feed.ranks
    first = min(run.step for run in runs.values())
    for run in runs.values():
        run.sae.train()
    bar = tqdm(total=config.steps, initial=first, disable=not progress, unit="step", dynamic_ncols=True)
    with bar:
        for t in range(first, config.steps):
            lines = []
            for name, run in runs.items():
                if run.step > t:
                    continue
                try:
                    line = run.train_on(run.feed.batch(t))
                    if line is not None:
                        run.write_metrics(line)
                        lines.append(line)
                    if run.step % config.checkpoint_every == 0 and run.step < config.steps:
                        run.save()
                except FloatingPointError as error:
                    if len(runs) == 1:
                        raise
                    raise FloatingPointError(f"{name}: {error}, and so are those of the others") from None
            if lines:
                bar.set_postfix(_summary(lines), refresh=False)
            bar.update()
            # of several ranks all stop, after the same step
            if (number := ranks.latest(interruption.number)) is not None:
                _stop(runs, number, ranks)


def _stop(runs: Mapping[str, TrainingRun], number: int, ranks: AllRanks) -> None:
    for run in runs.values():
        run.save()
    done, steps = min(run.step for run in runs.values()), next(iter(runs.values())).config.steps
    folders = ", ".join(str(run.folder) for run in runs.values())
    said = f"step {done} of {steps} is saved in {folders}; the same command or call goes on from it"
    ranks.agree(stopped := Interrupted(number, said), "" if ranks.first else None)
    raise stopped


def _summary(lines: list[dict[str, float]]) -> dict[str, str]:
    """For the progress bar: the values of one run, or smallest and largest over several."""
    shown = {"loss": ("loss", ".4g"), "L0": ("l0", ".1f"), "FVU": ("fvu", ".3f"), "dead": ("dead_share", ".1%")}
    found = {}
    for label, (name, form) in shown.items():
        ends = {format(pick(line[name] for line in lines), form): None for pick in (min, max)}
        found[label] = "–".join(ends)
    return found
