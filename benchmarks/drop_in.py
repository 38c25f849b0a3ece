"""The peers' own training loops with and without us (benchmarks/peers/loops.py), on real activations.

Each loop runs in a process of its own, as its library has it, with the same seed and the same batches; a step is the
time between handing out a batch and being asked for the next. The sides of a library go in turn, a sample of the
encoder product beside each step. After the first step both must reconstruct held-out activations equally well, else
there is no figure but the reason. Errors after --steps steps are reported. A third side is the loop alone under
bfloat16 autocast, whose error need not be the same.

    python benchmarks/drop_in.py --activations runs/quality/activations runs/quality/mpnet \\
        --out benchmarks/results/drop_in.json

A size takes the activations of its width; where there are none they are drawn, and few steps taken. Memory is the peak
of a step above what the process holds between steps (gradients count), in units of one float32 [B, F].
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from benchmarks.measure import Row, spread_columns
from benchmarks.peers import BATCH, TOKEN, Entry, Setup, installed
from benchmarks.record import SIZE, Record, Result, markdown, parser
from benchmarks.steps.harness import figures, reason_in, samples_in_turn
from benchmarks.steps.session import StepSession
from benchmarks.worker import Worker, WorkerError
from benchmarks.workloads import CPU_STEPS, REHEARSAL, Workload
from sampled_sae.bench import activations
from sampled_sae.training.activation_store import ActivationStore
from sampled_sae.training.feed import Feed

TOLERANCE = 1e-3  # relative, of the held-out error after the first step
WORKLOADS = {workload.name: workload for workload in CPU_STEPS[:2]}
SIDES = ("alone", "with us", "autocast")
SLICE = 10  # steps before the other side's turn
LIBRARIES = {
    "SAELens BatchTopK": Entry("loops", BATCH, {"library": "saelens"}, "sae-lens"),
    "dictionary_learning BatchTopK": Entry("loops", BATCH, {"library": "dictionary_learning"}, "dictionary-learning"),
    "sparsify TopK": Entry("loops", TOKEN, {"library": "sparsify"}, "eai-sparsify"),
}


class LoopSession(StepSession):
    """One side of a library: its loop, batches, and held-out activations; `store` None for drawn ones.

    side: "alone", "with us", or "autocast": alone with its products in bfloat16.
    """

    def __init__(self, library: str, side: str, setup: Setup, store: Path | None, threads: int) -> None:
        entry = LIBRARIES[library]
        dtype = "bfloat16" if side == "autocast" else None
        sided = replace(entry, options={**entry.options, "with_us": side == "with us"}, dtype=dtype)
        super().__init__(sided, setup, threads, ("product",))
        self.taken = 0
        if store is None:
            self.batch = lambda t: activations(setup.B, setup.d, t)
            self.held_out = activations(setup.B, setup.d, 10**6)
        else:
            opened = ActivationStore.open(store)
            feed = Feed(opened, setup.B, seed=0)
            self.batch = lambda t: feed.batch(t).x
            self.held_out = opened.holdout()[0][: setup.B] * opened.scale
        self.batches = self._batches()

    def train(self, until: int) -> int:
        """Goes on until there were so many steps; returns how many there were."""
        while self.taken < until:
            self.step()
        return self.taken

    @torch.no_grad()
    def fvu(self) -> float:
        """Of held-out activations by the training rule, from the weights alone, the same for both sides."""
        x = self.held_out
        mse = self.candidate.weights().sae(self.setup.k, **self.entry.rule)(x).mse
        return float(mse / (x - x.mean(0)).square().sum(1).mean())

    def _batches(self) -> Iterator[Tensor]:
        for self.taken in itertools.count(1):
            yield self.batch(self.taken - 1)


def measure(library: str, workload: Workload, store: Path | None, rounds: int, steps: int, threads: int) -> Row:
    """The row of a library at a size; without figures but with a `reason` where there can be none."""
    row: Row = {"library": library, **workload.columns(), "real": store is not None}
    if not installed(LIBRARIES[library]):
        return {**row, "reason": "not installed"}
    setup = Setup(workload.B, workload.d, workload.F, workload.k)
    sides = {side: Worker(LoopSession, library, side, setup, store, threads) for side in SIDES}
    with reason_in(row):
        for worker in sides.values():
            worker.call("train", 1)
        row["first_fvu"] = {side: worker.call("fvu") for side, worker in sides.items()}
        alone, ours, _ = row["first_fvu"].values()
        if not abs(ours / alone - 1) <= TOLERANCE:
            raise WorkerError(f"FVU after one step {ours:.6g}, alone {alone:.6g}")
        samples = samples_in_turn(sides, dict.fromkeys(SIDES, row), rounds)
        if "reason" in row:
            raise WorkerError(row["reason"])
        for side, worker in sides.items():
            row[side] = figures(samples[side], workload, worker.call("peak_bytes"))
        for name, side in (("speedup", "alone"), ("speedup_to_autocast", "autocast")):
            pairs = zip(samples[side], samples["with us"], strict=True)
            row |= spread_columns([theirs["step"] / ours["step"] for theirs, ours in pairs], name)
        taken = sides["alone"].call("train", 0)
        for until in [*range(taken, steps, SLICE), max(taken, steps)]:
            row["steps"] = [worker.call("train", until) for worker in sides.values()][-1]
        for side, worker in sides.items():
            row[side]["fvu"] = worker.call("fvu")
    for worker in sides.values():
        worker.close()
    return row


COLUMNS = {
    **SIZE,
    "training loop": "{library}",
    "ms a step, alone / with us": "{alone[step_ms]:.0f} / {with us[step_ms]:.0f}",
    "speedup": "{speedup:.1f}",
    "p20–p80": "{speedup_p20:.1f}–{speedup_p80:.1f}",
    "of the product": "{alone[ratio]:.2f} / {with us[ratio]:.2f}",
    "peak extra memory": "{alone[peak_extra_memory]:.2f} / {with us[peak_extra_memory]:.2f}",
    "held-out FVU": "{alone[fvu]:.4f} / {with us[fvu]:.4f} after {steps} steps{drawn}",
    "alone in bf16 autocast: ms a step": "{autocast[step_ms]:.0f}",
    "our speedup": "{speedup_to_autocast:.1f}",
    "its FVU": "{autocast[fvu]:.4f}",
}


def markdown_table(result: Result) -> str:
    """Both sides of each library; FVU with the steps it was taken after."""
    return markdown(COLUMNS, [{**row, "drawn": "" if row["real"] else ", drawn activations"} for row in result["rows"]])


def main() -> None:
    command = parser(__doc__, "--out", "--rehearse", rounds=7, steps=300)
    harvested = "folders that `sampled-sae harvest` wrote"
    command.add_argument("--activations", type=Path, nargs="+", default=[], help=harvested)
    command.add_argument("--libraries", nargs="+", choices=list(LIBRARIES), default=list(LIBRARIES))
    command.add_argument("--workloads", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS))
    args = command.parse_args()
    os.environ["TQDM_DISABLE"] = "1"  # for the workers: the loops' progress bars
    opened = [ActivationStore.open(folder) for folder in args.activations]
    stores = {store.d_in: store for store in opened}
    origins = [f"{store.manifest.get('model')}, layer {store.manifest.get('layer')}" for store in opened]
    record = Record(args, markdown_table, activations=origins, lr=Setup(1, 1, 1, 1).lr)
    for workload in REHEARSAL if args.rehearse else [WORKLOADS[name] for name in args.workloads]:
        store = stores.get(workload.d)
        for library in args.libraries:
            folder, steps = (store.folder, args.steps) if store else (None, 0)
            record.add(measure(library, workload, folder, args.rounds, steps, args.threads))


if __name__ == "__main__":
    main()
