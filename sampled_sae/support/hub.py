"""Files of the Hugging Face hub: a few of a repository read, a folder of them written."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

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
    huggingface_hub = _library(repository, "reading from the hub", ", or download the files and name their folder")
    at = None if at is None else at.rstrip("/")  # with one, the hub takes it for all that is below
    names = [name if at is None else f"{at}/{name}" for name in files]
    # at may be a file itself; a run's own config.json at the root says what its SAEs read
    wanted = [*names, "config.json"] if at is None else [*names, at, "config.json"]
    try:
        found = huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=wanted)
    except Exception as error:
        raise ValueError(
            f"{repository}: the hub did not give it ({_said(error)}), and there is no such folder here"
        ) from None
    return Path(found)


def check_identifier(repository: str) -> None:
    """ValueError unless it has the form of a repository's name."""
    if not isinstance(repository, str) or not is_identifier(repository):
        raise ValueError(f"repository={repository!r}: must be the name of a repository on the hub, owner/name")


class Repository:
    """A repository of models on the hub, to be written to; made where there is none.

    Args:
        name: `owner/name`.
        branch: made where there is none; the main one when absent.
        private: of a repository that is made; what its owner has set when absent.
        token: of the hub; that of `hf auth login` when absent.

    Raises:
        ImportError: huggingface_hub is not installed; names the extra.
        ValueError: a name that is none, or the hub refuses, with its words.
    """

    def __init__(self, name: str, branch: str | None, private: bool | None, token: str | None) -> None:
        check_identifier(name)
        self.name, self.branch = name, branch
        self._api = _library(name, "writing to the hub").HfApi(token=token)
        self._asked("make it", self._api.create_repo, name, private=private, exist_ok=True)
        if branch is not None:
            self._asked("make the branch", self._api.create_branch, name, branch=branch, exist_ok=True)

    def text(self, file: str) -> str | None:
        """A text file that is there already; None for none."""
        there = self._asked("list its files", self._api.list_repo_files, self.name, revision=self.branch)
        if file not in there:
            return None
        path = self._asked(
            f"give {file}", self._api.hf_hub_download, repo_id=self.name, filename=file, revision=self.branch
        )
        return Path(path).read_text(encoding="utf-8", errors="replace")

    def write(self, folder: Path, message: str, replaced: Iterable[str] = ()) -> str:
        """All files of a folder in one commit; returns its address. Those of `replaced` that it has not are deleted."""
        options = {"repo_id": self.name, "folder_path": folder, "revision": self.branch, "commit_message": message}
        gone = [file for file in replaced if not (folder / file).exists()]
        if gone:
            options["delete_patterns"] = gone
        return str(self._asked("take it", self._api.upload_folder, **options).commit_url)

    def _asked(self, what: str, ask: Any, *args: Any, **options: Any) -> Any:
        try:
            return ask(*args, **options)
        except Exception as error:
            raise ValueError(f"{self.name}: the hub did not {what} ({_said(error)})") from None


def _library(repository: str, purpose: str, otherwise: str = "") -> Any:
    try:
        import huggingface_hub
    except ImportError:
        needed = f'{purpose} needs huggingface_hub: pip install "sampled-sae[hub]"'
        raise ImportError(f"{repository}: {needed}{otherwise}") from None
    return huggingface_hub


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no reason given'}"
