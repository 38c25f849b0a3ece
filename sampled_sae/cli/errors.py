"""What went wrong, as one sentence in the words of the command line."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

from ..support.all_ranks import RankError

# What is said to users; anything else that is raised is a fault of this package.
EXPECTED = (ValueError, TypeError, ImportError, FloatingPointError, OSError, RankError)
# torch has no type of its own for either on a CPU
NO_MEMORY = re.compile(r"not enough memory|can't allocate memory|cannot allocate memory|out of memory", re.IGNORECASE)
TOO_LARGE = re.compile(r"overflow|negative dimension|too large to convert|[Ii]nvalid size|out of range")

# The Python names of arguments and where an option of another name keeps them, in a command that has it.
ARGUMENTS = {"d_sae": "features", "d_in": "d", "l": "ls", "score": "scores", "source": "texts", "limit": "tokens"}
ARGUMENTS |= {"project": "log_project", "tags": "log_tags"}


def sentence(error: BaseException, options: Mapping[str, str]) -> str:
    """One line for people.

    Args:
        error: what a command raised.
        options: where a value is kept -> the option that sets it, of the command.
    """
    said = " ".join(str(error).split())
    if isinstance(error, KeyboardInterrupt):
        return said or "interrupted"
    if is_no_memory(error):
        return f"not enough memory ({in_options(said, options) or 'no more was given'}){smaller(options)}"
    if isinstance(error, OverflowError) or (isinstance(error, RuntimeError) and TOO_LARGE.search(said)):
        return f"a number is too large ({said}){smaller(options)}"
    if isinstance(error, OSError) and error.strerror:
        return ": ".join(str(part) for part in (error.filename, error.strerror) if part is not None)
    if isinstance(error, EXPECTED):
        return in_options(said or type(error).__name__, options)
    return (
        f"unexpected error, {type(error).__name__}: {said}; run again with --debug, and report what it says to the "
        "project"
    )


def is_no_memory(error: BaseException) -> bool:
    """Whether memory was missing, that of a GPU too."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and NO_MEMORY.search(str(error)) is not None


def smaller(options: Mapping[str, str]) -> str:
    named = [options[name] for name in ("batch_size", "batch", "features", "together") if name in options]
    return f"; try a smaller {' or '.join(named)}" if named else ""


def in_options(message: str, options: Mapping[str, str]) -> str:
    """`d_sae=0: must be ...` as `--features 0: must be ...`.

    A message that begins with the name of a file speaks of what the file holds, and stays as it is.
    """
    if re.match(r"[^\s=]*[/\\.][^\s=]*:", message):
        return message
    names = {name: options[kept] for name, kept in ARGUMENTS.items() if kept in options} | dict(options)
    return re.sub(r"(?<![^\s(])(\w+)=", lambda found: f"{names[found[1]]} " if found[1] in names else found[0], message)
