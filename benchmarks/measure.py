"""What the benchmarks share: the floor, the spread of samples, and the machine's description."""

from __future__ import annotations

import os
import platform
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sampled_sae.support.timing import spread

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
# Linux: which NVIDIA driver is loaded
DRIVER = Path("/proc/driver/nvidia/version")
PEERS = ("sae-lens", "dictionary-learning", "overcomplete", "eai-sparsify")
Row = dict[str, Any]


def spread_columns(values: Sequence[float], name: str) -> dict[str, float]:
    """Median with the 20th and 80th percentile, as `name`, `name`_p20, `name`_p80."""
    found = spread(values)
    return {name: found.ms, f"{name}_p20": found.p20, f"{name}_p80": found.p80}


def over_seeds(values: Iterable[float | None]) -> tuple[float, float, float] | None:
    """(mean, least, greatest) of those that are there; None where none is."""
    found = [value for value in values if value is not None]
    return (sum(found) / len(found), min(found), max(found)) if found else None


def product(x: Tensor, W: Tensor) -> Callable[[], Any]:
    """The encoder product of x [B, d] and W [F, d] into memory that exists: the floor of every step."""
    out = torch.empty(x.shape[0], W.shape[0], dtype=x.dtype, device=x.device)
    return lambda: torch.mm(x, W.t(), out=out)


def product_in_chunks(x: Tensor, W: Tensor) -> Callable[[], Any]:
    """The same products, some tokens and features at a time into one buffer: the floor of a step without [B, F]."""
    from sampled_sae.impl.encoder import Operands
    from sampled_sae.impl.torch.products import BLOCK_TOKENS, chunk_width

    blocks = x.split(BLOCK_TOKENS)
    width = chunk_width(Operands(blocks[0], W, W[:, 0]))
    out = torch.empty(len(blocks[0]), width, dtype=x.dtype, device=x.device)

    def call() -> None:
        for tokens in blocks:
            for rows in W.split(width):
                torch.mm(tokens, rows.t(), out=out[: len(tokens), : len(rows)])

    return call


def machine(device: str = "cpu", distributions: Sequence[str] = ()) -> Row:
    """Device, versions, date and command, for the head of a result file."""
    on_gpu = {"cuda": torch.version.cuda, "triton": version("triton"), "driver": driver(), "cores": os.cpu_count()}
    return {
        "device": processor() if device == "cpu" else torch.cuda.get_device_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        **({} if device == "cpu" else on_gpu),
        **{name: version(name) for name in distributions},
        "python": platform.python_version(),
        "date": date.today().isoformat(),
        "command": command(),
    }


def command() -> str:
    """How this process was started, as from the repository's root: paths outside it are left at their names."""
    name = in_repository(sys.argv[0]).removesuffix("/__main__.py").removesuffix(".py").replace("/", ".")
    return f"python -m {name} {shlex.join(in_repository(a) if Path(a).is_absolute() else a for a in sys.argv[1:])}"


def in_repository(path: str) -> str:
    """A path from the repository's root, or its name alone: results name no folder of the machine."""
    found = Path(path).resolve()
    return str(found.relative_to(ROOT)) if found.is_relative_to(ROOT) else found.name


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def driver() -> str | None:
    """Version of the NVIDIA driver; None where there is none."""
    found = re.search(r"Module.*?\s(\d+\.[\d.]+)", DRIVER.read_text()) if DRIVER.exists() else None
    return found[1] if found else None


def version(distribution: str) -> str | None:
    """None where it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
