"""Compiles every kernel in every blessed configuration, without a GPU, and writes what came out.

    python -m benchmarks.compiled                     all architectures, to benchmarks/results/compiled/<arch>.md
    python -m benchmarks.compiled --arch sm_90 --only radix --out FILE.json

Not in a process whose Triton is in interpreter mode: unset TRITON_INTERPRET.
"""

from __future__ import annotations

import argparse
import json
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import triton

from benchmarks.compiled.cases import CASES
from benchmarks.compiled.launch import SHARED
from benchmarks.compiled.table import TABLES, compiled, known, table


def main() -> None:
    parser = argparse.ArgumentParser(description="what the compiler makes of the kernels")
    parser.add_argument("--arch", choices=list(SHARED), help="one architecture; all by default")
    parser.add_argument("--only", choices=list(CASES), help="one file of kernels/, without .py")
    parser.add_argument("--known", action="store_true", help="with --arch: compile only what the table is not of")
    parser.add_argument("--out", type=Path, help="write JSON here, and no tables")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    args = parser.parse_args()
    if triton.knobs.runtime.interpret:
        sys.exit("TRITON_INTERPRET is set: the compiler cannot run in the interpreter's process; unset it")
    archs = [args.arch] if args.arch else list(SHARED)
    if args.arch:
        found = {args.arch: known(args.arch) if args.known else compiled(args.arch, args.only)}
    else:
        with ProcessPoolExecutor(args.jobs, get_context("spawn")) as pool:
            found = dict(zip(archs, pool.map(compiled, archs, [args.only] * len(archs))))
    if args.out:
        args.out.write_text(json.dumps({"triton": triton.__version__, "archs": found}, indent=1))
        return
    TABLES.mkdir(parents=True, exist_ok=True)
    for arch in archs:
        (TABLES / f"{arch}.md").write_text(table(arch, found[arch]))


if __name__ == "__main__":
    main()
