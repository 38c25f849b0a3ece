"""Matryoshka SAEs, skip transcoders, crosscoders on real activations: ours and the peers', at equal steps and time.

Of each kind all candidates train in processes of their own, in slices of a few seconds that go round, on the same
activations in the same order, with Adam at one learning rate after a short warm-up (sparsify also with its own
optimizer). Matryoshka SAEs start from the same weights; the others as each library begins them. The encoder product is
timed beside every fifth step. After --steps steps, and after --marks seconds inside the steps, the weights go into one
SampledSAE, are calibrated to L0 = k by a threshold, and are evaluated on held-out text and, but for crosscoders, in the
model. dictionary_learning's crosscoder is not in its release: SAMPLED_SAE_CROSSCODERS names a checkout of a branch.

    sampled-sae harvest runs/quality/activations --layer 15 --texts wiki-en --tokens 250000
    sampled-sae harvest runs/quality/mlp --layer 15 --mlp --texts wiki-en --tokens 150000
    sampled-sae harvest runs/quality/beside --layer 7 --beside 15 23 --texts wiki-en --tokens 150000
    .venv/peers/bin/python benchmarks/family.py --matryoshka runs/quality/activations --transcoder runs/quality/mlp \
        --crosscoder runs/quality/beside --out benchmarks/results/family_training.json

A kind that the result file has already, with the same settings, is not trained again.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.equal_time import CALIBRATION_TOKENS, SLICE
from benchmarks.measure import Row, product, spread_columns
from benchmarks.peers import BATCH, TOKEN, Entry, Setup, Weights, initial_weights, installed, make, ours
from benchmarks.peers.candidate import TranscoderWeights
from benchmarks.record import Record, Result, markdown, parser
from benchmarks.steps.harness import reason_in
from benchmarks.worker import Worker, WorkerError
from sampled_sae import SampledSAE
from sampled_sae.lm import PointSplice, SpliceEvaluator, load_model
from sampled_sae.support.timing import timed
from sampled_sae.training.activations import Activations
from sampled_sae.training.feed import Feed
from sampled_sae.training.opening import as_activations
from sampled_sae.training.sweep import Splice, evaluate
from sampled_sae.training.training_batch import TrainingBatch

PRODUCT_EVERY = 5
WANTED = {
    "fvu": "fvu",
    "fvu_layers": "fvu_layers",
    "l0": "l0",
    "fvu_groups": "fvu_groups",
    "loss_recovered_zero": "loss_recovered",
}


@dataclass(frozen=True)
class Kind:
    """What is trained.

    Attributes:
        entries: the candidates, for a dictionary of F features.
        start: (setup, first batch) to what a candidate is made with.
        sae: (tensors, setup, activations) to the SAE that is judged.
        splice: its evaluator in the language model; None where it has none.
    """

    entries: Callable[[int], dict[str, Entry]]
    start: Callable[[Setup, TrainingBatch], Any]
    sae: Callable[[dict[str, Tensor], Setup, Activations], SampledSAE]
    splice: Any


def groups_of(F: int) -> tuple[int, ...]:
    """Three."""
    return F // 16, F // 4, F


def matryoshka(F: int) -> dict[str, Entry]:
    nested: dict[str, Any] = {"groups": groups_of(F)}
    return {
        "ours, l=4": ours(l=4.0, **nested),
        "ours, l=None (BatchTopK)": ours(**BATCH, **nested),
        "SAELens MatryoshkaBatchTopK": Entry("saelens", BATCH, nested, "sae-lens"),
        "dictionary_learning MatryoshkaBatchTopK": Entry("dictionary_learning", BATCH, nested, "dictionary-learning"),
    }


def transcoders(F: int) -> dict[str, Entry]:
    rules: dict[str, dict[str, Any]] = {"l=4": {"l": 4.0}, "l=None (BatchTopK)": BATCH, "TopK": TOKEN}
    own = {f"ours, {name}": {"optimizer": "dense", "rule": rule} for name, rule in rules.items()}
    peer = {"sparsify TopK": {"optimizer": "signum"}, "sparsify TopK, Adam": {"optimizer": "adam"}}
    found = {name: Entry("ours_transcoder", options["rule"], options) for name, options in own.items()}
    return found | {name: Entry("sparsify_transcoder", TOKEN, how, "eai-sparsify") for name, how in peer.items()}


def crosscoders(F: int) -> dict[str, Entry]:
    rules: dict[str, dict[str, Any]] = {"l=4": {"l": 4.0}, "l=None (BatchTopK)": BATCH}
    own = {f"ours, {name}": {"optimizer": "dense", "rule": rule} for name, rule in rules.items()}
    found = {name: Entry("ours_crosscoder", options["rule"], options) for name, options in own.items()}
    return found | {"dictionary_learning BatchTopKCrossCoder": Entry("dictionary_learning_crosscoder", BATCH)}


def matryoshka_sae(tensors: dict[str, Tensor], setup: Setup, store: Activations) -> SampledSAE:
    return Weights(**tensors).sae(setup.k, l=None, groups=groups_of(setup.F), input_scale=store.scale)


def transcoder(tensors: dict[str, Tensor], setup: Setup, store: Activations) -> SampledSAE:
    scales = {"input_scale": store.scale, "output_scale": store.output_scale}
    return TranscoderWeights(**tensors).sae(setup.k, l=None, **scales)


def crosscoder(tensors: dict[str, Tensor], setup: Setup, store: Activations) -> SampledSAE:
    return Weights(**tensors).sae(setup.k, l=None, layers=setup.layers, input_scale=store.scale)


KINDS = {
    "matryoshka": Kind(
        matryoshka, lambda setup, batch: initial_weights(setup, batch.median), matryoshka_sae, SpliceEvaluator
    ),
    "crosscoder": Kind(crosscoders, lambda setup, batch: batch.x, crosscoder, None),
    "transcoder": Kind(transcoders, lambda setup, batch: (batch.x, batch.target), transcoder, PointSplice),
}


class FamilySession:
    """One candidate in training; its weights after `steps` steps are kept in `folder`."""

    def __init__(self, kind: str, name: str, activations: Path, setup: Setup, threads: int, steps: int, folder: Path):
        torch.set_num_threads(threads)
        self.setup, self.wanted, self.folder, self.name = setup, steps, folder, name
        self.feed = Feed(as_activations(activations), setup.B, seed=0)
        first = self.feed.batch(0)
        self.candidate = make(KINDS[kind].entries(setup.F)[name], setup, KINDS[kind].start(setup, first))
        self.product = product(first.x, torch.randn(setup.F, first.x.shape[1]))
        self.seconds, self.steps = 0.0, 0
        self.ratios: list[float] = []

    def train(self, until: float) -> None:
        """Goes on until the steps have taken `until` seconds in all."""
        while self.seconds < until:
            self._step()

    def finish(self) -> None:
        """Goes on to `steps` steps."""
        while self.steps < self.wanted:
            self._step()

    def save(self, mark: str) -> Row:
        """The weights as they are, in a file; what its row has of it."""
        path = self.folder / f"{self.name}, {mark}.safetensors"
        save_file(self.candidate.weights()._asdict(), path)
        return {"at": mark, "steps": self.steps, "seconds": self.seconds, "file": path}

    def after_steps(self) -> Row:
        """What `save` gave after `steps` steps, and the figures of a step."""
        return {**self.at_steps, **spread_columns(self.ratios, "ratio")}

    def _step(self) -> None:
        batch = self.feed.batch(self.steps)
        given = (batch.x,) if batch.target is None else (batch.x, batch.target)
        beside = self.steps % PRODUCT_EVERY == PRODUCT_EVERY - 1
        floor = min(timed(self.product, "cpu") for _ in range(2)) if beside else 0.0
        taken = timed(lambda: self.candidate.step(*given), "cpu")
        self.ratios += [taken / floor] if beside else []
        self.seconds += taken
        self.steps += 1
        if self.steps == self.wanted:
            self.at_steps = self.save(f"{self.wanted} steps")


def train_kind(
    kind: str, activations: Path, setup: Setup, steps: int, marks: list[float], folder: Path, threads: int
) -> list[Row]:
    """Of each candidate a row after `steps` steps and one at each mark, with the file of its weights; or the reason."""
    entries = KINDS[kind].entries(setup.F)
    rows: dict[str, list[Row]] = {name: [] for name in entries}
    workers = {name: Worker(FamilySession, kind, name, activations, setup, threads, steps, folder) for name in entries}

    def each(act: Callable[[str], Iterable[Row]]) -> None:
        for name in list(workers):
            row: Row = {}
            with reason_in(row):
                if not installed(entries[name]):
                    raise WorkerError("not installed")
                rows[name] += act(name)
            if row:
                rows[name] = [row]
                workers.pop(name).close()

    def until(seconds: float, name: str) -> list[Row]:
        workers[name].call("train", seconds)
        return [workers[name].call("save", f"{seconds:g} s")] if seconds in marks else []

    def ended(name: str) -> list[Row]:
        workers[name].call("finish")
        return [workers[name].call("after_steps")]

    done = 0.0
    while done < marks[-1]:
        done = min([done + SLICE, *(mark for mark in marks if mark > done)])
        each(partial(until, done))
        print(f"{kind}: {done:g} s of steps each", flush=True)
    each(ended)
    for worker in workers.values():
        worker.close()
    return [{"kind": kind, "candidate": name, **row} for name, found in rows.items() for row in found]


def judged(row: Row, setup: Setup, store: Activations, feed: Feed, splice: Splice | None) -> Row:
    """The row with its SAE's figures at mean L0 = k by a threshold, on held-out activations."""
    if "file" not in row:
        return row
    row = dict(row)
    sae = KINDS[row["kind"]].sae(load_file(row.pop("file")), setup, store).eval()
    sae.calibrate(feed.calibration()[:CALIBRATION_TOKENS], scaled=True)
    result = evaluate(sae, store.holdout()[0], setup.B, splice)
    return row | {name: result[measure] for measure, name in WANTED.items() if measure in result}


def markdown_table(result: Result) -> str:
    """A line a candidate: its step, and FVU and loss recovered at equal steps and at equal time."""
    lines: dict[tuple[str, str], Row] = {}
    marks = list(dict.fromkeys(row["at"] for row in result["rows"] if "at" in row))
    marks.sort(key=lambda mark: not mark.endswith("steps"))
    for row in result["rows"]:
        at = marks.index(row["at"]) if "at" in row else "none"
        named = {f"{name} {at}": value for name, value in row.items() if name != "reason"}
        named |= {f"coarse {at}": row["fvu_groups"][0]} if "fvu_groups" in row else {}
        key = row["kind"], row["candidate"]
        lines[key] = {**lines.get(key, {}), **row, **named}
    columns = {"": "{kind}", "candidate": "{candidate}", "step / product": "{ratio:.2f}"}
    columns |= {"p20–p80": "{ratio_p20:.2f}–{ratio_p80:.2f}"}
    for i, mark in enumerate(marks):
        columns |= {} if mark.endswith("steps") else {f"steps in {mark}": f"{{steps {i}}}"}
        columns |= {f"FVU, {mark}": f"{{fvu {i}:.3f}}", f"first group, {mark}": f"{{coarse {i}:.3f}}"}
        columns |= {f"loss recovered, {mark}": f"{{loss_recovered {i}:.3f}}"}
    return markdown(columns, lines.values())


def kept(out: Path, head: dict[str, Any]) -> list[Row]:
    """The rows of a result file that was made with the same settings."""
    before = json.loads(out.read_text()) if out.is_file() else {}
    return before["rows"] if {name: before.get(name) for name in head} == head else []


def made(kind: str, activations: Path, args: argparse.Namespace) -> list[Row]:
    """All rows of a kind."""
    store = as_activations(activations)
    about = {"lr": args.lr, "warm_up": args.warm_up, "dead_after": args.dead_after}
    setup = Setup(args.batch_size, store.d_in, args.features, args.k, **about, layers=store.layers)
    splice = None
    if args.model != "none" and KINDS[kind].splice is not None:
        # made first: what is missing is better known before minutes of training
        rows = store.holdout_rows()[: args.splice_rows]
        splice = KINDS[kind].splice.of_harvest(load_model(args.model)[0], rows, store.manifest).evaluate
    size = {"B": setup.B, "d": setup.d, "F": setup.F, "k": setup.k}
    size |= {"layers": setup.layers} if setup.layers > 1 else {}
    size |= {name: store.manifest.get(name) for name in ("model", "layer", "point", "source")}
    with tempfile.TemporaryDirectory() as folder:
        found = train_kind(kind, activations, setup, args.steps, sorted(args.marks), Path(folder), args.threads)
        feed = Feed(store, args.batch_size, seed=0)
        return [{**size, **judged(row, setup, store, feed, splice)} for row in found]


def main() -> None:
    small = {"features": 4096, "k": 32, "batch_size": 1024, "lr": 3e-3, "warm_up": 10, "dead_after": 50_000}
    command = parser(__doc__, "--out", model="smollm2-135m", steps=120, splice_rows=8, **small)
    command.add_argument("--marks", type=float, nargs="+", default=[30], help="seconds of training steps")
    for kind in KINDS:
        command.add_argument(
            f"--{kind}", type=Path, help="folder that `sampled-sae harvest` wrote; not trained without"
        )
    args = command.parse_args()
    given = {kind: getattr(args, kind) for kind in KINDS if getattr(args, kind) is not None}
    about = ("features", "k", "batch_size", "lr", "warm_up", "dead_after", "steps", "marks", "splice_rows")
    head = {"setup": {name: getattr(args, name) for name in about}}
    record = Record(args, markdown_table, **head)
    record.rows += [row for row in kept(args.out, head) if row["kind"] in KINDS]
    for kind, activations in given.items():
        if not any(row["kind"] == kind and "fvu" in row for row in record.rows):
            record.rows[:] = [row for row in record.rows if row["kind"] != kind]
            record.add(*made(kind, activations, args))


if __name__ == "__main__":
    main()
