"""The options of `train` and `sweep` for places that show runs."""

from __future__ import annotations

import argparse

from ..run_logs import KINDS, PROJECT, LogPlace


def add_log_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("--log", choices=KINDS, default=None, help="where else metrics go as the training runs")
    p.add_argument("--log-project", default=None, help=f"that the run stands under there; {PROJECT} when absent")
    p.add_argument("--log-name", default=None, help="of the run there; its folder's name when absent")
    p.add_argument("--log-tags", default=None, help="of the run there, comma-separated")


def log_place(args: argparse.Namespace) -> LogPlace | None:
    """None where the run is shown nowhere.

    Raises:
        ValueError, ImportError: as LogPlace.
    """
    if args.log is None:
        for name in ("log_project", "log_name", "log_tags"):
            if (value := getattr(args, name)) is not None:
                raise ValueError(f"{name}={value!r}: goes with --log")
        return None
    tags = [] if args.log_tags is None else args.log_tags.split(",")
    return LogPlace(args.log, args.log_project or PROJECT, args.log_name, tuple(tag.strip() for tag in tags))
