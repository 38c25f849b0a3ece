"""Figures by matplotlib, and their files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .atomic_files import write_atomically


def new_figure(width: float, height: float) -> Any:
    """An empty one of so many inches.

    Raises:
        ImportError: when matplotlib is missing, saying what to install.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError('plots need matplotlib: pip install "sampled-sae[plot]"') from None
    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Any, path: Path) -> Path:
    """Writes a PNG; returns its path."""
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=150, format="png"))
    return path
