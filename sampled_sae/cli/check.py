"""`sampled-sae check`."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

import torch

from .arguments import Command


def add(command: Command) -> None:
    p = command("check", check, "Hold every operation on this machine to the specification; 1 where one fails.")
    p.add_argument("--impl", choices=("triton", "torch"), default=None, help="both when absent")
    p.add_argument("--quick", action="store_true", help="fewer shapes and dtypes")


def check(args: argparse.Namespace) -> int:
    from ..check import HEADING, line, run_checks

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and args.impl != "torch" and os.environ.get("TRITON_INTERPRET") != "1":
        # Triton reads it when it is imported, which torch may have done already
        command = [sys.executable, "-m", "sampled_sae", "check"]
        command += [f"--{name}={value}" for name in ("impl", "threads") if (value := getattr(args, name)) is not None]
        command += [flag for flag in ("--quick", "--quiet", "--debug") if getattr(args, flag[2:])]
        return subprocess.call(command, env={**os.environ, "TRITON_INTERPRET": "1"})
    where = torch.cuda.get_device_name() if device == "cuda" else "CPU, Triton in its interpreter"
    print(f"{where}; torch {torch.__version__}. Errors are relative to float64.\n{HEADING}", flush=True)
    rows = []
    for impl in ("triton", "torch") if args.impl is None else (args.impl,):
        for row in run_checks(impl, device, args.quick):
            rows.append(row)
            if row.failure or not args.quiet:
                print(line(impl, row), flush=True)
    failed = sum(bool(row.failure) for row in rows)
    print(f"\n{len(rows) - failed} of {len(rows)} checks passed")
    return 1 if failed else 0
