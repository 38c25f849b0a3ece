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

import os
import shutil
import subprocess
import tempfile
from argparse import Namespace
from functools import partial
from pathlib import Path

from benchmarks.gpu_parts.compiling import compile_all, small
from benchmarks.measure import RESULTS, ROOT
from benchmarks.record import Record, parser
from benchmarks.steps.experiments import EXPERIMENTS, Tasks, at_all_sizes, before_and_after, first_step, on_a_gpu, table
from benchmarks.steps.harness import Harness
from benchmarks.steps.loop_session import LoopSession
from benchmarks.worker import Here
from benchmarks.workloads import GPU_STEPS, REHEARSAL

CLOCK = "sampled_sae/support/timing.py"
# with --here: seconds for the rounds of a candidate; what has to be left to begin one, and one that is compiled first
SECONDS, LEAST, LEAST_TO_COMPILE = 2.0, 3.0, 15.0


def main() -> None:
    names = "".join(f"\n  {name:18}{experiment.about}" for name, experiment in EXPERIMENTS.items())
    about = f"{__doc__}\nexperiments, each to benchmarks/results/NAME.json unless rehearsed:{names}"
    command = parser(about, "--device", "--rehearse", "--within", rounds=7, warm_up=2, steps=300)
    command.set_defaults(device="cpu")
    command.add_argument("--out", type=Path, help="JSON file to write; a table goes beside it")
    command.add_argument("name", choices=list(EXPERIMENTS))
    command.add_argument("--candidates", nargs="+", help="these alone")
    command.add_argument("--workloads", nargs="+", help="these sizes alone, by name or axis")
    command.add_argument("--revision", help="for before_after: the older one, as git names it")
    command.add_argument("--activations", type=Path, help="for drop_in: folder that `sampled-sae harvest` wrote")
    command.add_argument("--here", action="store_true", help="one candidate after the other in this process")
    args = command.parse_args()
    if (args.name == "before_after") != (args.revision is not None):
        command.error("--revision belongs to before_after, and before_after needs it")
    os.environ["TQDM_DISABLE"] = "1"  # for the workers: the loops' progress bars
    experiment = EXPERIMENTS[args.name]
    if args.out is None and not args.rehearse:
        args.out = RESULTS / f"{args.name}.json"
    low = args.device == "cuda" or args.name == "gpu_steps"
    how = {"device": args.device, "dtype": "bfloat16" if low else "float32", "threads": args.threads}
    how |= {"start": Here, "memory": 0, "seconds": SECONDS} if args.here else {}
    how |= {"rounds": args.rounds, "warm_up": 0 if args.rehearse and args.here else args.warm_up}
    options = dict(experiment.options)
    if args.activations is not None:
        options["session"] = partial(LoopSession, folder=args.activations, steps=args.steps)
    harness = Harness(**how, **options)
    with tempfile.TemporaryDirectory() as folder:
        tasks, head = experiment.tasks, {}
        if args.revision:
            tasks = at_all_sizes(before_and_after(exported(args.revision, Path(folder))))
            head = {"before": described(args.revision), "after": described()}
        record = Record(args, partial(table, args.name), **head)
        if args.name == "gpu_steps":
            sizes = small(record, REHEARSAL if args.rehearse else GPU_STEPS)
            ours = [name for name, entry in on_a_gpu(graph=False).items() if entry.module == "ours"]
            compile_all(record, {f"{n}, {w.name}": partial(first_step, n, w, harness) for w in sizes for n in ours})
        for group in harness.groups(chosen(tasks(args.rehearse, args.device), args)):
            least = 0.0 if not args.here else LEAST_TO_COMPILE if group[0].compiled else LEAST
            record.attempt([task.row for task in group], partial(harness.measure_group, group), least)
            # after a capture that failed, torch gives no memory back and captures nothing more
            if group[0].entry.graph and "reason" in record.rows[-1] and not args.rehearse:
                break


def chosen(tasks: Tasks, args: Namespace) -> Tasks:
    """Those that were asked for; graphs last, and before them what is compiled, which nothing ends in time."""
    found = [t for t in tasks if args.candidates is None or t.name in args.candidates]
    found = [t for t in found if args.workloads is None or t.workload.name in args.workloads]
    if not found:
        names = dict.fromkeys(t.name for t in tasks), dict.fromkeys(t.workload.name for t in tasks)
        raise SystemExit(f"no such candidate or workload; there are {list(names[0])} and {list(names[1])}")
    found = [t for t in found if not (args.rehearse and t.compiled)]
    return sorted(found, key=lambda t: (t.entry.graph, t.compiled)) if args.here else found


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
