"""`ActivationStore`: a folder of activations, a manifest and its shards."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from ..support import checksums
from ..support.argument_checks import check_choice, check_integer
from ..support.atomic_files import read_rows, read_tensors
from ..support.listed_files import ListedFiles
from ..support.remote_files import RemotePath, is_url, place
from ..support.token_places import TokenPlaces, TokenShard
from .activations import Activations
from .same_settings import identity
from .store_writer import DTYPES, MANIFEST, check_scale, damage, read_manifest
from .tensor_writer import write_tensors

SHARD_TOKENS = 32_768


@dataclass(frozen=True)
class ActivationStore(ListedFiles, Activations):
    """A folder of activations that `sampled-sae harvest` or `ActivationStore.write` wrote.

    Attributes:
        folder, manifest: where and what; `manifest` is `manifest.json` as a dict.
    """

    @classmethod
    def open(cls, folder: str | Path) -> ActivationStore:
        """Opens a store by its manifest; the activations stay where they are until they are asked for.

        Args:
            folder: a folder, or a URL of one that fsspec knows (s3://, gs://, ...): its shards are then read over the
                network, each once an epoch, and kept in memory alone.

        Raises:
            ValueError: no manifest, a foreign or damaged one, or a harvest that has not finished.
        """
        at = place(folder)
        if at.is_dir() and not (at / MANIFEST).exists():
            held = sorted(part.name for part in at.iterdir() if (part / MANIFEST).exists())
            if held:
                raise ValueError(f"{at}: holds the stores {', '.join(held)}; name the one to read")
        manifest = read_manifest(at)
        if not manifest["complete"]:
            path = at / MANIFEST
            raise ValueError(f"{path}: the harvest has not finished; run the same harvest command again")
        check_scale(at, manifest)
        return cls(at, manifest)

    @classmethod
    def write(
        cls,
        folder: str | Path,
        x: Tensor | np.ndarray | Iterable[Tensor | np.ndarray],
        holdout: int = 0,
        shard_tokens: int = SHARD_TOKENS,
        dtype: str | torch.dtype = "float32",
        source: str = "",
    ) -> ActivationStore:
        """Makes a store from activations in memory and opens it. What fails leaves no store behind.

        Args:
            folder: made if need be; must be empty.
            x: activations [n, d] as they are, or an iterator of chunks [m, d] of any sizes, which is never held whole;
                float16, bfloat16, float32 or float64, on any device.
            holdout: how many tokens, the last ones, are kept for evaluation and never trained on; held in memory.
                Neighbours in a text are alike, so that a random choice would not be independent of the others.
                Training shuffles by itself; shuffle x only where its end is of another kind than the rest.
            shard_tokens: tokens a file.
            dtype: of the files, "float32", "float16" or "bfloat16".
            source: where the activations come from, as recorded.

        Raises:
            ValueError, TypeError: naming the argument, its value and what is allowed: NaN or inf (with the place), all
                zero, no tokens, other shapes or dtypes, a folder that is not empty.
        """
        holdout = check_integer("holdout", holdout, 0)
        shard_tokens = check_integer("shard_tokens", shard_tokens, 1)
        name = str(dtype).removeprefix("torch.")
        check_choice("dtype", name, tuple(DTYPES))
        write_tensors(place(folder), x, holdout, shard_tokens, name, str(source))
        return cls.open(folder)

    @property
    def where(self) -> str:
        return str(self.folder)

    @property
    def place(self) -> Path:
        return self.folder.resolve()

    def load(self, entry: dict[str, Any]) -> dict[str, Tensor]:
        """The tensors of one file named in the manifest; "activations" as they were made, float32 [n, d].

        Its checksum is verified when it is first read.

        Raises:
            ValueError: naming the file: missing, truncated, corrupt, or other than the manifest says.
        """
        path = self.folder / entry["file"]
        tensors = _read_remote(path, entry) if isinstance(path, RemotePath) else read_tensors(self.whole(entry))
        x = tensors.get("activations")
        if x is None or tuple(x.shape) != (entry["tokens"], self.d_in):
            found = None if x is None else tuple(x.shape)
            raise ValueError(f"{path}: activations {found}, the manifest says {(entry['tokens'], self.d_in)}")
        tensors["activations"] = x.float()
        return tensors

    def shard(self, i: int, start: int = 0, stop: int | None = None) -> Tensor:
        """Activations [n, d] of one shard, 0 <= i < len(self.tokens), or its tokens from start to stop alone."""
        entry = self.entry(i)
        if is_url(self.folder) or (start == 0 and stop in (None, entry["tokens"])):
            return self.load(entry)["activations"][start:stop]
        return read_rows(self.whole(entry), "activations", start, stop).float()

    @property
    def has_places(self) -> bool:
        """Whether every shard says where in the texts its tokens stand; those of earlier versions do not."""
        return bool(self.tokens) and all(shard.get("rows") for shard in self.manifest["shards"])

    def token_shard(self, i: int) -> TokenShard:
        """The activations of one shard, and with `has_places` where in the texts its tokens stand.

        Raises:
            ValueError: places that are not those of the activations; naming the file.
        """
        entry = self.entry(i)
        tensors = self.load(entry)
        if not self.has_places:
            return TokenShard(tensors["activations"], None)
        return TokenShard(tensors["activations"], TokenPlaces.read(self.folder / entry["file"], tensors))

    def _damage(self, entry: dict[str, Any]) -> str | None:
        return damage(self.folder, entry)

    def _cure(self) -> str:
        return "the same harvest command writes it again" if "model" in self.manifest else "make the store again"

    def holdout(self) -> tuple[Tensor, Tensor | None]:
        """What is never trained on: (activations [n, d] as they were made, token rows int64 [N, context]).

        The rows are None in a store that was made from activations without text.

        Raises:
            ValueError: the store has no held-out part.
        """
        entry = self.manifest.get("holdout")
        if not entry:
            raise ValueError(
                f"{self.folder}: has no held-out part, which evaluation needs; harvest with --holdout-rows, "
                "or ActivationStore.write with holdout"
            )
        tensors = self.load(entry)
        return tensors["activations"], tensors.get("rows")


class StoredActivations:
    """What `encode_corpus` reads of an `ActivationStore`: its shards or the first n of them, not what is held out."""

    def __init__(self, store: ActivationStore, n_shards: int | None = None) -> None:
        self.store, self.d_in = store, store.d_in
        self.n_shards = len(store.tokens) if n_shards is None else n_shards

    @property
    def about(self) -> dict[str, Any]:
        """Model, layer, source and context as the store's manifest has them."""
        return {name: self.store.manifest.get(name) for name in ("model", "layer", "source", "context")}

    @property
    def settings(self) -> dict[str, Any]:
        """What the store is of, and its files by their checksums."""
        files = [shard.get("crc32") or shard["bytes"] for shard in self.store.manifest["shards"]]
        return {"activations": identity(self.store.manifest), "files": files, "has_places": self.store.has_places}

    def token_shard(self, i: int) -> TokenShard:
        return self.store.token_shard(i)


def _read_remote(path: RemotePath, entry: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of a file at a URL, read into memory, which must be as its manifest says."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file, but the manifest lists it") from None
    if problem := checksums.difference(len(data), lambda: checksums.bytes_crc32(data), entry):
        raise ValueError(f"{path}: {problem}")
    try:
        return dict(safetensors.torch.load(data))
    except SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file ({error})") from None
