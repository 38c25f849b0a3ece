"""What equal time and equal steps buy: SAEs, Matryoshka SAEs, skip transcoders, crosscoders; ours and the peers'.

Of each kind all candidates train in processes of their own, in slices of a few seconds that go round, on the same real
activations in the same order, with Adam at one learning rate after a short warm-up (sparsify also with its own
optimizer). SAEs, Matryoshka or not, start from the same weights; the others as each library begins them. Only the time
inside steps counts. Dead features are those not used for --dead-after tokens, where a library has an aux loss. After
--marks seconds, and after --steps steps, the weights go into one SampledSAE, are calibrated to L0 = k by a threshold,
and are evaluated on held-out text and in the model: a crosscoder with all of its layers spliced at once, and with each
alone. Where there are --steps the encoder product is timed beside every fifth; seeds after the first train for these
alone. dictionary_learning's crosscoder is not in its release: SAMPLED_SAE_CROSSCODERS names a checkout of a branch.

    .venv/peers/bin/python -m benchmarks.equal_time --sae runs/quality/activations \\
        --out benchmarks/results/equal_time.json
    .venv/peers/bin/python -m benchmarks.equal_time --matryoshka runs/quality/beside/beside_1 \\
        --transcoder runs/quality/mlp --crosscoder runs/quality/beside --features 4096 --marks 30 --steps 100 \\
        --splice-rows 8 --out benchmarks/results/family_training.json
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from safetensors.torch import load_file

from benchmarks.measure import Row
from benchmarks.peers import Setup, installed
from benchmarks.record import Record, Result, markdown, parser
from benchmarks.steps.harness import reason_in
from benchmarks.training_kinds import KINDS, Task, TrainingSession, sae_of
from benchmarks.worker import Worker
from sampled_sae.lm import load_model
from sampled_sae.training.activations import Activations
from sampled_sae.training.feed import Feed
from sampled_sae.training.opening import as_activations
from sampled_sae.training.same_settings import identity, in_words
from sampled_sae.training.sweep import Splice, evaluate

SLICE = 5.0  # seconds of steps before the next candidate's turn
CALIBRATION_TOKENS = 16_384
WANTED = {
    "fvu": "fvu",
    "fvu_layers": "fvu_layers",
    "l0": "l0",
    "dead_share": "never_active",
    "fvu_groups": "fvu_groups",
    "loss_recovered_zero": "loss_recovered",
    "loss_recovered_zero_layers": "loss_recovered_layers",
}
SIZES = {"features": 16384, "k": 32, "batch_size": 1024, "lr": 3e-3, "warm_up": 10, "dead_after": 50_000, "steps": 0}


def trained(task: Task) -> list[Row]:
    """Of each candidate a row after the steps and one at each mark, with the file of its weights; or the reason."""
    entries = task.entries
    missing = [{"reason": "not installed"}]
    rows: dict[str, list[Row]] = {name: [] if installed(entry) else missing for name, entry in entries.items()}
    workers = {name: Worker(TrainingSession, task, name) for name in entries if not rows[name]}

    def each(act: Callable[[str], Iterable[Row]]) -> None:
        for name in list(workers):
            row: Row = {}
            with reason_in(row):
                rows[name] += act(name)
            if row:
                # what its marks say before it failed stays, where no row after the steps is to be beside them
                rows[name] = [*([] if task.steps else rows[name]), row]
                workers.pop(name).close()

    def until(seconds: float, name: str) -> list[Row]:
        workers[name].call("train", seconds)
        return [workers[name].call("save", f"{seconds:g} s")] if seconds in task.marks else []

    def ended(name: str) -> list[Row]:
        workers[name].call("finish")
        return [workers[name].call("after_steps")]

    done = 0.0
    while done < max(task.marks, default=0.0):
        done = min([done + SLICE, *(mark for mark in task.marks if mark > done)])
        each(partial(until, done))
        print(f"{task.kind}: {done:g} s of steps each", flush=True)
    if task.steps:
        each(ended)
    for worker in workers.values():
        worker.close()
    setup = task.setup
    size = {"B": setup.B, "d": setup.d, "F": setup.F, "k": setup.k, "layers": setup.layers}
    about = {"kind": task.kind, "seed": setup.seed, **size}
    return [{**about, "candidate": name, **row} for name, found in rows.items() for row in found]


def judged(row: Row, task: Task, store: Activations, splice: Splice | None) -> Row:
    """The row with its SAE's figures at mean L0 = k by a threshold, on held-out activations."""
    if "weights" not in row:
        return row
    sae = sae_of(task, load_file(task.folder / row["weights"]), store).eval()
    sae.calibrate(Feed(store, task.setup.B, seed=0).calibration()[:CALIBRATION_TOKENS], scaled=True)
    result = evaluate(sae, store.holdout()[0], task.setup.B, splice)
    found = {name: result[measure] for measure, name in WANTED.items() if measure in result}
    return {name: value for name, value in row.items() if name != "weights"} | found


def markdown_table(result: Result) -> str:
    """A table for each kind, a line a candidate: its step, and what equal time and equal steps buy.

    Under headings where there are several kinds.
    """
    kinds = dict.fromkeys(row["kind"] for row in result["rows"])
    return "\n".join(table_of(kind, result, has_heading=len(kinds) > 1) for kind in kinds)


def table_of(kind: str, result: Result, has_heading: bool) -> str:
    rows = [row for row in result["rows"] if row["kind"] == kind]
    setup, about = result["setup"], result["activations"][kind]
    seconds = [f"{mark:g} s" for mark in setup["marks"]]
    marks = seconds + [f"{setup['steps']} steps"] * (setup["steps"] > 0)
    figures = {"fvu": "FVU"}
    figures |= {"fvu_groups 0": "FVU of the first group"} if kind == "matryoshka" else {}
    figures |= {"loss_recovered": "loss recovered"}
    layers = str(about["layer"]).split(", ") if kind == "crosscoder" else []
    figures |= {f"loss_recovered_layers {i}": f"layer {layer} alone" for i, layer in enumerate(layers)}
    columns = {"candidate": "{candidate}"}
    if setup["steps"]:
        columns |= {"step / product": "{ratio:.2f}", "p20–p80": "{ratio_p20:.2f}–{ratio_p80:.2f}"}
    columns |= {f"steps in {mark}": f"{{steps {i}}}" for i, mark in [*enumerate(seconds)][-1:]}
    for name, title in figures.items():
        columns |= {f"{title}, {mark}": f"{{{name} {i}}}" for i, mark in enumerate(marks)}
    table = markdown(columns, lines(rows, marks))
    if not has_heading:
        return table
    size = "B={B}, d={d}, F={F}, k={k}".format(**rows[0])
    return f"**{kind.capitalize()}**: {in_words(about)}, {about['tokens']} tokens; {size}\n\n{table}"


def lines(rows: list[Row], marks: list[str]) -> list[Row]:
    """A row of the table for each candidate; of several seeds a figure is the mean, with the least and the greatest."""
    found: dict[str, Row] = {}
    figures: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        line = found.setdefault(row["candidate"], {"candidate": row["candidate"]})
        line |= {name: value for name, value in row.items() if name.startswith("ratio") or name == "reason"}
        at = marks.index(row["at"]) if "at" in row else 0
        for name in WANTED.values():
            values = row.get(name)
            for i, value in enumerate(values if isinstance(values, list) else [values]):
                key = f"{name} {i}" if isinstance(values, list) else name
                figures.setdefault((row["candidate"], f"{key} {at}"), []).extend([] if value is None else [value])
        line |= {f"steps {at}": row["steps"]} if "steps" in row else {}
    for (candidate, key), of_seeds in figures.items():
        spread = f" ({min(of_seeds):.3f}–{max(of_seeds):.3f})" if len(of_seeds) > 1 else ""
        found[candidate] |= {key: f"{statistics.fmean(of_seeds):.3f}{spread}"} if of_seeds else {}
    return [*found.values()]


def splices(name: str, stores: dict[str, Activations], rows: int) -> dict[str, Splice]:
    """Of each kind its evaluator in the model, on so many rows of held-out text.

    Raises:
        ValueError: a store without any, said before a model is loaded.
    """
    held_out = {kind: store.holdout_rows()[:rows] for kind, store in stores.items()}
    model = load_model(name)[0]
    return {
        kind: KINDS[kind].splice.of_harvest(model, held_out[kind], store.manifest).evaluate
        for kind, store in stores.items()
    }


def main() -> None:
    command = parser(__doc__, "--out", "--device", model="smollm2-135m", splice_rows=16, **SIZES)
    command.set_defaults(device="cpu")
    command.add_argument("--marks", type=float, nargs="+", default=[15, 30, 60, 90], help="seconds of training steps")
    command.add_argument("--seeds", type=int, nargs="+", default=[0], help="the first is timed; 0 by default")
    command.add_argument("--candidates", nargs="+", help="these alone")
    for kind in KINDS:
        command.add_argument(f"--{kind}", type=Path, help="folder that `sampled-sae harvest` wrote; left out without")
    args = command.parse_args()
    folders = {kind: getattr(args, kind) for kind in KINDS if getattr(args, kind) is not None}
    stores = {kind: as_activations(folder) for kind, folder in folders.items()}
    # made first: what is missing is better known before half an hour of training
    judges = {} if args.model == "none" else splices(args.model, stores, args.splice_rows)
    about = {
        kind: {**identity(store.manifest), "tokens": sum(store.tokens), "held_out": len(store.holdout()[0])}
        for kind, store in stores.items()
    }
    how = {name: getattr(args, name) for name in (*SIZES, "splice_rows")} | {"marks": sorted(args.marks)}
    record = Record(args, markdown_table, setup=how, activations=about)
    options = {name: getattr(args, name) for name in ("lr", "warm_up", "dead_after", "device")}
    options["dtype"] = "float32" if args.device == "cpu" else "bfloat16"
    for seed in args.seeds:
        marks = tuple(how["marks"]) if seed == args.seeds[0] else ()
        for kind, store in stores.items():
            size = (args.batch_size, store.d_in, args.features, args.k)
            setup = Setup(*size, **options, layers=store.layers, seed=seed)
            with tempfile.TemporaryDirectory() as folder:
                how_to = (args.steps, marks, Path(folder), args.threads, args.candidates)
                task = Task(kind, folders[kind], setup, *how_to)
                for row in trained(task):
                    record.add(judged(row, task, store, judges.get(kind)))


if __name__ == "__main__":
    main()
