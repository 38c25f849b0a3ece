"""The line that a run ends with."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def closing_line(result: dict[str, Any], folder: Path) -> str:
    """FVU, L0 and loss recovered of held-out activations, as far as they were measured, and the folder."""
    shown = (("fvu", "FVU", ".4f"), ("l0", "L0", ".2f"), ("loss_recovered_zero", "loss recovered", ".4f"))
    parts = [f"{label} {result[name]:{form}}" for name, label, form in shown if result.get(name) is not None]
    missing = [label for name, label, _ in shown if result.get(name) is None]
    if missing:
        parts.append(f"{' and '.join(missing)} not measured")
    return ", ".join([*parts, f"SAE in {folder}"])
