"""What l, the score, the pool and the inference are worth: every run a row, every row with the command that makes it.

    .venv/peers/bin/python -m benchmarks.study synthetic           the runs on known features; goes on where it stopped
    .venv/peers/bin/python -m benchmarks.study synthetic --world 16k --device cuda    SynthSAEBench-16k, for a GPU
    .venv/peers/bin/python -m benchmarks.study synthetic --only top-l2-l4 --seeds 1 --again    one row once more
    python -m benchmarks.study report                              tables and plots of the rows that are there

Rows are written to benchmarks/results/study/synthetic_WORLD.csv as soon as a run is done, tables (.md) and plots beside
them; docs/which-l.md shows them. `--list` prints the command of every row instead of running it. With other `--tokens`
or another `--lr` than a world's own the rows go to a file of their own.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.ground_truth.synthetic import WORLDS
from benchmarks.measure import ROOT, machine
from benchmarks.study_parts.rows import FOLDER, Row, Rows
from benchmarks.study_parts.variants import VARIANTS
from sampled_sae.support.output_folder import locked

# of a row: enough to know whether another machine made it
MADE_ON = ("device", "threads", "torch", "sae-lens", "date")


def rerun(world: str, name: str, seed: int, tokens: int, lr: float, device: str) -> str:
    """The command that makes a row again."""
    options = f"--world {world} --only {name} --seeds {seed} --tokens {tokens} --lr {lr:g} --device {device}"
    return f".venv/peers/bin/python -m benchmarks.study synthetic {options} --again"


def synthetic(args: argparse.Namespace) -> None:
    world = WORLDS[args.world]
    tokens = args.tokens or world.tokens
    lr = args.lr or world.lr
    # means of one table are over runs of one kind
    kind = "" if (tokens, lr) == (world.tokens, world.lr) else f"_{tokens}_{lr:g}"
    rows = Rows(args.out / f"synthetic_{args.world}{kind}.csv")
    runs = [(name, seed) for name in args.only or VARIANTS for seed in args.seeds]
    commands = {run: rerun(args.world, *run, tokens, lr, args.device) for run in runs}
    if args.list:
        print("\n".join(commands.values()))
        return
    wanted = [run for run in runs if args.again or rows.find(name=run[0], seed=run[1], tokens=tokens) is None]
    print(f"{len(runs) - len(wanted)} of {len(runs)} rows are in {rows.path}", flush=True)
    if not wanted:
        return
    torch.set_num_threads(args.threads)
    # sae-lens is in the environment of the peers alone
    from benchmarks.study_parts.synthetic import SyntheticStudy

    end = time.perf_counter() + args.within
    with locked(args.folder, "benchmarks.study"):
        study = SyntheticStudy(args.world, args.folder, tokens, lr, args.device)
        on = {name: value for name, value in machine(args.device, ("sae-lens",)).items() if name in MADE_ON}
        for name, seed in wanted:
            if time.perf_counter() > end:
                print(f"{args.within:g} s are over; the same command goes on from here")
                return
            before = rows.find(name=name, seed=seed, tokens=tokens)
            row = {**study.run(VARIANTS[name], seed), **on, "command": commands[name, seed]}
            if before is not None:
                print(f"before: {shown(before)}")
            rows.put(row)
            print(f"{shown(row)}\n  {row['command']}", flush=True)


def shown(row: Row) -> str:
    """A row in one line."""
    measures = [name for name in row if name.endswith(("mcc", "_f1", "_r2")) and row[name] is not None]
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
    p.add_argument("--only", nargs="+", choices=tuple(VARIANTS), metavar="NAME", help=f"of {', '.join(VARIANTS)}")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of weights and order, 0 1 2 by default")
    p.add_argument("--tokens", type=int, default=None, help="of a training; those of the world when absent")
    p.add_argument("--lr", type=float, default=None, help="peak learning rate; that of the world when absent")
    p.add_argument("--device", default="cpu", help="cpu or cuda")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--within", type=float, default=float("inf"), help="seconds after which no run is begun")
    p.add_argument("--again", action="store_true", help="run what has a row already, and replace it")
    p.add_argument("--list", action="store_true", help="print the command of every row")
    p.add_argument("--folder", type=Path, default=ROOT / "runs" / "study", help="for activations")
    p.set_defaults(run=synthetic)
    p = parts.add_parser("report", help="tables and plots of the rows that are there")
    p.set_defaults(run=report)
    for p in parts.choices.values():
        p.add_argument("--out", type=Path, default=FOLDER, help="folder of the rows")
    args = parser.parse_args(arguments)
    args.run(args)


if __name__ == "__main__":
    main()
