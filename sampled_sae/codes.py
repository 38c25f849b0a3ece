"""`SparseCodes`: the kept activations of a batch; `SampledSAEOutput`: what a forward pass gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .support.argument_checks import check_integer
from .support.html_table import html_table

# what a notebook shows of the codes of a batch
SHOWN_TOKENS, SHOWN_FEATURES = 8, 6


class Entries(NamedTuple):
    """Entries of a [B, F] activation matrix: their values [n], tokens and features int64 [n]."""

    values: Tensor
    tokens: Tensor
    features: Tensor

    @staticmethod
    def none(like: Tensor) -> Entries:
        """No entry, of the dtype of `like` and on its device."""
        nothing = like.new_zeros(0, dtype=torch.int64)
        return Entries(like.new_zeros(0), nothing, nothing)

    def at(self, places: Tensor) -> Entries:
        """Those at these places, int64 [m]."""
        return Entries(*(column.index_select(0, places) for column in self))

    @staticmethod
    def joined(parts: list[Entries]) -> Entries:
        """All entries of a list, which is emptied: no more than one column of it is held twice."""
        columns = [list(column) for column in zip(*parts)]
        parts.clear()
        return Entries(*(joined(column) for column in columns))


def joined(parts: list[Tensor]) -> Tensor:
    """All of a list, which is emptied."""
    whole = torch.cat(parts) if len(parts) > 1 else parts[0]
    parts.clear()
    return whole


class PaddedEntries(NamedTuple):
    """Kept entries in a list of fixed length, so that the host need not know how many there are.

    values: fp32 [n], with gradient. tokens, features: int32 [n], sorted by token, then feature; padding stands
    at the end, with value 0, token B and feature F. token_ends: int32 [B + 1], offsets of each token's entries.
    order, row_ends: int32 [n] and [R + 1], the same entries by feature, for each of `rows` int64 [R], which hold
    every feature that occurs.
    """

    values: Tensor
    tokens: Tensor
    features: Tensor
    token_ends: Tensor
    order: Tensor
    row_ends: Tensor
    rows: Tensor

    def with_values(self, values: Tensor) -> PaddedEntries:
        """The same places with other values; `_replace` is beyond the compiler of torch 2.11."""
        return PaddedEntries(values, self.tokens, self.features, self.token_ends, self.order, self.row_ends, self.rows)


class SparseCodes:
    """The kept entries of a [B, F] activation matrix, sorted by token, then feature.

    Attributes:
        values: [n], the activations; they carry the gradient.
        tokens: int64 [n], row of each entry.
        features: int64 [n], column of each entry.
        shape: (B, F).

    Equivalent to `torch.sparse_coo_tensor([tokens, features], values, shape)`. A small pool is kept as the
    masked block [B, P] it was computed in, and listed entry by entry when first asked for; so are the
    `PaddedEntries` in which a GPU lists entries without telling the host how many there are.
    """

    def __init__(self, values: Tensor, tokens: Tensor, features: Tensor, shape: tuple[int, int]) -> None:
        self._entries: Entries | None = Entries(values, tokens, features)
        self.block: Tensor | None = None
        self.low_block: Tensor | None = None
        self.pool: Tensor | None = None
        self.least: Tensor | None = None
        # what the torch form knows of the order of the entries, made once
        self.index: Any = None
        self.padded: PaddedEntries | None = None
        self.shape = shape

    @classmethod
    def from_block(
        cls,
        block: Tensor,
        pool: Tensor,
        n_features: int,
        low_block: Tensor | None = None,
        least: Tensor | None = None,
    ) -> SparseCodes:
        """From a block [B, P] that is zero where nothing is kept, and its features int64 [P], ascending.

        `low_block` is the block in 16 bits, for products in that precision, `least` [1] what `smallest` returns, where
        that is known.
        """
        codes = cls(block.new_empty(0), pool[:0], pool[:0], (block.shape[0], n_features))
        codes._entries = None
        codes.block, codes.pool, codes.low_block, codes.least = block, pool, low_block, least
        return codes

    @classmethod
    def from_padded(cls, padded: PaddedEntries, shape: tuple[int, int]) -> SparseCodes:
        """From a list with padding at its end."""
        codes = cls(padded.values, padded.tokens, padded.features, shape)
        codes._entries = None
        codes.padded = padded
        return codes

    @classmethod
    def from_dense(cls, dense: Tensor) -> SparseCodes:
        """From a dense [B, F] tensor: its entries other than zero."""
        tokens, features = dense.detach().nonzero(as_tuple=True)
        return cls(dense[tokens, features], tokens, features, (dense.shape[0], dense.shape[1]))

    def entries(self) -> Entries:
        """(values, tokens, features)."""
        if self._entries is None and self.padded is not None:
            n = int(self.padded.token_ends[-1])
            values, tokens, features = self.padded[:3]
            self._entries = Entries(values[:n], tokens[:n].long(), features[:n].long())
        if self._entries is None:
            assert self.block is not None
            assert self.pool is not None
            tokens, columns = self.block.detach().nonzero(as_tuple=True)
            self._entries = Entries(self.block[tokens, columns], tokens, self.pool[columns])
        return self._entries

    def check_listed(self) -> None:
        """ValueError for entries out of order or range, as a list made by hand may have them.

        A GPU is not waited for: there nothing is checked, nor while a graph is compiled.
        """
        if self._entries is None or self.block is not None or self.padded is not None or self.device.type != "cpu":
            return
        if torch.compiler.is_compiling():
            return
        _, tokens, features = self._entries
        if len(tokens) == 0:
            return
        places, low, high = tokens * self.shape[1] + features, *features.aminmax()
        inside = min(int(tokens[0]), int(low)) >= 0 and tokens[-1] < self.shape[0] and high < self.shape[1]
        if not (inside and (places[1:] > places[:-1]).all()):
            needed = "must lie in it, sorted by token, then feature, each once"
            raise ValueError(f"codes of shape {self.shape}: their {len(tokens)} entries {needed}")

    @property
    def values(self) -> Tensor:
        return self.entries()[0]

    @property
    def tokens(self) -> Tensor:
        return self.entries()[1]

    @property
    def features(self) -> Tensor:
        return self.entries()[2]

    @property
    def device(self) -> torch.device:
        return self._stored().device

    def _stored(self) -> Tensor:
        """The values as they are stored, 0 where nothing is kept."""
        if self.block is not None:
            return self.block.detach()
        return (self.values if self.padded is None else self.padded.values).detach()

    def count(self) -> int:
        """Number of kept entries."""
        return int(self._stored().count_nonzero())

    def l0(self) -> float:
        """Mean number of active features a token; NaN without tokens."""
        return self.count() / self.shape[0] if self.shape[0] else float("nan")

    def active_mask(self) -> Tensor:
        """bool [F]: the features with at least one kept entry."""
        mask = torch.zeros(self.shape[1] + 1, dtype=torch.bool, device=self.device)
        if self.block is not None:
            assert self.pool is not None
            mask.index_copy_(0, self.pool, (self.block.detach() != 0).any(0))
        elif self.padded is not None:
            mask.index_fill_(0, self.padded.features.long(), True)  # that of the padding falls off the end
        else:
            mask.index_fill_(0, self.features, True)
        return mask[:-1]

    def active_features(self) -> Tensor:
        """int64, ascending: the features with at least one kept entry."""
        return self.active_mask().nonzero().squeeze(1)

    def smallest(self) -> Tensor:
        """The smallest kept activation, 0-dim; inf where nothing is kept."""
        stored = self._stored()
        if stored.numel() == 0:
            return stored.new_full((), torch.inf)
        if self.least is not None:
            return self.least[0]
        return torch.where(stored > 0, stored, torch.inf).amin()

    def scaled(self, factor: Tensor) -> SparseCodes:
        """Each value times the factor of its feature, [F]; the factors get no gradient."""
        factor = factor.detach()
        if self.block is not None:
            assert self.pool is not None
            block = self.block * factor[self.pool]
            low = None if self.low_block is None else block.detach().to(self.low_block.dtype)
            return SparseCodes.from_block(block, self.pool, self.shape[1], low)
        if self.padded is not None:
            last = self.shape[1] - 1  # that of the padding, whose value is 0, may be any
            values = self.padded.values * factor[self.padded.features.clamp(max=last).long()]
            return SparseCodes.from_padded(self.padded.with_values(values), self.shape)
        codes = SparseCodes(self.values * factor[self.features], self.tokens, self.features, self.shape)
        codes.index = self.index
        return codes

    def of_first(self, n_features: int) -> SparseCodes:
        """The entries of the first so many features, of a [B, F] matrix as before."""
        n_features = check_integer("n_features", n_features, 0)
        at = (self.features < n_features).nonzero().squeeze(1)
        return SparseCodes(*self.entries().at(at), self.shape)

    def to_dense(self) -> Tensor:
        """[B, F], differentiable. Costs a full matrix."""
        values, tokens, features = self.entries()
        dense = values.new_zeros(self.shape)
        return dense.index_put((tokens, features), values)

    def to_sparse_csr(self) -> Tensor:
        """The same as `to_dense().to_sparse_csr()`, without the dense matrix; detached."""
        values, tokens, features = self.entries()
        counts = torch.bincount(tokens, minlength=self.shape[0])
        crow = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
        return torch.sparse_csr_tensor(crow, features, values.detach(), self.shape, check_invariants=False)

    def detach(self) -> SparseCodes:
        values, tokens, features = self.entries()
        return SparseCodes(values.detach(), tokens, features, self.shape)

    def __repr__(self) -> str:
        return f"SparseCodes(shape={self.shape}, kept={self.count()}, l0={self.l0():.2f})"

    def _repr_html_(self) -> str:
        """For notebooks: the first tokens, and the strongest features of each."""
        values, tokens, features = (t.detach().cpu() for t in self.entries())
        rows = []
        for token in range(min(self.shape[0], SHOWN_TOKENS)):
            here = tokens == token
            order = values[here].argsort(descending=True, stable=True)
            best = zip(features[here][order].tolist(), values[here][order].tolist())
            shown = [f"{feature}: {value:.4g}" for feature, value in list(best)[:SHOWN_FEATURES]]
            rest = len(order) - len(shown)
            rows.append((str(token), ", ".join([*shown, *([f"{rest} more"] if rest else [])])))
        more = self.shape[0] - len(rows)
        if more:
            rows.append(("...", f"{more} more tokens"))
        return html_table(repr(self), rows, ("token", "strongest features"))


@dataclass
class SampledSAEOutput:
    """What a forward pass gives.

    Attributes:
        loss: mse + aux_coefficient * aux, 0-dim; of a Matryoshka SAE with the mean over its groups in place of mse.
        mse: mean over tokens of ||x - x_hat||^2, summed over d_in, in the units that the SAE is trained in: those of
            x times `cfg.input_scale`. Of a transcoder y takes the place of x, times `cfg.output_scale`.
        aux: the dead-feature loss before its coefficient; 0 when no feature is dead and in evaluation.
        x_hat: reconstruction, of the shape of what is reconstructed and the dtype of x.
        codes: kept activations, [B, F] with the leading dimensions of x flattened.
    """

    loss: Tensor
    mse: Tensor
    aux: Tensor
    x_hat: Tensor
    codes: SparseCodes
