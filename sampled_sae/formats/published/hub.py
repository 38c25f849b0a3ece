"""Files of the Hugging Face hub: those of one SAE, never a whole repository."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

IDENTIFIER = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def is_identifier(source: str) -> bool:
    """Whether it has the form of a repository's name, `owner/name`."""
    return IDENTIFIER.fullmatch(source) is not None


def download(repository: str, at: str | None, files: Iterable[str], revision: str | None) -> Path:
    """The folder of a repository's files on this machine, in the hub's own cache.

    Args:
        repository: `owner/name`.
        at: folder or file in it; its root when absent.
        files: names of files to fetch from that folder.
        revision: branch, tag or commit.

    Raises:
        ImportError: huggingface_hub is not installed; names the extra.
        ValueError: no such repository, none of the files, or the hub cannot be reached and the cache holds nothing.
    """
    try:
        import huggingface_hub
    except ImportError:
        needed = 'reading from the hub needs huggingface_hub: pip install "sampled-sae[hub]"'
        raise ImportError(f"{repository}: {needed}, or download the files and name their folder") from None
    at = None if at is None else at.rstrip("/")  # with one, the hub takes it for all that is below
    names = [name if at is None else f"{at}/{name}" for name in files]
    # at may be a file itself; a run's own config.json at the root says what its SAEs read
    wanted = [*names, "config.json"] if at is None else [*names, at, "config.json"]
    try:
        found = huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=wanted)
    except Exception as error:
        said = str(error).strip().split("\n")[0]
        raise ValueError(
            f"{repository}: the hub did not give it ({type(error).__name__}: {said}), and there is no such folder here"
        ) from None
    return Path(found)
