"""FVU and loss recovered against training time: ours and the peers, each with the same seconds of training steps.

Every candidate trains in a process of its own, in slices of a few seconds that go round, on the same real activations
in the same order from the same weights. Only the time inside its steps counts. All train with Adam at the same
learning rate after the same short warm-up, but for sparsify's own optimizer, which has its own; dead features are
those not used for --dead-after tokens, where a library has an aux loss. At each mark the weights go into one
SampledSAE, are calibrated to L0 = k by a threshold, and are evaluated on held-out text: the same for all.

    sampled-sae harvest runs/quality/activations --layer 15 --texts wiki-en --tokens 250000
    python benchmarks/equal_time.py runs/quality/activations --out benchmarks/results/equal_time.json
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from safetensors.torch import load_file, save_file

from benchmarks.measure import Row
from benchmarks.peers import AUTOCAST, CANDIDATES, Entry, Setup, Weights, initial_weights, installed, make, ours
from benchmarks.quality import splice_of
from benchmarks.record import Record, Result, markdown, parser
from benchmarks.steps.harness import reason_in
from benchmarks.worker import Worker, WorkerError
from sampled_sae.support.timing import timed
from sampled_sae.training.activation_store import ActivationStore
from sampled_sae.training.feed import Feed
from sampled_sae.training.sweep import Splice, evaluate

ENTRIES = {name: entry for name, entry in (CANDIDATES | AUTOCAST).items() if name != "torch.compile BatchTopK"}
ENTRIES["ours, l=4, decayed, pool_every=4"] = ours("decayed", l=4.0, pool_every=4)
LEFT_OUT = ("ours, l=1", "ours, l=16", "eager PyTorch BatchTopK")  # unless asked for
SLICE = 5.0  # seconds of steps before the next candidate's turn
CALIBRATION_TOKENS = 16_384


class TrainingSession:
    """One candidate in training on a store of activations."""

    def __init__(self, entry: Entry, store: Path, setup: Setup, threads: int) -> None:
        torch.set_num_threads(threads)
        self.setup = setup
        self.feed = Feed(ActivationStore.open(store), setup.B, seed=0, device=setup.device)
        weights = initial_weights(setup, b_dec=self.feed.batch(0).median)
        self.candidate = make(entry, setup, weights)
        self.seconds, self.steps = 0.0, 0

    def train(self, until: float) -> int:
        """Goes on until its steps have taken `until` seconds in all; returns how many there were."""
        while self.seconds < until:
            x = self.feed.batch(self.steps).x
            self.seconds += timed(lambda x=x: self.candidate.step(x), self.setup.device)
            self.steps += 1
        return self.steps

    def save(self, path: Path) -> None:
        save_file(self.candidate.weights()._asdict(), path)


def train_all(names: list[str], store: Path, setup: Setup, marks: list[float], folder: Path, threads: int) -> list[Row]:
    """Rows of (candidate, seconds, steps, file of the weights) at each mark; of (candidate, reason) for a failure."""
    rows: list[Row] = []
    workers = {name: Worker(TrainingSession, ENTRIES[name], store, setup, threads) for name in names}
    done = 0.0
    while True:
        for name in list(workers):
            row: Row = {"candidate": name}
            with reason_in(row):
                if not installed(ENTRIES[name]):
                    raise WorkerError("not installed")
                steps = workers[name].call("train", done)
                if done in marks:
                    path = folder / f"{len(rows)}.safetensors"
                    workers[name].call("save", path)
                    row |= {"seconds": done, "steps": steps, "file": path}
            if "reason" in row:
                workers.pop(name).close()
            rows += [row] if len(row) > 1 else []
        print(f"{done:g} s of steps each", flush=True)
        if done >= marks[-1]:
            break
        done = min([done + SLICE, *(mark for mark in marks if mark > done)])
    for worker in workers.values():
        worker.close()
    return rows


def judge(weights: Weights, setup: Setup, store: ActivationStore, feed: Feed, splice: Splice | None) -> dict[str, Any]:
    """At mean L0 = k by a threshold, on held-out activations."""
    sae = weights.sae(setup.k, l=None, input_scale=store.scale).eval()
    sae.calibrate(feed.calibration()[:CALIBRATION_TOKENS], scaled=True)
    result = evaluate(sae, store.holdout()[0], setup.B, splice)
    wanted = {"fvu": "fvu", "l0": "l0", "dead_share": "never_active", "loss_recovered_zero": "loss_recovered"}
    return {name: result[measure] for measure, name in wanted.items() if measure in result}


def markdown_table(result: Result) -> str:
    """FVU and loss recovered at each mark, a line a candidate, with its steps at the last."""
    lines: dict[str, Row] = {}
    marks = result["marks"]
    for row in result["rows"]:
        at = marks.index(row["seconds"]) if "seconds" in row else "none"
        named = {f"{name} {at}": value for name, value in row.items() if name != "reason"}
        lines[row["candidate"]] = {**lines.get(row["candidate"], {}), **row, **named}
    columns = {"candidate": "{candidate}", "steps": f"{{steps {len(marks) - 1}}}"}
    for name, heading in (("fvu", "FVU"), ("loss_recovered", "loss recovered")):
        columns |= {f"{heading}, {mark:g} s": f"{{{name} {i}:.3f}}" for i, mark in enumerate(marks)}
    return markdown(columns, lines.values())


def main() -> None:
    small = {"features": 16384, "k": 32, "batch_size": 1024, "lr": 3e-3, "warm_up": 10, "dead_after": 50_000}
    command = parser(__doc__, "--out", "--device", model="smollm2-135m", splice_rows=16, **small)
    command.set_defaults(device="cpu")
    command.add_argument("activations", type=Path, help="folder that `sampled-sae harvest` wrote")
    command.add_argument("--marks", type=float, nargs="+", default=[15, 30, 60, 90], help="seconds of training steps")
    command.add_argument("--candidates", nargs="+", choices=list(ENTRIES))
    args = command.parse_args()
    store = ActivationStore.open(args.activations)
    about = {"lr": args.lr, "warm_up": args.warm_up, "dead_after": args.dead_after, "device": args.device}
    about["dtype"] = "float32" if args.device == "cpu" else "bfloat16"
    setup = Setup(args.batch_size, store.d_in, args.features, args.k, **about)
    marks = sorted(args.marks)
    names = args.candidates or [name for name in ENTRIES if name not in LEFT_OUT]
    # made first: what is missing is better known before half an hour of training
    splice = None if args.model == "none" else splice_of(args.model, store, args.splice_rows)
    source = {name: store.manifest.get(name) for name in ("model", "layer", "source")}
    record = Record(args, markdown_table, activations=source, setup=asdict(setup), marks=marks)
    with tempfile.TemporaryDirectory() as folder:
        rows = train_all(names, args.activations, setup, marks, Path(folder), args.threads)
        feed = Feed(store, args.batch_size, seed=0)
        for row in rows:
            if "file" in row:
                row |= judge(Weights(**load_file(row.pop("file"))), setup, store, feed, splice)
            record.add(row)


if __name__ == "__main__":
    main()
