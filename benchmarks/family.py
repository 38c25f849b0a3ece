"""Matryoshka SAEs, skip transcoders, crosscoders on real activations: ours and the peers', at equal steps and time.

Of each kind all candidates train in processes of their own, in slices of a few seconds that go round, on the same
activations in the same order, with Adam at one learning rate after a short warm-up (sparsify also with its own
optimizer). Matryoshka SAEs start from the same weights; the others as each library begins them. The encoder product is
timed beside every fifth step. After --steps steps, and after --marks seconds inside the steps, the weights go into one
SampledSAE, are calibrated to L0 = k by a threshold, and are evaluated on held-out text and in the model: a crosscoder
with all of its layers spliced at once, and with each alone. Further --seeds train for --steps steps.
dictionary_learning's crosscoder is not in its release: SAMPLED_SAE_CROSSCODERS names a checkout of a branch.

    sampled-sae harvest runs/quality/mlp --layer 15 --mlp --texts wiki-en --tokens 150000
    sampled-sae harvest runs/quality/beside --layer 7 --beside 15 23 --texts wiki-en --tokens 150000
    .venv/peers/bin/python benchmarks/family.py --matryoshka runs/quality/beside/beside_1 \
        --transcoder runs/quality/mlp --crosscoder runs/quality/beside --out benchmarks/results/family_training.json

With --timed it ends where nothing is timed any more: what is left to train and to evaluate a call without it does, on
a machine that may be busy. What the result file has already is not done again; it takes no other settings, and of a
kind no other activations.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import zlib
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from safetensors.torch import load_file
from torch import Tensor

from benchmarks.measure import Row
from benchmarks.peers import Setup, installed
from benchmarks.record import Record, Result, markdown, parser
from benchmarks.steps.harness import reason_in
from benchmarks.training_kinds import KINDS, Task, TrainingSession
from benchmarks.worker import Worker
from sampled_sae import SampledSAE
from sampled_sae.lm import load_model
from sampled_sae.training.activations import Activations
from sampled_sae.training.feed import Feed
from sampled_sae.training.opening import as_activations
from sampled_sae.training.same_settings import identity, in_words
from sampled_sae.training.sweep import Splice, evaluate

FAMILY = ("matryoshka", "crosscoder", "transcoder")
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
SETTINGS = ("features", "k", "batch_size", "lr", "warm_up", "dead_after", "steps", "marks", "splice_rows")


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


def judged(row: Row, sae: SampledSAE, calibration: Tensor, held_out: Tensor, splice: Splice | None) -> Row:
    """The row with its SAE's figures at mean L0 = k by a threshold, on held-out activations."""
    sae.eval().calibrate(calibration, scaled=True)
    result = evaluate(sae, held_out, row["B"], splice)
    found = {name: result[measure] for measure, name in WANTED.items() if measure in result}
    return {name: value for name, value in row.items() if name != "weights"} | found


def described(store: Activations) -> dict[str, Any]:
    """What activations are of, how many, and a checksum of theirs.

    Raises:
        ValueError: nothing is held out.
    """
    held_out = store.holdout()[0]
    sums = json.dumps([store.manifest["shards"], store.manifest["holdout"]], sort_keys=True)
    about = {"tokens": sum(store.tokens), "held_out": len(held_out), "crc32": f"{zlib.crc32(sums.encode()):08x}"}
    return {**identity(store.manifest), **about}


def check_same(out: Path, before: Result, setup: dict[str, Any], activations: dict[str, dict[str, Any]]) -> None:
    """ValueError where the result file was made otherwise, or activations are not of one model."""
    then = before.get("setup", setup)
    changes = [f"{name} was {then.get(name)}, is {value}" for name, value in setup.items() if then.get(name) != value]
    if changes:
        raise ValueError(f"{out}: was made with other settings ({'; '.join(changes)}); give another --out")
    known = {**activations, **before.get("activations", {})}
    for kind, about in activations.items():
        if known[kind] != about:
            was, is_ = (f"{in_words(of)}, {of['tokens']} tokens, checksum {of['crc32']}" for of in (known[kind], about))
            raise ValueError(f"--{kind}: {out} has results of {was}, these are {is_}; give another --out")
    if len({about["weights_sha256"] for about in known.values()}) > 1:
        models = ", ".join(f"{in_words(about)} for --{kind}" for kind, about in known.items())
        raise ValueError(f"{out}: would have activations of several models: {models}")


def markdown_table(result: Result) -> str:
    """A table for each kind, a line a candidate: its step, and what equal time and equal steps buy."""
    return "\n".join(filter(None, (table_of(kind, result) for kind in FAMILY)))


def table_of(kind: str, result: Result) -> str:
    """The table of one kind under its heading; empty where there are no rows of it."""
    of_kind = [row for row in result["rows"] if row["kind"] == kind]
    if not of_kind:
        return ""
    about, first = result["activations"][kind], of_kind[0]
    marks = [f"{mark:g} s" for mark in result["setup"]["marks"]] + [f"{result['setup']['steps']} steps"]
    figures = {"fvu": "FVU"}
    figures |= {"fvu_groups 0": "FVU of the first group"} if kind == "matryoshka" else {}
    figures |= {"loss_recovered": "loss recovered"}
    layers = str(about["layer"]).split(", ") if kind == "crosscoder" else []
    figures |= {f"loss_recovered_layers {i}": f"layer {layer} alone" for i, layer in enumerate(layers)}
    columns = {"candidate": "{candidate}", "step / product": "{ratio:.2f}"}
    columns |= {"p20–p80": "{ratio_p20:.2f}–{ratio_p80:.2f}"}
    for i, mark in enumerate(marks):
        columns |= {} if mark.endswith("steps") else {f"steps in {mark}": f"{{steps {i}}}"}
        columns |= {f"{title}, {mark}": f"{{{name} {i}}}" for name, title in figures.items()}
    size = f"B={first['B']}, d={first['d']}, F={first['F']}, k={first['k']}"
    heading = f"**{kind.capitalize()}**: {in_words(about)}, {about['tokens']} tokens; {size}"
    return f"{heading}\n\n{markdown(columns, lines(of_kind, marks))}"


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


def main() -> None:
    small = {"features": 4096, "k": 32, "batch_size": 1024, "lr": 3e-3, "warm_up": 10, "dead_after": 50_000}
    command = parser(__doc__, "--out", model="smollm2-135m", steps=100, splice_rows=8, **small)
    command.add_argument("--marks", type=float, nargs="+", default=[30.0], help="seconds of training steps")
    command.add_argument("--seeds", type=int, nargs="+", default=[0], help="the first is timed; 0 by default")
    command.add_argument("--timed", action="store_true", help="only what is timed")
    command.add_argument("--weights", type=Path, default=Path("runs/family"), help="folder for what is not judged yet")
    for kind in FAMILY:
        command.add_argument(f"--{kind}", type=Path, help="folder that `sampled-sae harvest` wrote; left out without")
    args = command.parse_args()
    given = {kind: getattr(args, kind) for kind in FAMILY if getattr(args, kind) is not None}
    stores = {kind: as_activations(folder) for kind, folder in given.items()}
    about = {kind: described(store) for kind, store in stores.items()}
    how = {name: getattr(args, name) for name in SETTINGS} | {"marks": sorted(args.marks)}
    before: Result = json.loads(args.out.read_text()) if args.out.is_file() else {}
    try:
        check_same(args.out, before, how, about)
    except ValueError as error:
        command.error(str(error))
    record = Record(args, markdown_table, setup=how, activations={**before.get("activations", {}), **about})
    record.rows += before.get("rows", [])
    args.weights.mkdir(parents=True, exist_ok=True)
    run(args, record, given, stores)


def run(args: argparse.Namespace, record: Record, given: dict[str, Path], stores: dict[str, Activations]) -> None:
    """Trains what is timed, then what is not, then evaluates what has weights."""
    options = {"lr": args.lr, "warm_up": args.warm_up, "dead_after": args.dead_after}
    splices: dict[str, Splice] = {}
    setups = {
        kind: Setup(args.batch_size, store.d_in, args.features, args.k, **options, layers=store.layers)
        for kind, store in stores.items()
    }
    if args.model != "none" and not args.timed:
        # made first: what is missing is better known before minutes of training
        model = load_model(args.model)[0]
        for kind, store in stores.items():
            rows = store.holdout_rows()[: args.splice_rows]
            splices[kind] = KINDS[kind].splice.of_harvest(model, rows, store.manifest).evaluate
    for seed in args.seeds[:1] if args.timed else args.seeds:
        marks = tuple(sorted(args.marks)) if seed == args.seeds[0] else ()
        for kind, folder in given.items():
            if not any((row["kind"], row["seed"]) == (kind, seed) for row in record.rows):
                setup = replace(setups[kind], seed=seed)
                record.add(*trained(Task(kind, folder, setup, args.steps, marks, args.weights, args.threads)))
    if not args.timed:
        for kind, store in stores.items():
            judge(kind, args.weights, record, setups[kind], store, splices.get(kind))


def judge(kind: str, weights: Path, record: Record, setup: Setup, store: Activations, splice: Splice | None) -> None:
    """Evaluates what has weights, which are removed."""
    calibration = Feed(store, setup.B, seed=0).calibration()[:CALIBRATION_TOKENS]
    held_out = store.holdout()[0]
    for i, row in enumerate(record.rows):
        if row["kind"] == kind and "weights" in row:
            file = weights / row["weights"]
            sae = KINDS[kind].sae(load_file(file), setup, store)
            record.rows[i] = judged(row, sae, calibration, held_out, splice)
            record.add()
            print(f"{kind}, {row['candidate']}, {row['at']}: evaluated", flush=True)
            file.unlink()


if __name__ == "__main__":
    main()
