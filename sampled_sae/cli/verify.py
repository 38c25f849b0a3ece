"""`sampled-sae verify`."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..training.verification import verify
from .arguments import Command


def add(command: Command) -> None:
    p = command("verify", run_verify, "Read every file of activations, an SAE, a training or a sweep for damage.")
    p.add_argument("folder", type=Path, help="folder that harvest, train, sweep or a function of this package wrote")


def run_verify(args: argparse.Namespace) -> int:
    damaged = 0
    for path, said, is_damaged in verify(args.folder):
        print(f"{path}: {said}", flush=True)
        damaged += is_damaged
    return 1 if damaged else 0
