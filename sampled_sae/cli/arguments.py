"""Options that several commands share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

# (name, what to run, one line of help) to the command's parser
Command = Callable[[str, Callable[[argparse.Namespace], int | None], str], argparse.ArgumentParser]


def pool_multiplier(text: str) -> float | None:
    return None if text.lower() == "none" else float(text)


def model_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--model",
        default="smollm2-135m",
        help="a Hugging Face causal model or encoder by name or folder, or one whose weights come in packages: "
        "smollm2-135m, gemma3-270m, all-mpnet-base-v2 (an encoder)",
    )
    p.add_argument("--cache", type=Path, default=None, help="folder for converted models")
