"""What the benchmarks share: the command line, the floor, the machine's description, tables and result files."""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sampled_sae.support.timing import spread

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PEERS = ("sae-lens", "dictionary-learning", "overcomplete", "eai-sparsify")
Row = dict[str, Any]
# heading -> format string over the names of a row, whose missing values are shown as dashes
Columns = Mapping[str, str]
SIZE = {"(B, d, F, k)": "({B}, {d}, {F}, {k})"}


def parser(about: str | None, out: Path | None = None) -> argparse.ArgumentParser:
    """Of a command that writes a result file, to `out` unless another is named."""
    made = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    written = "JSON file to write; a table goes beside it"
    made.add_argument("--out", type=Path, required=out is None, default=out, help=written)
    made.add_argument("--threads", type=int, default=2)
    return made


def spread_columns(values: Sequence[float], name: str) -> dict[str, float]:
    """Median with the 20th and 80th percentile, as `name`, `name`_p20, `name`_p80."""
    found = spread(values)
    return {name: found.ms, f"{name}_p20": found.p20, f"{name}_p80": found.p80}


def product(x: Tensor, W: Tensor) -> Callable[[], Any]:
    """The encoder product of x [B, d] and W [F, d] into memory that exists: the floor of every step."""
    out = torch.empty(x.shape[0], W.shape[0], dtype=x.dtype, device=x.device)
    return lambda: torch.mm(x, W.t(), out=out)


def product_in_chunks(x: Tensor, W: Tensor) -> Callable[[], Any]:
    """The same products, some tokens and features at a time into one buffer: the floor of a step without [B, F]."""
    from sampled_sae.impl.torch.products import BLOCK_TOKENS, chunk_features

    blocks = x.split(BLOCK_TOKENS)
    width = chunk_features(len(blocks[0]))
    out = torch.empty(len(blocks[0]), width, dtype=x.dtype, device=x.device)

    def call() -> None:
        for tokens in blocks:
            for rows in W.split(width):
                torch.mm(tokens, rows.t(), out=out[: len(tokens), : len(rows)])

    return call


def machine(device: str = "cpu", distributions: Sequence[str] = ()) -> Row:
    """Device, versions, date and command, for the head of a result file."""
    return {
        "device": processor() if device == "cpu" else torch.cuda.get_device_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        **{name: version(name) for name in distributions},
        "python": platform.python_version(),
        "date": date.today().isoformat(),
        "command": command(),
    }


def command() -> str:
    """How this process was started, as from the repository's root: paths outside it are left at their names."""
    name = in_repository(sys.argv[0])
    if name.endswith("/__main__.py"):
        name = "-m " + name.removesuffix("/__main__.py").replace("/", ".")
    return f"python {name} {shlex.join(in_repository(a) if Path(a).is_absolute() else a for a in sys.argv[1:])}"


def in_repository(path: str) -> str:
    """A path from the repository's root, or its name alone: results name no folder of the machine."""
    found = Path(path).resolve()
    return str(found.relative_to(ROOT)) if found.is_relative_to(ROOT) else found.name


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def version(distribution: str) -> str | None:
    """None where it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def markdown(columns: Columns, rows: Iterable[Row]) -> str:
    """A table; a row with a `reason` shows it in place of its figures."""
    head, *lines = ("| " + " | ".join(line) + " |\n" for line in (columns, *(cells(columns, row) for row in rows)))
    return "".join([head, "|---" * len(columns) + "|\n", *lines])


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


def with_caption(table: str, result: Mapping[str, Any]) -> str:
    """The table, and below it on what, with what, when and how the result was measured."""
    threads = [] if "NVIDIA" in result["device"] else [f"{result['threads']} threads"]
    packages = [f"{name} {result[name]}" for name in ("torch", *PEERS) if result.get(name) is not None]
    about = [result["device"], *threads, *packages, f"Python {result['python']}", result["date"]]
    return f"{table}\n{', '.join(about)}: `{result['command']}`\n"


def write_result(out: Path, result: Mapping[str, Any], table: str) -> None:
    """`out` with the result as JSON, and the table with its caption beside it as .md."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")
    out.with_suffix(".md").write_text(with_caption(table, result))
