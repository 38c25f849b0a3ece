"""`sampled-sae`: harvest activations, train, evaluate, sweep, check, convert, measure."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import torch

from . import bench, check, convert, harvest, training


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit status: 0, or 1 with the reason on standard error."""
    args = build_parser().parse_args(argv)
    try:
        if args.threads is not None:
            torch.set_num_threads(args.threads)
        return args.run(args) or 0
    except (ValueError, TypeError, ImportError, FloatingPointError, OSError) as error:
        print(f"sampled-sae {args.command}: {error}", file=sys.stderr)
        return 1


def build_parser() -> argparse.ArgumentParser:
    shape = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(prog="sampled-sae", description=__doc__, formatter_class=shape)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, formatter_class=shape)
        sub.set_defaults(run=run)
        sub.add_argument("--threads", type=int, default=None, help="CPU threads for torch; all cores when absent")
        sub.add_argument("--quiet", action="store_true", help="no progress bars")
        return sub

    for module in (harvest, training, convert, check, bench):
        module.add(command)
    return parser
