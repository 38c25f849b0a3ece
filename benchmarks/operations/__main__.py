"""Every operation at the sizes of benchmarks/workloads.py, to a JSON file and a table beside it.

python -m benchmarks.operations
python -m benchmarks.operations --out FILE.json --sizes large --only "score l2" "row-Adam dense"
"""

from __future__ import annotations

import torch

from benchmarks.measure import RESULTS, Row, machine, parser, write_result
from benchmarks.operations import OPERATIONS
from benchmarks.operations.operation import Inputs
from benchmarks.operations.race import Race
from benchmarks.operations.table import table
from benchmarks.workloads import CPU_KERNELS, GPU_KERNELS, LARGE_KERNELS, REHEARSAL

SIZES = {"small": CPU_KERNELS, "large": LARGE_KERNELS, "gpu": GPU_KERNELS, "rehearsal": REHEARSAL}


def main() -> None:
    command = parser(__doc__, RESULTS / "kernels.json")
    command.add_argument("--sizes", choices=list(SIZES), default="small")
    command.add_argument("--only", choices=list(OPERATIONS), nargs="+", default=list(OPERATIONS), help="operations")
    command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    command.add_argument("--dtype", choices=("float32", "bfloat16"), default=None, help="bfloat16 on a GPU")
    command.add_argument("--rounds", type=int, default=7)
    command.add_argument("--seconds", type=float, default=25.0, help="for the rounds of one operation")
    args = command.parse_args()
    torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype or ("float32" if args.device == "cpu" else "bfloat16"))
    rows: list[Row] = []
    for workload in SIZES[args.sizes]:
        inputs = Inputs(workload, args.device, dtype)
        for name in args.only:
            race = Race(name, inputs, OPERATIONS[name](inputs), small=args.sizes == "rehearsal")
            race.run(args.rounds, args.seconds)
            found = race.rows()
            rows += found
            print("\n".join(table(found).splitlines()[2:]), flush=True)
            write_result(args.out, {**machine(args.device), "rows": rows}, table(rows))


if __name__ == "__main__":
    main()
