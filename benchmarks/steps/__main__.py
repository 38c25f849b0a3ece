"""Times whole training steps, each candidate in a process of its own, as multiples of the encoder product.

    python -m benchmarks.steps NAME [--out FILE] [--rounds N] [--rehearse] [--device cuda]

One step: forward, backward, clip, decoder projection, Adam on every parameter, renormalisation. Rounds go over all
candidates of a size in turn, and only one computes at a time. Each sample of a step stands beside one of the product
x @ W_enc, into memory that exists, in the same process; ratios are medians of per-round ratios. All start from the
same weights and see the same batches. A candidate whose reconstruction error on the first batch is not that of the
reference implementation gets no figure but the reason, and so does one that is not installed. Memory is the peak of a
step above what the process holds between steps (gradients count), in units of one float32 [B, F].
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from benchmarks.measure import PEERS, RESULTS, ROOT, machine, write_result
from benchmarks.steps.experiments import EXPERIMENTS, Tasks, at_all_sizes, before_and_after, table
from benchmarks.steps.harness import Harness

CLOCK = "sampled_sae/support/timing.py"


def main() -> None:
    names = "".join(f"\n  {name:18}{experiment.about}" for name, experiment in EXPERIMENTS.items())
    command = argparse.ArgumentParser(
        description=f"{__doc__}\nexperiments:{names}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    command.add_argument("name", choices=list(EXPERIMENTS))
    command.add_argument("--out", type=Path, help="JSON file, a table goes beside it; benchmarks/results/NAME.json")
    command.add_argument("--rounds", type=int, default=7, help="samples of each candidate")
    command.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: bfloat16 autocast")
    command.add_argument("--threads", type=int, default=2)
    command.add_argument("--memory", type=float, default=18.0, help="GiB that the processes may take together")
    command.add_argument("--candidates", nargs="+", help="these alone")
    command.add_argument("--workloads", nargs="+", help="these sizes alone, by name or axis")
    command.add_argument("--revision", help="for before_after: the older one, as git names it")
    command.add_argument("--rehearse", action="store_true", help="tiny sizes; without --out nothing is written")
    args = command.parse_args()
    if (args.name == "before_after") != (args.revision is not None):
        command.error("--revision belongs to before_after, and before_after needs it")
    torch.set_num_threads(args.threads)
    experiment = EXPERIMENTS[args.name]
    dtype = "float32" if args.device == "cpu" else "bfloat16"
    fixed = {"rounds": args.rounds, "memory": args.memory * 2**30, "threads": args.threads}
    harness = Harness(device=args.device, dtype=dtype, **fixed, **experiment.options)
    result = machine(args.device, PEERS)
    with tempfile.TemporaryDirectory() as folder:
        tasks = experiment.tasks
        if args.revision:
            tasks = at_all_sizes(before_and_after(exported(args.revision, Path(folder))))
            result |= {"before": described(args.revision), "after": described()}
        wanted = chosen(tasks(args.rehearse, args.device), args.candidates, args.workloads)
        rows = result["rows"] = []
        out = args.out or (None if args.rehearse else RESULTS / f"{args.name}.json")
        for row in harness.measure(wanted):
            rows.append(row)
            print(table(args.name, result).splitlines()[-1], flush=True)
            if out is not None:
                write_result(out, result, table(args.name, result))
    print(table(args.name, result))


def chosen(tasks: Tasks, candidates: list[str] | None, workloads: list[str] | None) -> Tasks:
    found = [t for t in tasks if candidates is None or t.name in candidates]
    found = [t for t in found if workloads is None or t.workload.name in workloads]
    if not found:
        names = dict.fromkeys(t.name for t in tasks), dict.fromkeys(t.workload.name for t in tasks)
        raise SystemExit(f"no such candidate or workload; there are {list(names[0])} and {list(names[1])}")
    return found


def exported(revision: str, folder: Path) -> Path:
    """The package of another revision, with the clock of this one."""
    archive = ["git", "archive", revision, "sampled_sae", "kernels"]
    files = subprocess.run(archive, cwd=ROOT, check=True, capture_output=True).stdout
    subprocess.run(["tar", "-x", "-C", str(folder)], input=files, check=True)
    (folder / CLOCK).parent.mkdir(exist_ok=True)
    shutil.copy(ROOT / CLOCK, folder / CLOCK)
    return folder


def described(revision: str | None = None) -> str:
    """A revision's hash; that of the working tree says whether it has changes."""
    command = ["git", "rev-parse", "--short", revision] if revision else ["git", "describe", "--always", "--dirty"]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    main()
