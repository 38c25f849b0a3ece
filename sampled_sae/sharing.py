"""The files of a `SampledSAE`: a folder, or a repository of the Hugging Face hub."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any, TypeVar

import torch

from .config import SampledSAEConfig
from .model_card import MARK, RunFacts, model_card
from .pretrained import (
    CONFIG,
    EVALUATION,
    FORMAT,
    ORIGIN,
    RUN,
    WEIGHTS,
    is_ours,
    load_pretrained,
    recorded_origin,
    save_pretrained,
    tensor_shapes,
)
from .support.atomic_files import field, parse_json, read_json, write_json, write_text
from .support.hub import Repository, check_identifier, download, is_identifier
from .support.tensor_file import Kind

CARD = "README.md"
FILES = (CONFIG, WEIGHTS, RUN, ORIGIN, EVALUATION)
SAE = TypeVar("SAE", bound="Sharing")


class Sharing:
    """The methods of a `SampledSAE` that write and read it whole."""

    cfg: SampledSAEConfig
    layout: Any

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes `config.json` and `sae.safetensors`, each to a temporary name that is then renamed."""
        tensors = {name: getattr(self, name) for name in tensor_shapes(self.cfg)}
        kinds = {name: Kind(t.dtype, t.shape) for name, t in tensors.items()}
        self.layout.write(tensors, lambda pieces: save_pretrained(Path(folder), self.cfg.to_dict(), kinds, pieces))

    @classmethod
    def from_pretrained(
        cls: type[SAE],
        folder: str | os.PathLike[str],
        device: torch.device | str | None = None,
        *,
        revision: str | None = None,
    ) -> SAE:
        """Reads what `save_pretrained` or `push_to_hub` wrote, in evaluation mode: call `train()` to train it on.

        Args:
            folder: a folder, or as a str a repository `owner/name` of the Hugging Face hub (extra "hub"), whose files
                stay in the hub's own cache. A folder of that name goes first.
            device: where the SAE is made; the default device when absent.
            revision: branch, tag or commit of the repository.

        Raises:
            ValueError: a missing, truncated or foreign file, or one with NaN or inf, with its name and what is wrong.
                A folder of SAELens, dictionary_learning or sparsify is such a one: the error names what reads it.
            ImportError: a repository without huggingface_hub.
        """
        cfg, tensors = load_pretrained(_local(folder, revision))
        made: Any = cls
        sae = made(SampledSAEConfig.from_dict(cfg), device=device, dtype=tensors["W_enc"].dtype)
        sae.load_state_dict(tensors)
        return sae.eval()

    def push_to_hub(
        self,
        repository: str,
        *,
        run: str | os.PathLike[str] | None = None,
        revision: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        message: str = "SAE by sampled-sae",
    ) -> str:
        """Writes the SAE to a repository of the Hugging Face hub, with a card (README.md), in one commit.

        The card has the metrics, every setting, and how to load the SAE. One that somebody has written is kept;
        what an earlier push has said of another SAE's origin and metrics is not.

        Args:
            repository: `owner/name`; made where there is none.
            run: folder that the SAE was trained, imported or evaluated in: model and layer, the settings of the
                training and the metrics are taken from its run.json, origin.json and evaluation.json.
            revision: branch to write to, made where there is none; the main one when absent.
            private: of a repository that is made.
            token: of the hub; that of `hf auth login` when absent.
            message: of the commit.

        Returns:
            The commit's address.

        Raises:
            ValueError: a name that is none, a `run` with another SAE, a repository whose config.json is of something
                else, an SAE spread over processes, or the hub refuses, with its words.
            ImportError: without huggingface_hub.
        """
        check_identifier(repository)
        if self.layout.size > 1:
            raise ValueError("an SAE that is spread over processes: save it, and push it from one process")
        facts = RunFacts() if run is None else self._facts(Path(run))
        there = Repository(repository, revision, private, token)
        _check_replaceable(there)
        card = there.text(CARD)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            if facts.origin:
                write_json(Path(folder) / ORIGIN, facts.origin)
            if facts.evaluation:
                write_json(Path(folder) / EVALUATION, facts.evaluation)
            if card is None or MARK in card:
                write_text(Path(folder) / CARD, model_card(repository, self.cfg, facts, revision))
            return there.write(Path(folder), message, (ORIGIN, EVALUATION))

    def _facts(self, run: Path) -> RunFacts:
        if not run.is_dir():
            raise ValueError(f"run={str(run)!r}: no such folder")
        if is_ours(run):
            cfg, tensors = load_pretrained(run)
            mine = {name: self.layout.whole(getattr(self, name)).cpu() for name in tensors}
            if cfg != self.cfg.to_dict() or any(not torch.equal(t, mine[name]) for name, t in tensors.items()):
                raise ValueError(f"run={str(run)!r}: holds another SAE than this one")
        trained = read_json(run / RUN) if (run / RUN).is_file() else {}
        evaluation = read_json(run / EVALUATION) if (run / EVALUATION).is_file() else {}
        evaluation.pop("settings", None)
        train = field(run / RUN, trained, "train", dict) if trained else {}
        return RunFacts(recorded_origin(run), train, evaluation)


def _local(source: str | os.PathLike[str], revision: str | None) -> Path:
    """The folder, or that of a repository's files on this machine."""
    folder = Path(source)
    if not isinstance(source, str) or folder.exists() or not is_identifier(source):
        if revision is not None:
            raise ValueError(f"revision={revision!r}: must be None for a folder, and {source} is one")
        return folder
    found = download(source, None, FILES, revision)
    if not is_ours(found):
        raise ValueError(
            f"{source}: the repository holds no SAE of this package at its root; sampled_sae.load_inference reads "
            "those of other libraries, and with at= one in a folder of it"
        )
    return found


def _check_replaceable(there: Repository) -> None:
    """ValueError where the config.json of something else would be replaced."""
    text = there.text(CONFIG)
    if text is not None and parse_json(f"{there.name}/{CONFIG}", text.encode()).get("format") != FORMAT:
        raise ValueError(f"{there.name}: its {CONFIG} is of something else than a SampledSAE; use another repository")
