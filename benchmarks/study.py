"""What l, the score, the pool and the inference are worth: every run a row, every row with the command that makes it.

    .venv/peers/bin/python -m benchmarks.study synthetic           the runs on known features; goes on where it stopped
    .venv/peers/bin/python -m benchmarks.study synthetic --world 16k --device cuda    SynthSAEBench-16k, for a GPU
    .venv/peers/bin/python -m benchmarks.study synthetic --only top-l2-l4 --seeds 1 --again    one row once more
    python -m benchmarks.study real ACTIVATIONS --name smollm2_15 --model smollm2-135m --texts FOLDER
    python -m benchmarks.study pairs --name smollm2_15             agreement between the seeds that are kept
    python -m benchmarks.study spelling --model smollm2-135m       whether the model knows the first letters of words
    python -m benchmarks.study report                              tables and plots of the rows that are there

Rows are written to benchmarks/results/study/ as soon as a run is done, tables (.md) and plots beside them;
docs/which-l.md shows them. `--list` prints the command of every row instead of running it. With other `--tokens` or
another `--lr` than a world's own, synthetic rows go to a file of their own.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.ground_truth.synthetic import WORLDS
from benchmarks.measure import ROOT, machine
from benchmarks.study_parts.rows import FOLDER, Row, Rows
from benchmarks.study_parts.variants import DENSE, PARTS, SYNTHETIC, Variant
from sampled_sae.support.output_folder import locked

KEPT = ROOT / "runs" / "study"
# of a row: enough to know whether another machine made it
MADE_ON = ("device", "threads", "torch", "sae-lens", "date")


def synthetic(args: argparse.Namespace) -> None:
    world = WORLDS[args.world]
    tokens, lr = args.tokens or world.tokens, args.lr or world.lr
    # means of one table are over runs of one kind
    kind = "" if (tokens, lr) == (world.tokens, world.lr) else f"_{tokens}_{lr:g}"
    options = f"--world {args.world} --tokens {tokens} --lr {lr:g} --device {args.device}"

    def open_study() -> Any:
        # sae-lens is in the environment of the peers alone
        from benchmarks.study_parts.synthetic import SyntheticStudy

        return SyntheticStudy(args.world, args.folder, tokens, lr, args.device)

    command = f".venv/peers/bin/python -m benchmarks.study synthetic {options}"
    make_rows(args, Rows(args.out / f"synthetic_{args.world}{kind}.csv"), SYNTHETIC, tokens, command, open_study)


def real(args: argparse.Namespace) -> None:
    options = f"--name {args.name} --features {args.features} --k {args.k:g} --tokens {args.tokens} --lr {args.lr:g}"
    options += f" --model {args.model}" if args.model else ""
    options += f" --texts {args.texts}" if args.texts else ""
    part = "" if args.part == "rules" else f"_{args.part}"

    def open_study() -> Any:
        from benchmarks.study_parts.real import RealStudy, Setup
        from sampled_sae.training.activation_store import ActivationStore

        folder = args.folder / f"real_{args.name}"
        setup = Setup(args.features, args.k, args.tokens, args.lr, args.model, args.texts, folder)
        return RealStudy(ActivationStore.open(args.activations), setup, args.stage)

    command = f"python -m benchmarks.study real {args.activations} {options} --part {args.part}"
    rows = Rows(args.out / f"real_{args.name}{part}.csv")
    make_rows(args, rows, PARTS[args.part], args.tokens, command, open_study)


def pairs(args: argparse.Namespace) -> None:
    from benchmarks.study_parts.pairs import pairs_of

    rows = Rows(args.out / f"real_{args.name}_pairs.csv")
    for variants in PARTS.values():
        for name in variants:
            for row in pairs_of(args.folder / f"real_{args.name}" / "saes", name, args.tokens, args.seeds):
                command = f"python -m benchmarks.study pairs --name {args.name} --tokens {args.tokens}"
                rows.put({**row, "command": command})
                print(
                    f"{row['name']} {row['seed']}: cosine {row['cosine']:.3f}, shared {row['shared']:.3f}", flush=True
                )


def spelling(args: argparse.Namespace) -> None:
    from benchmarks.study_parts.spelling import frequent_words
    from benchmarks.study_parts.spelling import spelling as measure
    from sampled_sae.lm import load_model, load_texts

    torch.set_num_threads(args.threads)
    rows, words = Rows(args.out / "spelling.csv"), frequent_words(load_texts("wiki-en"))
    model, tokenizer = load_model(args.model)
    for seed in args.seeds:
        row = {"name": args.model, **measure(model, tokenizer, words, seed, args.words)}
        command = f"python -m benchmarks.study spelling --model {args.model} --words {args.words} --seeds {seed}"
        rows.put({**row, **this_machine(args.device), "command": command})
        print(f"{args.model} seed {seed}: {row['right']:.3f} right, {row['by_chance']:.3f} by chance", flush=True)


def make_rows(
    args: argparse.Namespace,
    rows: Rows,
    variants: dict[str, Variant],
    tokens: int,
    command: str,
    open_study: Callable[[], Any],
) -> None:
    """All seeds of the first variant, then those of the next: what is done has its spread."""
    if unknown := sorted(set(args.only or ()) - set(variants)):
        raise SystemExit(f"--only {' '.join(unknown)}: must be of {', '.join(variants)}")
    # activations themselves have no seed
    runs = [(name, seed) for name in args.only or variants for seed in args.seeds[: 1 if name == DENSE else None]]
    commands = {(name, seed): f"{command} --only {name} --seeds {seed} --again" for name, seed in runs}
    if args.list:
        print("\n".join(commands.values()))
        return
    wanted = [run for run in runs if args.again or rows.find(name=run[0], seed=run[1], tokens=tokens) is None]
    print(f"{len(runs) - len(wanted)} of {len(runs)} rows are in {rows.path}", flush=True)
    if not wanted:
        return
    torch.set_num_threads(args.threads)
    end = time.perf_counter() + args.within
    # one process may train while another measures, and each file of rows has one that writes it
    with locked(args.folder / rows.path.stem / (args.stage or "measure"), "benchmarks.study"):
        study = open_study()
        on = this_machine(args.device)
        for name, seed in wanted:
            if time.perf_counter() > end:
                print(f"{args.within:g} s are over; the same command goes on from here")
                return
            before = rows.find(name=name, seed=seed, tokens=tokens)
            if before is not None:
                print(f"before: {shown(before)}")
            made = study.run(variants[name], seed)
            if made is not None:
                row = {**made, **on, "command": commands[name, seed]}
                rows.put(row)
                print(f"{shown(row)}\n  {row['command']}", flush=True)


def this_machine(device: str) -> Row:
    return {name: value for name, value in machine(device, ("sae-lens",)).items() if name in MADE_ON}


def shown(row: Row) -> str:
    """A row in one line."""
    measures = [name for name in row if name.endswith(("mcc", "_f1", "_r2", "fvu")) and row[name] is not None]
    return f"{row['name']} seed {row['seed']}: " + ", ".join(f"{name} {row[name]:.3f}" for name in measures)


def report(args: argparse.Namespace) -> None:
    from benchmarks.study_parts.report import write_report

    for path in write_report(args.out):
        print(path)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(required=True, metavar="PART")
    p = parts.add_parser("synthetic", help="runs on activations with known features")
    p.add_argument("--world", choices=tuple(WORLDS), default="scaled")
    p.add_argument("--tokens", type=int, default=None, help="of a training; those of the world when absent")
    p.add_argument("--lr", type=float, default=None, help="peak learning rate; that of the world when absent")
    p.add_argument("--device", default="cpu", help="cpu or cuda")
    _row_options(p)
    p.set_defaults(run=synthetic, stage=None)
    p = parts.add_parser("real", help="runs on a store of activations with a held-out part")
    p.add_argument("activations", type=Path, help="folder that `sampled-sae harvest` wrote")
    p.add_argument("--name", required=True, help="of the rows' file")
    p.add_argument(
        "--part", choices=tuple(PARTS), default="rules", help="what differs: rules, batch sizes, dead features, time"
    )
    p.add_argument("--model", default=None, help="for loss recovered and probes; neither when absent")
    p.add_argument(
        "--texts", type=Path, default=None, help="folder of the labelled texts' packages; no probes when absent"
    )
    p.add_argument("--features", type=int, default=2048)
    p.add_argument("--k", type=float, default=16)
    p.add_argument("--tokens", type=int, default=307_200, help="of a training")
    p.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    stages = "train and keep what is not kept yet; or measure what is kept, with --again anew; both when absent"
    p.add_argument("--stage", choices=("train", "measure"), default=None, help=stages)
    _row_options(p)
    p.set_defaults(run=real, device="cpu")
    p = parts.add_parser("pairs", help="agreement of the dictionaries that runs of `real` have kept, seed by seed")
    p.add_argument("--name", required=True, help="of the rows' file")
    p.add_argument("--tokens", type=int, default=307_200, help="of a training")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    p.add_argument("--folder", type=Path, default=KEPT, help="where runs are kept")
    p.set_defaults(run=pairs)
    p = parts.add_parser("spelling", help="whether a language model names the first letter of a word")
    p.add_argument("--model", required=True, help="as for `sampled-sae harvest`")
    p.add_argument("--words", type=int, default=200, help="that it is asked")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the words and the examples")
    p.add_argument("--threads", type=int, default=2)
    p.set_defaults(run=spelling, device="cpu")
    p = parts.add_parser("report", help="tables and plots of the rows that are there")
    p.set_defaults(run=report)
    for p in parts.choices.values():
        p.add_argument("--out", type=Path, default=FOLDER, help="folder of the rows")
    args = parser.parse_args(arguments)
    args.run(args)


def _row_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("--only", nargs="+", metavar="NAME", help="of the SAEs, by name; --list shows all")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of weights and order, 0 1 2 by default")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--within", type=float, default=float("inf"), help="seconds after which no run is begun")
    p.add_argument("--again", action="store_true", help="run what has a row already, and replace it")
    p.add_argument("--list", action="store_true", help="print the command of every row")
    p.add_argument("--folder", type=Path, default=KEPT, help="where runs and activations are kept")


if __name__ == "__main__":
    main()
