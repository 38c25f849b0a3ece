"""`ActivationStore`: a folder of activations, a manifest and its shards."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..support.atomic_files import read_json

FORMAT = "sampled-sae activations"
VERSION = 1
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class ActivationStore:
    """A folder of activations that `sampled-sae harvest` wrote.

    Attributes:
        folder, manifest: where and what; `manifest` is `manifest.json` as a dict.
    """

    folder: Path
    manifest: dict[str, Any]

    @classmethod
    def open(cls, folder: str | Path) -> ActivationStore:
        """Reads the manifest.

        Raises:
            ValueError: no manifest, a foreign one, or a harvest that has not finished.
        """
        path = Path(folder) / MANIFEST
        manifest = read_json(path)
        if manifest.get("format") != FORMAT or manifest.get("version") != VERSION:
            raise ValueError(f"{path}: format={manifest.get('format')!r}: must be {FORMAT!r}, version {VERSION}")
        if not manifest.get("complete"):
            raise ValueError(f"{path}: the harvest has not finished; run the same harvest command again")
        return cls(Path(folder), manifest)

    @property
    def d_in(self) -> int:
        return int(self.manifest["d_in"])

    @property
    def scale(self) -> float:
        """Raw activations times this have mean ||x||^2 = d_in."""
        return float(self.manifest["scale"])

    @property
    def tokens(self) -> list[int]:
        """Tokens in each shard."""
        return [int(shard["tokens"]) for shard in self.manifest["shards"]]

    def load(self, entry: dict[str, Any]) -> dict[str, Tensor]:
        """The tensors of one file named in the manifest, checked; "activations" normalised, float32 [n, d].

        Raises:
            ValueError: naming the file: missing, truncated, corrupt, or other than the manifest says.
        """
        path = self.folder / entry["file"]
        if not path.is_file():
            raise ValueError(f"{path}: no such file, but the manifest lists it; harvest again")
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise ValueError(f"{path}: corrupt, {size} bytes where the manifest says {entry['bytes']}")
        try:
            tensors = load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path}: corrupt, not readable as safetensors ({error})") from None
        x = tensors.get("activations")
        if x is None or tuple(x.shape) != (entry["tokens"], self.d_in):
            found = None if x is None else tuple(x.shape)
            raise ValueError(f"{path}: activations {found}, the manifest says {(entry['tokens'], self.d_in)}")
        tensors["activations"] = x.float().mul_(self.scale)
        return tensors

    def shard(self, i: int) -> Tensor:
        """Normalised activations [n, d] of one shard."""
        return self.load(self.manifest["shards"][i])["activations"]

    def holdout(self) -> tuple[Tensor, Tensor]:
        """(normalised activations [n, d], token rows int64 [N, context]) never trained on."""
        entry = self.manifest.get("holdout")
        if not entry:
            raise ValueError(f"{self.folder}: harvested without holdout rows, which evaluation needs")
        tensors = self.load(entry)
        return tensors["activations"], tensors["rows"]
