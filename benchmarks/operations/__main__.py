"""Every operation of a training step against its rivals, kernels alone on a GPU's clock.

    python -m benchmarks.operations                    on a CPU, to benchmarks/results/kernels.json
    python -m benchmarks.operations --set gpu --out FILE.json --only "score l2" "row-Adam dense"

Sets: `small` and `large` for a CPU, `gpu`; `ceilings`: copy bandwidth, and the encoder product at the widths of real
models; `score`: the score kernel with its epilogue and without, which decides up to which d scores are fused into the
product (LARGEST_FUSED_D of kernels/configs.py).
"""

from __future__ import annotations

from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.gpu_parts.compiling import REHEARSED, compile_all, small
from benchmarks.measure import RESULTS, Row
from benchmarks.operations import OPERATIONS, PRODUCT, SCORE_FORMS, Operations, first_call
from benchmarks.operations.operation import Inputs
from benchmarks.operations.race import COLUMNS, race
from benchmarks.record import Record, parser, table_of
from benchmarks.workloads import CPU_KERNELS, GPU_KERNELS, LARGE_KERNELS, REHEARSAL, WIDTHS, Workload

Case = tuple[Workload, torch.dtype]
# what has to be left to begin an operation, and one that torch.compile has to compile first
LEAST_SECONDS, LEAST_TO_COMPILE = 2.0, 12.0


class Set(NamedTuple):
    """Operations at sizes, in their dtypes: the kernels' own first, in case the time runs out."""

    operations: Operations
    workloads: tuple[Workload, ...]
    dtypes: tuple[str, ...] = ("bfloat16",)


SETS = {
    "small": Set(OPERATIONS, CPU_KERNELS, ("float32",)),
    "large": Set(OPERATIONS, LARGE_KERNELS, ("float32",)),
    "gpu": Set(OPERATIONS, GPU_KERNELS),
    "ceilings": Set(PRODUCT, WIDTHS, ("bfloat16", "float32")),
    "score": Set(SCORE_FORMS, WIDTHS, ("bfloat16", "float32")),
}


def main() -> None:
    command = parser(__doc__, "--device", "--rehearse", "--within", rounds=7, seconds=25.0, set="small", impl="auto")
    command.add_argument("--out", type=Path, help="JSON file to write; a table goes beside it")
    command.add_argument("--only", nargs="+", help="these operations")
    args = command.parse_args()
    if args.out is None and args.set == "small" and not args.rehearse:
        args.out = RESULTS / "kernels.json"
    races = SETS[args.set]
    names = [name for name in races.operations if args.only is None or name in args.only]
    workloads = REHEARSAL if args.rehearse else races.workloads
    cases = [(w, getattr(torch, dtype)) for dtype in races.dtypes for w in workloads]
    record = Record(args, table_of(COLUMNS))
    kernels = args.device == "cuda" or args.impl == "triton"
    if kernels and args.set != "ceilings":
        few = [(w, getattr(torch, dtype)) for dtype in races.dtypes for w in small(record, workloads)]
        jobs = {f"{n}, {w.name}, {t}": partial(first_call, n, w, t, args.device) for w, t in few for n in names}
        compile_all(record, jobs)
    backend = "eager" if args.rehearse else "inductor"
    passes: list[tuple[Case, list[str], str | None]] = [(case, names, None if kernels else backend) for case in cases]
    if kernels and races.operations is OPERATIONS:
        # last of all, at one size: nothing ends a compilation that takes too long
        passes.append((cases[0], names[: REHEARSED if args.rehearse else None], backend))
    for i, (case, some, compiler) in enumerate(passes):
        race_all(record, args, case, some, compiler, (len(passes) - i) * len(names))


def race_all(record: Record, args: Namespace, case: Case, names: list[str], compiler: str | None, of: int) -> None:
    """Rows of these operations, which are the first of so many."""
    w, dtype = case
    inputs = Inputs(w, args.device, dtype, args.impl)

    def raced(name: str, seconds: float) -> list[Row]:
        operation = SETS[args.set].operations[name](inputs)
        return [race(name, inputs, operation, args.rounds, seconds, compiler, args.rehearse)]

    for i, name in enumerate(names):
        row = {**w.columns(), "dtype": str(dtype).removeprefix("torch."), "operation": name}
        seconds = min(args.seconds, record.left / (of - i))
        record.attempt([row], partial(raced, name, seconds), LEAST_TO_COMPILE if compiler else LEAST_SECONDS)


if __name__ == "__main__":
    main()
