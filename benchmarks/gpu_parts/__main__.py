"""One part in this process, for benchmarks/gpu.py: `python -m benchmarks.gpu_parts PART OUTDIR SECONDS`."""

from __future__ import annotations

import argparse
import importlib
import os
from pathlib import Path

MODULES = {"ceilings": "operations", "score": "operations", "kernels": "operations", "peers": "steps"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part")
    parser.add_argument("out", type=Path)
    parser.add_argument("seconds", type=float)
    parser.add_argument("--rehearse", action="store_true")
    args = parser.parse_args()
    if args.rehearse:
        # Triton reads it when it is imported
        os.environ["TRITON_INTERPRET"] = "1"
    from benchmarks.gpu_parts.visit import Visit

    part = importlib.import_module(f"benchmarks.gpu_parts.{MODULES.get(args.part, args.part)}")
    part.run(Visit(args.part, args.out, args.seconds, args.rehearse))


if __name__ == "__main__":
    main()
