"""Every operation at the sizes of benchmarks/workloads.py, to a JSON file and a table beside it.

python -m benchmarks.kernels --out benchmarks/results/kernels.json
python -m benchmarks.kernels --out FILE.json --sizes large --only "score l2" "row-Adam dense"
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benchmarks.kernels import OPERATIONS
from benchmarks.kernels.operation import Inputs
from benchmarks.kernels.race import Race, Row
from benchmarks.kernels.table import markdown
from benchmarks.measure import machine, write_result
from benchmarks.workloads import CPU_KERNELS, GPU_KERNELS, LARGE_KERNELS

SIZES = {"small": CPU_KERNELS, "large": LARGE_KERNELS, "gpu": GPU_KERNELS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write; a table goes beside it")
    parser.add_argument("--sizes", choices=list(SIZES), default="small")
    parser.add_argument("--only", choices=list(OPERATIONS), nargs="+", default=list(OPERATIONS), help="operations")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default=None, help="bfloat16 on a GPU")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=25.0, help="for the rounds of one operation")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype or ("float32" if args.device == "cpu" else "bfloat16"))
    rows: list[Row] = []
    for workload in SIZES[args.sizes]:
        inputs = Inputs(workload, args.device, dtype)
        for name in args.only:
            race = Race(name, inputs, OPERATIONS[name](inputs))
            race.run(args.rounds, args.seconds)
            found = race.rows()
            rows += found
            print("\n".join(markdown(found).splitlines()[2:]), flush=True)
            write_result(args.out, {**machine(args.device), "rows": rows}, markdown(rows))


if __name__ == "__main__":
    main()
