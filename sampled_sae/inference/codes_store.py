"""`CodesStore`: the sparse codes of a corpus, and what they say of any feature without another pass over it."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..codes import SparseCodes
from ..support.argument_checks import check_integer
from ..support.listed_files import ListedFiles
from ..support.token_places import TokenPlaces
from .codes_files import MANIFEST, CodesOfShard, read_manifest


class Context(NamedTuple):
    """A token on which a feature is active.

    value: the activation. token: the token's number in the corpus. ids: the token ids around it, of the same row; empty
    without text. at: the token's place in `ids`. row, position: its row in the corpus and its place in the row; None
    without text.
    """

    value: float
    token: int
    ids: list[int]
    at: int
    row: int | None
    position: int | None


@dataclass(frozen=True)
class CodesStore(ListedFiles):
    """A folder of codes that `sampled-sae encode` wrote.

    Attributes:
        folder, manifest: where and what; `manifest` is `manifest.json` as a dict.
    """

    _index: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def open(cls, folder: str | Path) -> CodesStore:
        """Opens a store by its manifest; the codes stay on disk until they are asked for.

        Raises:
            ValueError: no manifest, a foreign or damaged one, or a store that is not finished.
        """
        manifest = read_manifest(Path(folder))
        if not manifest["complete"]:
            raise ValueError(f"{Path(folder) / MANIFEST}: not finished; run the same encode command again")
        return cls(Path(folder), manifest)

    @property
    def d_sae(self) -> int:
        return int(self.manifest["d_sae"])

    @property
    def l0(self) -> float:
        """Mean number of active features a token."""
        return sum(shard["entries"] for shard in self.manifest["shards"]) / max(1, sum(self.tokens))

    def counts(self) -> Tensor:
        """int64 [d_sae]: on how many tokens each feature is active."""
        found = torch.zeros(self.d_sae, dtype=torch.int64)
        for i in range(len(self.tokens)):
            features, ends = self._features(i)
            found[features] += ends.diff()
        return found

    def density(self) -> Tensor:
        """float64 [d_sae]: the share of tokens on which each feature is active."""
        return self.counts().double() / max(1, sum(self.tokens))

    def of_feature(self, feature: int) -> tuple[Tensor, Tensor]:
        """(values [n], tokens int64 [n] by their number in the corpus, ascending) of one feature's active entries."""
        feature = check_integer("feature", feature, 0)
        if feature >= self.d_sae:
            raise ValueError(f"feature={feature}: must be below d_sae={self.d_sae}")
        found = [self._of_shard(i, feature, first) for i, first in enumerate(self._firsts())]
        values = torch.cat([values for values, _ in found]) if found else torch.empty(0)
        return values, torch.cat([tokens for _, tokens in found]) if found else torch.empty(0, dtype=torch.int64)

    def top_contexts(self, feature: int, n: int = 10, before: int = 16, after: int = 8) -> list[Context]:
        """The n tokens on which a feature is most active, largest first, ties to the earlier token.

        Args:
            feature: its number.
            n: how many, or fewer where it is active on fewer.
            before, after: token ids of the same row to give with each.
        """
        n, before, after = (check_integer(*pair, 0) for pair in (("n", n), ("before", before), ("after", after)))
        values, tokens = self.of_feature(feature)
        order = values.sort(descending=True, stable=True).indices[:n]
        return [self._context(float(values[j]), int(tokens[j]), before, after) for j in order.tolist()]

    def codes(self, i: int) -> SparseCodes:
        """The codes [n, d_sae] of shard i, by token, 0 <= i < len(self.tokens)."""
        shard = self._read(i, CodesOfShard._fields)
        features = shard["features"].long().repeat_interleave(shard["counts"].long())
        tokens, order = shard["tokens"].long().sort(stable=True)
        return SparseCodes(shard["values"][order], tokens, features[order], (self.tokens[i], self.d_sae))

    def places(self, i: int) -> TokenPlaces | None:
        """Where in the texts the tokens of shard i stand; None without text."""
        if self.entry(i)["rows"] is None:
            return None
        return TokenPlaces.read(self.folder / self.entry(i)["file"], self._read(i, TokenPlaces._fields))

    def _firsts(self) -> list[int]:
        """The number of each shard's first token in the corpus."""
        return [0, *accumulate(self.tokens)][:-1]

    def _context(self, value: float, token: int, before: int, after: int) -> Context:
        firsts = self._firsts()
        i = max(j for j, first in enumerate(firsts) if first <= token and self.tokens[j])
        places = self.places(i)
        if places is None:
            return Context(value, token, [], 0, None, None)
        row, position = (int(t[token - firsts[i]]) for t in places[1:])
        start = max(0, position - before)
        ids = places.rows[row, start : position + after + 1].tolist()
        rows_before = sum(self.entry(j)["rows"] for j in range(i))
        return Context(value, token, ids, position - start, rows_before + row, position)

    def _of_shard(self, i: int, feature: int, first: int) -> tuple[Tensor, Tensor]:
        features, ends = self._features(i)
        at = int(torch.searchsorted(features, feature))
        start, end = (0, 0) if at == len(features) or features[at] != feature else ends[at : at + 2].tolist()
        found = self._read(i, ("values", "tokens"), start, end)
        return found["values"], found["tokens"].long() + first

    def _features(self, i: int) -> tuple[Tensor, Tensor]:
        """(features int64 [A] of a shard, ends int64 [A + 1] of their entries), kept once read."""
        if i not in self._index:
            shard = self._read(i, ("features", "counts"))
            ends = torch.cat((torch.zeros(1, dtype=torch.int64), shard["counts"].long().cumsum(0)))
            entry = self.entry(i)
            features = shard["features"].long()
            ascending = bool((features.diff() > 0).all()) and (len(features) == 0 or int(features[0]) >= 0)
            if not ascending or int(ends[-1]) != entry["entries"] or (len(features) and features[-1] >= self.d_sae):
                raise ValueError(
                    f"{self.folder / entry['file']}: its features are not those of {entry['entries']} entries"
                )
            self._index[i] = features, ends
        return self._index[i]

    def _cure(self) -> str:
        return "the same encode command writes it again"

    def _read(
        self, i: int, names: tuple[str, ...], start: int | None = None, end: int | None = None
    ) -> dict[str, Tensor]:
        """Tensors of a shard, of the entries [start, end) where these are given; its checksum is verified once."""
        path = self.whole(self.entry(i))
        try:
            with safe_open(path, "pt") as file:
                return {name: file.get_slice(name)[start:end] for name in names}
        except SafetensorError as error:
            raise ValueError(f"{path}: not a shard of codes ({error})") from None
