"""The layer's parts over a mesh: each has the signature of one process's (impl/interface.py), and is made of those.

Operands hold the tokens and the features that are here, and say of what they are a share.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..codes import Entries, SparseCodes
from ..impl.column_bounds import ColumnBounds
from ..impl.encoder import Encoder, Operands
from ..impl.hints import Rule, ThresholdHints
from ..impl.interface import Implementation
from ..impl.ranking import keys_of
from ..impl.row_gradients import RowSource
from ..impl.torch.scores import finish_scores
from .bounds_on_device import SpreadBounds
from .gradients import SpreadRows
from .mesh import Mesh
from .ranking import SpreadRanking
from .ranks import SumForward
from .selection import find_cut, keep_of_block, keep_of_entries, keep_of_tokens, sort_bits, table_of
from .totals import SpreadTotals
from .weights import Weights


class SpreadParts:
    """local: the parts of one process. waits: whether they may ask a device for values that decide what comes next."""

    def __init__(
        self, local: Implementation, weights: Weights, mesh: Mesh, own_hints: ThresholdHints, waits: bool
    ) -> None:
        self.local, self.weights, self.mesh, self.waits = local, weights, mesh, waits
        self.totals, self.ranking = SpreadTotals(mesh), SpreadRanking(weights, mesh, waits)
        self.own_hints = own_hints

    def column_scores(self, operands: Operands, score: str) -> Tensor:
        """[F], of the features here over the tokens of all."""
        assert self.local.column_statistics is not None
        statistics = self.local.column_statistics(operands, score)
        return finish_scores(self.mesh.data.sum_(statistics, "column statistics"), score)

    def column_bounds(self, operands: Operands, score: str) -> ColumnBounds | SpreadBounds | None:
        """Of the features here, over the tokens of all; not finite where some process knows nothing."""
        seen = None if self.local.seen_columns is None else self.local.seen_columns(operands, score)
        if seen is None or operands.screen is None:
            return None
        ranks, purpose = self.mesh.data, "column statistics"
        if seen.are_flags:
            least = most = ranks.max_(seen.numbers, purpose)
        else:
            least, most = ranks.between(seen.numbers, purpose)
        low, high = seen.bounds(least, most)
        full = operands.in_full()
        if not self.waits:
            return SpreadBounds(low, high, full, score, operands.screen.looks, self.ranking, self.mesh)
        return ColumnBounds(
            low, high, lambda at: self.column_scores(full.of_features(at), score), operands.screen.looks
        )

    def candidate_pool(
        self, scores: Tensor, size: int, pool: str = "top", generator: torch.Generator | None = None
    ) -> Tensor:
        """int64, ascending: which of the features here, of scores [F], are among the `size` of all."""
        if self.mesh.feature.size == 1:
            return self.local.candidate_pool(scores, size, pool, generator)
        noise = self.ranking.noise(scores, generator) if pool == "sample" else None
        return self.ranking.largest(keys_of(scores, noise), size)

    def select(
        self, encoder: Encoder, members: Tensor | None, rule: Rule, hints: ThresholdHints | None = None
    ) -> SparseCodes:
        """What of the tokens and features here is kept; members: of the pool, those here."""
        operands, rows = encoder.operands.among(members), encoder.rows
        assert self.local.use_block is not None
        as_block = members is not None and self.local.use_block(len(members), rule.k, self.weights.n_local)
        if as_block and members is not None and isinstance(rows, SpreadRows):
            rows.aside.shared[id(members)] = members
        if rule.select == "token":
            if self.mesh.feature.size == 1 and operands.n_tokens > 0:
                return self._noted(encoder, members, self.local.select(encoder, members, rule, self.own_hints))
            return self._by_token(encoder, operands, rule, as_block)
        return self._by_batch(encoder, operands, rule, hints if hints is not None else ThresholdHints(), as_block)

    def _by_batch(
        self, encoder: Encoder, operands: Operands, rule: Rule, hints: ThresholdHints, as_block: bool
    ) -> SparseCodes:
        n = rule.budget(operands.whole_shape[0])
        rule, members = rule._replace(most=n), operands.members
        # also of a block: other processes may have members too many for one, and all search anew or none
        hint = hints.of(rule, members) if self.waits else None
        hint = None if isinstance(hint, Tensor) else hint
        codes, found = self._candidates(encoder, operands, rule, hint, as_block)
        bits = sort_bits(found.values)
        cut = find_cut(bits, n, self.mesh)
        if hint is not None and value_of(cut.bits, found.values.dtype) < hint:
            # what is kept reaches below the hint, and lists that start there may lack some of it
            codes, found = self._candidates(encoder, operands, rule, None, as_block)
            bits = sort_bits(found.values)
            cut = find_cut(bits, n, self.mesh)
        if self.waits:
            # a budget of 0 has a cut above every number, which is none to start from
            known = n > 0 and cut.bits > 0
            hints.keep(rule, members, 0.9 * value_of(cut.bits, found.values.dtype) if known else None)
        if codes is not None:
            return masked(codes, keep_of_block(bits, cut, self.mesh))
        kept = keep_of_entries(bits, found.tokens, operands.n_tokens, cut, self.mesh)
        return self._encode_at(encoder, operands, found, kept)

    def _by_token(self, encoder: Encoder, operands: Operands, rule: Rule, as_block: bool) -> SparseCodes:
        k = int(rule.k)
        codes, found = self._candidates(encoder, operands, rule, None, as_block)
        if codes is None:
            table = table_of(found.values, found.tokens, operands.n_tokens, k)
        else:
            table = found.values.topk(min(k, found.values.shape[1]), dim=1).values
            table = torch.nn.functional.pad(table, (0, k - table.shape[1]))
        cut, ties = keep_of_tokens(table.contiguous(), k, self.mesh)
        if codes is not None:
            tied = (found.values == cut[:, None]) & (found.values > 0)
            return masked(codes, (found.values > cut[:, None]) | (tied & (tied.cumsum(1) <= ties[:, None])))
        tokens = found.tokens.long().clamp(max=operands.n_tokens - 1)
        tied = (found.values == cut[tokens]) & (found.values > 0)
        of_token = tied.new_zeros(operands.n_tokens, dtype=torch.int64).index_add_(0, tokens, tied.long())
        rank = tied.cumsum(0) - (of_token.cumsum(0) - of_token)[tokens]
        return self._encode_at(encoder, operands, found, (found.values > cut[tokens]) | (tied & (rank <= ties[tokens])))

    def _candidates(
        self, encoder: Encoder, operands: Operands, rule: Rule, hint: float | None, as_block: bool
    ) -> tuple[SparseCodes | None, Entries]:
        """Entries here that may be kept: codes of a block, whose values [B, P] stand in the entries; or a list."""
        if as_block:
            codes = self.local.select(encoder, operands.members, rule)
            assert codes.block is not None
            nothing = codes.block.new_zeros(0).long()
            return codes, Entries(codes.block.detach(), nothing, nothing)
        assert self.local.search is not None
        return None, self.local.search(operands, rule, hint)

    def _encode_at(self, encoder: Encoder, operands: Operands, found: Entries, kept: Tensor) -> SparseCodes:
        """Codes of the entries that are kept."""
        assert self.local.take_kept is not None
        codes = self.local.encode_at(encoder, self.local.take_kept(found, kept, *encoder.shape))
        return self._noted(encoder, operands.members, codes)

    def _noted(self, encoder: Encoder, members: Tensor | None, codes: SparseCodes) -> SparseCodes:
        """The codes, whose gradients are among those of the members: so on every process, also one without tokens."""
        rows = encoder.rows
        if codes.block is None and members is not None and isinstance(rows, SpreadRows) and rows.aside.pending:
            touched = codes.index.touched if codes.padded is None else codes.padded.rows
            rows.aside.among[id(touched)] = members
        return codes

    def decode(self, codes: SparseCodes, W_dec: Tensor, b_dec: Tensor | None, rows: RowSource | None = None) -> Tensor:
        """[B, d], of the entries of all processes of `feature`."""
        if self.mesh.feature.size == 1:
            return self.local.decode(codes, W_dec, b_dec, rows)
        part = self.local.decode(codes, W_dec, None, rows)
        x_hat: Tensor = SumForward.apply(part, self.mesh.feature, "decode")
        return x_hat if b_dec is None else x_hat + b_dec.to(x_hat.dtype)

    def decode_levels(
        self,
        codes: SparseCodes,
        W_dec: Tensor,
        b_dec: Tensor | None,
        groups: Sequence[int],
        rows: RowSource | None = None,
    ) -> Tensor:
        """[B, G, d], of the entries of all processes of `feature`; `groups` count the features of all."""
        if self.mesh.feature.size == 1:
            return self.local.decode_levels(codes, W_dec, b_dec, groups, rows)
        part = self.local.decode_levels(codes, W_dec, None, [g - self.weights.first for g in groups], rows)
        levels: Tensor = SumForward.apply(part, self.mesh.feature, "decode")
        return levels if b_dec is None else levels + b_dec.to(levels.dtype)


def masked(codes: SparseCodes, kept: Tensor) -> SparseCodes:
    """Of a block [B, P] the kept entries."""
    assert codes.block is not None
    assert codes.pool is not None
    low = codes.low_block
    if low is not None and low.numel() > 0:
        low = torch.where(kept, low, 0)
    return SparseCodes.from_block(torch.where(kept, codes.block, 0), codes.pool, codes.shape[1], low)


def value_of(bits: Tensor, dtype: torch.dtype) -> float:
    """The inverse of `sort_bits`."""
    integers = torch.int64 if dtype == torch.float64 else torch.int32
    return float(bits.to(integers).view(dtype))
