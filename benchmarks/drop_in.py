"""The peers' own training loops with and without us: SAELens' SAETrainer.fit, dictionary_learning's trainSAE, and
sparsify's SparseCoder with its default optimizer.

Each loop runs in a process of its own, as its library has it, with the same seed and the same batches. It gets them
from an iterator that takes the time between handing out a batch and being asked for the next. The two sides of a
library go in turn, a sample of the encoder product beside each step. After the first step both must reconstruct
held-out activations equally well, else there is no figure but the reason. Errors after --steps steps are reported.

    python benchmarks/drop_in.py --activations runs/quality/activations runs/quality/mpnet \\
        --out benchmarks/results/drop_in.json

A size takes the activations of its width; where there are none they are drawn, and few steps taken. Memory is the peak
of a step above what the process holds between steps (gradients count), in units of one float32 [B, F].
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from benchmarks.measure import PEERS, Row, machine, parser, product, spread_columns, table, version, write_result
from benchmarks.peers import Setup, Weights, initial_weights
from benchmarks.peers.candidate import ENDLESS
from benchmarks.steps.harness import figures, samples_in_turn
from benchmarks.worker import Worker, WorkerError
from benchmarks.workloads import CPU_STEPS, REHEARSAL, Workload
from sampled_sae.bench import activations
from sampled_sae.support.timing import peak_memory, timed
from sampled_sae.training.activation_store import ActivationStore
from sampled_sae.training.batches import Feed

TOLERANCE = 1e-3  # relative, of the held-out error after the first step
WORKLOADS = CPU_STEPS[:2]
SIDES = ("alone", "with us")
SLICE = 10  # steps before the other side's turn
Loop = Callable[[Iterator[Tensor]], None]
Trained = Callable[[], Weights]


def saelens(setup: Setup, with_us: bool) -> tuple[Loop, Trained]:
    from sae_lens.training.sae_trainer import SAETrainer

    from benchmarks.peers.saelens import trainer_config, training_sae, weights_of

    sae = training_sae(setup)
    if with_us:
        from sampled_sae.integrations.saelens import accelerate

        accelerate(sae)

    def loop(batches: Iterator[Tensor]) -> None:
        SAETrainer(trainer_config(setup, ENDLESS), sae, batches).fit()

    return loop, lambda: weights_of(sae)


def dictionary_learning(setup: Setup, with_us: bool) -> tuple[Loop, Trained]:
    from dictionary_learning.training import trainSAE

    from benchmarks.peers.dictionary_learning import trainer_config, weights_of

    if with_us:
        from sampled_sae.integrations.dictionary_learning import BatchTopKTrainer
    else:
        from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
    made: list[Any] = []

    def remembered(**config: Any) -> Any:
        made.append(BatchTopKTrainer(**config))
        return made[0]

    def loop(batches: Iterator[Tensor]) -> None:
        config = {"trainer": remembered, **trainer_config(setup, ENDLESS)}
        trainSAE(batches, [config], steps=ENDLESS, device=setup.device)

    return loop, lambda: weights_of(made[0])


def sparsify(setup: Setup, with_us: bool) -> tuple[Loop, Trained]:
    from benchmarks.peers.sparsify import Library

    if with_us:
        from sampled_sae.integrations.sparsify import patch_sparsify

        patch_sparsify()
    library = Library(setup, initial_weights(setup), optimizer="signum")

    def loop(batches: Iterator[Tensor]) -> None:
        for x in batches:
            library.step(x)

    return loop, library.weights


LIBRARIES: dict[str, tuple[Callable[[Setup, bool], tuple[Loop, Trained]], str, dict[str, Any]]] = {
    "SAELens BatchTopK": (saelens, "sae-lens", {"l": None}),
    "dictionary_learning BatchTopK": (dictionary_learning, "dictionary-learning", {"l": None}),
    "sparsify TopK": (sparsify, "eai-sparsify", {"l": None, "select": "token"}),
}


class MeteredLoop:
    """A library's loop in a thread, which gets a batch when it is asked to take a step."""

    def __init__(self, loop: Loop) -> None:
        self.tasks: SimpleQueue[tuple[Tensor, Callable[[], Any] | None]] = SimpleQueue()
        self.answers: SimpleQueue[Any] = SimpleQueue()
        Thread(target=self._run, args=(loop,), daemon=True).start()

    def step(self, x: Tensor, floor: Callable[[], Any] | None = None) -> tuple[float, float]:
        """Seconds of the loop's step on x, and of `floor` before it."""
        self.tasks.put((x, floor))
        answer = self.answers.get()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _run(self, loop: Loop) -> None:
        try:
            loop(self._batches())
            raise RuntimeError("the loop ended")
        except Exception as error:
            self.answers.put(error)

    def _batches(self) -> Iterator[Tensor]:
        while True:
            x, floor = self.tasks.get()
            floor_seconds = 0.0
            if floor is not None:
                floor()  # wakes threads and caches after the other side's turn
                floor_seconds = timed(floor)
            handed_out = time.perf_counter()
            yield x
            self.answers.put((time.perf_counter() - handed_out, floor_seconds))


class LoopSession:
    """One side of a library: its loop, batches, and held-out activations; `store` None for drawn ones."""

    def __init__(self, library: str, with_us: bool, workload: Workload, store: Path | None, threads: int) -> None:
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        setup = Setup(workload.B, workload.d, workload.F, workload.k)
        self.workload, self.setup = workload, setup
        make, _, self.rule = LIBRARIES[library]
        if store is None:
            self.batch = lambda t: activations(setup.B, setup.d, t)
            self.held_out = activations(setup.B, setup.d, 10**6)
        else:
            opened = ActivationStore.open(store)
            feed = Feed(opened, setup.B, seed=0)
            self.batch = lambda t: feed.batch(t).x
            self.held_out = opened.holdout()[0][: setup.B]
        self.steps = 0
        self.floor = product(self.held_out, initial_weights(setup).W_enc)
        loop, self.trained = make(setup, with_us)
        self.loop = MeteredLoop(loop)

    def sample(self) -> dict[str, float]:
        """Seconds of the next step, and of the product before it."""
        own, floor = self.loop.step(self._next_batch(), self.floor)
        return {"product": floor, "step": own}

    def train(self, until: int) -> int:
        """Goes on until there were so many steps; returns how many there were."""
        while self.steps < until:
            self.loop.step(self._next_batch())
        return self.steps

    def peak_bytes(self) -> int:
        """Of two steps, above what is held between steps."""
        batches = [self._next_batch() for _ in range(2)]
        return peak_memory(lambda: [self.loop.step(x) for x in batches])

    @torch.no_grad()
    def fvu(self) -> float:
        """Of held-out activations by the training rule, from the weights alone, the same for both sides."""
        x = self.held_out
        mse = self.trained().sae(self.setup.k, **self.rule)(x).mse
        return float(mse / (x - x.mean(0)).square().sum(1).mean())

    def _next_batch(self) -> Tensor:
        self.steps += 1
        return self.batch(self.steps - 1)


def measure(library: str, workload: Workload, store: Path | None, rounds: int, steps: int, threads: int) -> Row:
    """The row of a library at a size; without figures but with a `reason` where there can be none."""
    row: Row = {"library": library, **workload.columns(), "real": store is not None}
    if version(LIBRARIES[library][1]) is None:
        return {**row, "reason": "not installed"}
    sides: dict[str, Worker] = {}
    try:
        for side in SIDES:
            sides[side] = Worker(LoopSession, library, side == "with us", workload, store, threads)
            sides[side].call("train", 1)
        first = {side: worker.call("fvu") for side, worker in sides.items()}
        row["first_fvu"] = first
        if abs(first["with us"] / first["alone"] - 1) > TOLERANCE:
            return {**row, "reason": f"FVU after one step {first['with us']:.6g}, alone {first['alone']:.6g}"}
        samples, failures = samples_in_turn(sides, rounds)
        if failures:
            return {**row, "reason": "; ".join(failures.values())}
        for side, worker in sides.items():
            row[side] = figures(samples[side], workload, worker.call("peak_bytes"))
        pairs = zip(samples["alone"], samples["with us"], strict=True)
        row |= spread_columns([alone["step"] / ours["step"] for alone, ours in pairs], "speedup")
        taken = sides["alone"].call("train", 0)
        for until in [*range(taken, steps, SLICE)[1:], max(taken, steps)]:
            for worker in sides.values():
                row["steps"] = worker.call("train", until)
        for side, worker in sides.items():
            row[side]["fvu"] = worker.call("fvu")
    except WorkerError as failure:
        row["reason"] = str(failure)
    finally:
        for worker in sides.values():
            worker.close()
    return row


def origin(store: Path) -> str:
    """Model and layer of harvested activations."""
    manifest = ActivationStore.open(store).manifest
    return f"{manifest['model']}, layer {manifest['layer']}"


def markdown_table(result: dict[str, Any]) -> str:
    """Both sides of each library; FVU with the steps it was taken after."""
    head = ["(B, d, F, k)", "training loop", "ms a step, alone / with us", "speedup", "p20–p80"]
    head += ["of the product", "peak extra memory", "held-out FVU"]
    lines = []
    for row in result["rows"]:
        size = "({B}, {d}, {F}, {k})".format(**row)
        if "reason" in row:
            lines.append([size, row["library"], f"– ({row['reason']})", *[""] * 5])
            continue
        both = [row[side] for side in SIDES]
        fvu = " / ".join(f"{side['fvu']:.4f}" for side in both)
        lines.append(
            [
                size,
                row["library"],
                " / ".join(f"{side['step_ms']:.0f}" for side in both),
                f"{row['speedup']:.1f}",
                f"{row['speedup_p20']:.1f}–{row['speedup_p80']:.1f}",
                " / ".join(f"{side['ratio']:.2f}" for side in both),
                " / ".join(f"{side['peak_extra_memory']:.2f}" for side in both),
                f"{fvu} after {row['steps']} steps" + ("" if row["real"] else ", drawn activations"),
            ]
        )
    return table(head, lines)


def main() -> None:
    names = [workload.name for workload in WORKLOADS]
    command = parser(__doc__)
    command.add_argument(
        "--activations", type=Path, nargs="+", default=[], help="folders that `sampled-sae harvest` wrote"
    )
    command.add_argument("--rounds", type=int, default=7, help="timed steps of each side")
    command.add_argument("--steps", type=int, default=300, help="steps on real activations before the last FVU")
    command.add_argument("--libraries", nargs="+", choices=list(LIBRARIES), default=list(LIBRARIES))
    command.add_argument("--workloads", nargs="+", choices=names, default=names)
    command.add_argument("--rehearse", action="store_true", help="tiny sizes, to see that nothing is broken")
    args = command.parse_args()
    torch.set_num_threads(args.threads)
    os.environ["TQDM_DISABLE"] = "1"  # for the workers: the loops' progress bars
    stores = {ActivationStore.open(folder).d_in: folder for folder in args.activations}
    rows = []
    origins = [origin(folder) for folder in args.activations]
    result = {**machine(distributions=PEERS), "activations": origins, "lr": Setup(1, 1, 1, 1).lr, "rows": rows}
    workloads = REHEARSAL if args.rehearse else [w for w in WORKLOADS if w.name in args.workloads]
    for workload in workloads:
        store = stores.get(workload.d)
        steps = args.steps if store else 0
        for library in args.libraries:
            rows.append(measure(library, workload, store, args.rounds, steps, args.threads))
            write_result(args.out, result, markdown_table(result))
            print(rows[-1], flush=True)
    print(markdown_table(result))


if __name__ == "__main__":
    main()
