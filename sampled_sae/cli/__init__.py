"""`sampled-sae`: harvest activations, train, evaluate, sweep, encode, look, compare, check, convert, bench, verify."""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any

import torch

from ..support.all_ranks import ALONE
from ..support.interruption import terminable
from ..support.launch import launched
from ..support.version import __version__
from . import bench, check, compare, convert, encode, harvest, look, training, verify
from .arguments import threads
from .errors import sentence
from .parser import Parser
from .processes import Nowhere, join, leave, unheard

# the commands whose standard output was asked for, and is kept with --quiet
RESULTS = ("evaluate", "compare", "verify", "check", "bench")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit status.

    0, or with one line on standard error 1 for what went wrong, 130 for Ctrl-C and 143 for SIGTERM. As in argparse,
    SystemExit with 2 for arguments that are none, with 0 for --help and --version.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name of a file may hold what the terminal cannot show
    parser = build_parser()
    try:
        launch = launched()
    except ValueError as error:
        print(f"sampled-sae: {error}", file=sys.stderr)
        return 1
    with unheard(launch):
        args = parser.parse_args(argv)
    args.ranks = ALONE
    try:
        with terminable(), unheard(launch):
            if args.threads is not None:
                torch.set_num_threads(args.threads)
            with quiet(args.command in RESULTS) if args.quiet else written_out():
                args.ranks = join(args, launch)
                with args.ranks.accounted():
                    status = args.run(args) or 0
                args.ranks.close()
                return int(status)
    except BrokenPipeError:  # the reader of the output has gone, as `head` does; Python flushes it again at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        status = 1
    except (Exception, KeyboardInterrupt) as error:
        if args.debug:
            traceback.print_exc()
        status = 128 + getattr(error, "number", signal.SIGINT) if isinstance(error, KeyboardInterrupt) else 1
        # before they have joined, what is wrong with one is wrong with all on its machine
        said = args.ranks.said_here(error) if args.ranks.size > 1 or launch is None or launch.local_rank == 0 else None
        if said is not None:
            options = parser.commands()[args.command].options()
            print(f"sampled-sae {args.command}: {said}{sentence(error, options)}", file=sys.stderr)
    if args.ranks.size > 1:
        leave(status)
    return status


def build_parser() -> Parser:
    parser = Parser(prog="sampled-sae", description=__doc__)
    parser.add_argument("--version", action="version", version=f"sampled-sae {__version__}", help="print it and stop")
    _everywhere(parser, threads=None, quiet=False, debug=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Any, text: str) -> Parser:
        sub: Parser = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        # absent here, what stands before the command is kept
        _everywhere(sub, threads=argparse.SUPPRESS, quiet=argparse.SUPPRESS, debug=argparse.SUPPRESS)
        return sub

    for module in (harvest, training, encode, look, convert, compare, verify, check, bench):
        module.add(command)
    return parser


def _everywhere(p: argparse.ArgumentParser, **default: Any) -> None:
    p.add_argument(
        "--threads", type=threads, default=default["threads"], help="CPU threads for torch; all cores when absent"
    )
    p.add_argument(
        "--quiet", action="store_true", default=default["quiet"], help="write errors, and results asked for, alone"
    )
    p.add_argument(
        "--debug", action="store_true", default=default["debug"], help="show where in the code an error came from"
    )


@contextmanager
def quiet(result: bool) -> Iterator[None]:
    """Nothing is written but a result, where there is one."""
    nowhere = Nowhere()
    with redirect_stderr(nowhere), redirect_stdout(sys.stdout if result else nowhere), written_out():
        yield


@contextmanager
def written_out() -> Iterator[None]:
    """What cannot be written is known before the command ends."""
    yield
    sys.stdout.flush()
