"""Encode and decode at listed entries, with gradients: cost k gathered rows a token instead of a product.

Weight gradients are sums over the entries of one feature: a sparse matrix of the entries sorted by feature, times the
tokens, into memory that serves again. Value gradients are a sampled product (one dot product an entry, nothing
gathered).
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from ...codes import Entries, SparseCodes
from ...support.once_differentiable import once_differentiable
from ...support.reused_memory import Workspace
from ..encoder import Encoder
from ..row_gradients import RowSource
from .products import ends_of_tokens, gathered_sums, sampled_product, sums_of_rows


class EntryIndex:
    """Where the kept entries lie: int64 tokens [n] and features [n], sorted by token, and their orders."""

    def __init__(self, tokens: Tensor, features: Tensor, n_tokens: int, n_features: int, workspace: Workspace) -> None:
        self.tokens, self.features = tokens, features
        self.workspace = workspace
        self.n_tokens, self.n_features = n_tokens, n_features

    @cached_property
    def token_ends(self) -> Tensor:
        """[B + 1] offsets of each token's entries."""
        return ends_of_tokens(self.tokens, self.n_tokens)

    @cached_property
    def feature_ends(self) -> Tensor:
        """[F + 1] offsets of each feature's entries in the order by feature."""
        return ends_of_tokens(self.features, self.n_features)

    @cached_property
    def by_feature(self) -> tuple[Tensor, Tensor, Tensor]:
        """(order, touched features ascending [T], offsets [T + 1] of their entries in that order).

        When most features are touched all count as such: rows of zeros cost less than gathering the others.
        """
        order, ends = torch.argsort(self.features.int(), stable=True), self.feature_ends
        touched = ends.diff().nonzero().squeeze(1)
        if 2 * len(touched) > self.n_features:
            return order, torch.arange(self.n_features, device=ends.device), ends
        return order, touched, torch.cat((ends[touched], ends[-1:]))

    @cached_property
    def tokens_by_feature(self) -> Tensor:
        return self.tokens.index_select(0, self.by_feature[0])

    @property
    def touched(self) -> Tensor:
        return self.by_feature[1]

    def sum_by_token(self, weights: Tensor, W: Tensor) -> Tensor:
        """sum_j weights_ij W_j, [B, d]."""
        if W.dtype != weights.dtype:
            return gathered_sums(weights, W, self.token_ends, self.features)
        return embedding_bag(self.features, W, self.token_ends[:-1], mode="sum", per_sample_weights=weights)

    def sum_by_feature(self, weights: Tensor, source: Tensor) -> Tensor:
        """sum_i weights_ij source_i for each touched feature, [T, d]."""
        order, touched, ends = self.by_feature
        out = self.workspace.empty(source, len(touched), source.shape[1])
        return sums_of_rows(source, self.tokens_by_feature, weights.index_select(0, order), ends, out)

    def sum_entries(self, weights: Tensor) -> Tensor:
        """sum_i weights_ij for every feature, [F]."""
        return weights.new_zeros(self.n_features).index_add_(0, self.features, weights)

    def sum_touched(self, sums: Tensor, W: Tensor) -> Tensor:
        """sum_j sums_j W_j over the touched features, [d]; `sums` [F] is zero elsewhere."""
        if W.dtype == sums.dtype and 4 * len(self.touched) > self.n_features:
            return sums @ W
        return sums[self.touched] @ W[self.touched].to(sums.dtype)

    def dots(self, left: Tensor, W: Tensor) -> Tensor:
        """left_i . W_j at each entry (i, j), [n]; left [B, d] contiguous."""
        if W.dtype != left.dtype:
            return sampled_product(left, W, self.token_ends, self.features)
        # by feature: rows of W are far more than a cache holds, and so each is read once
        products = sampled_product(W, left, self.feature_ends, self.tokens_by_feature)
        return torch.empty_like(products).index_copy_(0, self.by_feature[0], products)


def entry_codes(encoder: Encoder, found: Entries) -> SparseCodes:
    """Selected entries, sorted by token, with their gradient attached."""
    x, W, b, b_dec, _, rows, operands = encoder
    codes = SparseCodes(*found, encoder.shape)
    index = entry_index(codes, rows)
    if torch.is_grad_enabled():
        W_rows = receiver(rows, "W_enc", W, index, operands.x.dtype)
        b_rows = receiver(rows, "b_enc", b, index, operands.x.dtype)
        values = EncodeEntries.apply(
            x, b_dec, W_rows, b_rows, found.values, operands.x, operands.W, operands.scale, index
        )
        codes = SparseCodes(values, found.tokens, found.features, codes.shape)
        codes.index = index
    return codes


def decode_entries(codes: SparseCodes, W_dec: Tensor, rows: RowSource) -> Tensor:
    """sum_j c_ij W_dec_j, [B, d]."""
    index = entry_index(codes, rows)
    W_rows = receiver(rows, "W_dec", W_dec, index, codes.values.dtype)
    return DecodeEntries.apply(codes.values, W_rows, W_dec.detach(), index)


def receiver(rows: RowSource, name: str, W: Tensor, index: EntryIndex, dtype: torch.dtype) -> Tensor | None:
    """Where the gradient of the touched rows goes; None where it is not asked for, and nothing is sorted for it."""
    wanted = W.requires_grad and torch.is_grad_enabled()
    return rows.receiver(name, W, index.touched, dtype) if wanted else None


def entry_index(codes: SparseCodes, rows: RowSource) -> EntryIndex:
    """The codes' index, made once."""
    if codes.index is None:
        codes.index = EntryIndex(codes.tokens, codes.features, *codes.shape, rows.workspace)
    return codes.index


class EncodeEntries(torch.autograd.Function):
    """The kept activations, as functions of x [B, d], b_dec [d] or None, and rows of W_enc and b_enc.

    `W_rows` [T, d] and `b_rows` [T] receive the gradients of the touched features (row_gradients.py); their values are
    not read, for the kept activations were computed by the selection.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        b_dec: Tensor | None,
        W_rows: Tensor | None,
        b_rows: Tensor | None,
        values: Tensor,
        centred: Tensor,
        W: Tensor,
        scale: Tensor | None,
        index: EntryIndex,
    ) -> Tensor:
        ctx.save_for_backward(centred, W, scale)
        ctx.index = index
        ctx.dtypes = x.dtype, None if b_dec is None else b_dec.dtype
        return values.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        centred, W, scale = ctx.saved_tensors
        index: EntryIndex = ctx.index
        if scale is not None:
            grad = grad * scale[index.features].to(grad.dtype)
        dx = db_dec = dW_rows = db_rows = None
        _, wants_b_dec, _, wants_b, *_ = ctx.needs_input_grad
        sums = index.sum_entries(grad) if wants_b_dec or wants_b else grad
        if ctx.needs_input_grad[0]:
            dx = index.sum_by_token(grad, W).to(ctx.dtypes[0])
        if wants_b_dec:
            db_dec = -index.sum_touched(sums, W).to(ctx.dtypes[1])
        if ctx.needs_input_grad[2]:
            dW_rows = index.sum_by_feature(grad, centred)
        if wants_b:
            db_rows = sums[index.touched]
        return dx, db_dec, dW_rows, db_rows, None, None, None, None, None


class DecodeEntries(torch.autograd.Function):
    """sum_j values_ij W_dec_j, [B, d]; `W_rows` [T, d] receives the touched rows' gradient."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, W_rows: Tensor | None, W_dec: Tensor, index: EntryIndex) -> Tensor:
        ctx.save_for_backward(values, W_dec)
        ctx.index = index
        return index.sum_by_token(values, W_dec)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        values, W_dec = ctx.saved_tensors
        index: EntryIndex = ctx.index
        grad = grad.contiguous()
        dvalues = index.dots(grad, W_dec) if ctx.needs_input_grad[0] else None
        dW_rows = index.sum_by_feature(values, grad) if ctx.needs_input_grad[1] else None
        return dvalues, dW_rows, None, None
