"""A command's options, and its result file: rows on disk as soon as they are there, and the table beside them."""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import PEERS, Row, machine
from benchmarks.worker import one_line
from sampled_sae.support.atomic_files import write_text

# heading -> format string over the names of a row; a dash stands for what it lacks
Columns = Mapping[str, str]
Result = dict[str, Any]
SIZE = {"(B, d, F, k)": "({B}, {d}, {F}, {k})"}
# of what `over_seeds` found, by name and format
OF_SEEDS = "{{{0}[0]:{1}}} ({{{0}[1]:{1}}}–{{{0}[2]:{1}}})"
LONGEST_REASON = 300
OPTIONS: dict[str, dict[str, Any]] = {
    "--out": {"type": Path, "required": True, "help": "JSON file to write; a table goes beside it"},
    "--device": {"choices": ("cpu", "cuda"), "default": "cuda" if torch.cuda.is_available() else "cpu"},
    "--rehearse": {"action": "store_true", "help": "tiny sizes, to see that nothing is broken"},
    "--within": {"type": float, "default": math.inf, "help": "seconds for all of it; what comes too late is left out"},
}


def parser(about: str | None, *options: str, **defaults: Any) -> argparse.ArgumentParser:
    """Of a command that writes a result file: with some of OPTIONS, and further ones by their defaults."""
    made = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in options:
        made.add_argument(name, **OPTIONS[name])
    for name, default in {"threads": 2, **defaults}.items():
        made.add_argument(
            f"--{name.replace('_', '-')}", type=type(default), default=default, help=f"{default} by default"
        )
    return made


class Record:
    """Rows of a result file, whose head says on what, with what and how they were measured.

    Args:
        args: of the command; `out`, if there is one, is the file, `within` the seconds after which it should end.
        table: the result as markdown.
        head: what else is known of the result before its rows.
    """

    def __init__(self, args: argparse.Namespace, table: Callable[[Result], str], **head: Any) -> None:
        torch.set_num_threads(args.threads)
        self.out, self.table, self.rows = args.out, table, []
        self.result: Result = {**machine(getattr(args, "device", "cpu"), PEERS), **head, "rows": self.rows}
        self.rehearse = getattr(args, "rehearse", False)
        self._end = time.perf_counter() + getattr(args, "within", math.inf)

    @property
    def left(self) -> float:
        """Seconds; without end in a rehearsal, which must see everything."""
        return math.inf if self.rehearse else self._end - time.perf_counter()

    def add(self, *rows: Row) -> None:
        """Appends rows and writes all of them."""
        self.rows += rows
        if self.out is not None:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            write_text(self.out, json.dumps(self.result, indent=2) + "\n")
            write_text(self.out.with_suffix(".md"), with_caption(self.table(self.result), self.result))
        for line in self.table({**self.result, "rows": [*rows]}).splitlines()[2:]:
            print(line, flush=True)

    def attempt(self, rows: list[Row], measure: Callable[[], Iterable[Row]], least: float = 1.0) -> None:
        """Adds what `measure` finds, or `rows` with the reason why it finds nothing.

        It is not begun where less than `least` seconds are left.
        """
        try:
            if self.left < least:
                raise TimeoutError("no time left")
            if torch.cuda.is_available():
                # what the last row left in the cache
                torch.cuda.empty_cache()
            self.add(*measure())
        except Exception as error:
            self.add(*({**row, "reason": failure(error)} for row in rows))


def failure(error: Exception) -> str:
    """In one line for a row."""
    return str(error) if isinstance(error, TimeoutError) else f"FAILED: {one_line(error)}"[:LONGEST_REASON]


def markdown(columns: Columns, rows: Iterable[Row]) -> str:
    """A table; a row with a `reason` shows it in place of its figures."""
    head, *lines = ("| " + " | ".join(line) + " |\n" for line in (columns, *(cells(columns, row) for row in rows)))
    return "".join([head, "|---" * len(columns) + "|\n", *lines])


def table_of(columns: Columns) -> Callable[[Result], str]:
    """What makes the table of all rows of a result."""
    return lambda result: markdown(columns, result["rows"])


def cells(columns: Columns, row: Row) -> list[str]:
    found = []
    for shown in columns.values():
        try:
            found.append(shown.format_map(row))
        except (KeyError, TypeError):
            found.append("–")
    if "reason" in row:
        first = found.index("–")
        found[first:] = [f"– ({row['reason']})", *[""] * (len(found) - first - 1)]
    return found


def with_caption(table: str, result: Result) -> str:
    """The table, and below it on what, with what, when and how the result was measured."""
    threads = [] if "NVIDIA" in result["device"] else [f"{result['threads']} threads"]
    packages = [f"{name} {result[name]}" for name in ("torch", *PEERS) if result.get(name) is not None]
    about = [result["device"], *threads, *packages, f"Python {result['python']}", result["date"]]
    return f"{table}\n{', '.join(about)}: `{result['command']}`\n"
