"""Reading harvested activations: a manifest, its shards, and a shuffled stream addressed by batch number."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from .files import read_json
from .validate import check_finite, check_integer

FORMAT = "sampled-sae activations"
VERSION = 1
MANIFEST = "manifest.json"
GROUP_BYTES = 1 << 30


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


class ShuffledStream:
    """Batches of a store in an order that depends on (seed, batch number) alone.

    Each epoch visits the shards in a new order, in groups of up to 1 GiB that are shuffled in memory; what is
    left over at the end of a group (less than a batch) is dropped. There is no state to save: batch t of a
    resumed run is batch t.

    Args:
        store: an ActivationStore.
        batch_size: tokens a batch.
        seed: of the order.
    """

    def __init__(self, store: ActivationStore, batch_size: int, seed: int = 0) -> None:
        check_integer("batch_size", batch_size, 1)
        self.store, self.batch_size, self.seed = store, batch_size, seed
        self._plans: dict[int, list[tuple[list[int], int]]] = {}
        self._loaded: tuple[tuple[int, int], Tensor] | None = None
        if self.batches_per_epoch(0) == 0:
            raise ValueError(
                f"batch_size={batch_size}: must be at most {sum(store.tokens)}, the tokens in {store.folder}"
            )

    def batches_per_epoch(self, epoch: int) -> int:
        return sum(count for _, count in self._plan(epoch))

    def batch(self, t: int) -> Tensor:
        """Batch t >= 0: [batch_size, d], normalised.

        Raises:
            ValueError: a corrupt shard, or NaN or inf in the batch, with the step.
        """
        step, epoch = t, 0
        while t >= self.batches_per_epoch(epoch):
            t -= self.batches_per_epoch(epoch)
            epoch += 1
        group = 0
        while t >= self._plan(epoch)[group][1]:
            t -= self._plan(epoch)[group][1]
            group += 1
        x = self._group(epoch, group)[t * self.batch_size : (t + 1) * self.batch_size]
        check_finite(x, "activations", f" at step {step}")
        return x

    def _plan(self, epoch: int) -> list[tuple[list[int], int]]:
        """The epoch's groups: (shards, full batches)."""
        if epoch not in self._plans:
            tokens = self.store.tokens
            limit = max(GROUP_BYTES // (4 * self.store.d_in), self.batch_size)
            groups: list[list[int]] = [[]]
            for shard in torch.randperm(len(tokens), generator=self._generator(epoch, 0)).tolist():
                held = sum(tokens[i] for i in groups[-1])
                if held >= self.batch_size and held + tokens[shard] > limit:
                    groups.append([])
                groups[-1].append(shard)
            self._plans[epoch] = [(g, sum(tokens[i] for i in g) // self.batch_size) for g in groups]
        return self._plans[epoch]

    def _group(self, epoch: int, group: int) -> Tensor:
        """The group's tokens in their shuffled order; one group is held at a time."""
        if self._loaded is None or self._loaded[0] != (epoch, group):
            self._loaded = None
            x = torch.cat([self.store.shard(i) for i in self._plan(epoch)[group][0]])
            order = torch.randperm(len(x), generator=self._generator(epoch, group + 1))
            self._loaded = (epoch, group), x[order]
        return self._loaded[1]

    def _generator(self, epoch: int, part: int) -> torch.Generator:
        return torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) * 1_000_003 + part)
