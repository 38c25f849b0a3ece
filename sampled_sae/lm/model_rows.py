"""`ModelRows`: a language model over rows of token ids as the source of a corpus of codes, without a store between."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from sampled_sae.lm.dropped import check_drop_tokens, dropped
from sampled_sae.lm.harvest_places import rows_digest
from sampled_sae.lm.models import check_rows, name_of, weights_digest
from sampled_sae.lm.passes import batches_at, run_at
from sampled_sae.residual_stream.blocks import check_layer
from sampled_sae.support.argument_checks import check_flag, check_integer
from sampled_sae.support.token_places import TokenPlaces, TokenShard


class ModelRows:
    """What `encode_corpus` reads: the residual stream after block `layer`, as `harvest` stores it.

    Args:
        model: causal language model or encoder; put in eval mode.
        rows: int64 [N, context] token ids.
        layer: index of the block, from 0.
        model_name, source: as recorded.
        batch_size: rows a forward pass.
        rows_per_shard: rows a shard.
        drop_first: leave out position 0 of each row.
        drop_tokens: ids that are left out wherever they stand; the model's special tokens when absent.

    Vectors of unusual norm stay: what is left out goes by place alone, so that each shard is what it is without the
    others.
    """

    def __init__(
        self,
        model: Any,
        rows: Tensor,
        layer: int,
        *,
        model_name: str | None = None,
        source: str = "",
        batch_size: int = 8,
        rows_per_shard: int = 128,
        drop_first: bool = True,
        drop_tokens: Iterable[int] | None = None,
    ) -> None:
        check_layer(model, layer)
        check_rows(model, rows)
        self.model, self.rows = model.eval(), rows
        self.rows_per_shard = check_integer("rows_per_shard", rows_per_shard, 1)
        self.layer, self.batch_size = check_integer("layer", layer, 0), check_integer("batch_size", batch_size, 1)
        self.drop_first, self.drop_tokens = check_flag("drop_first", drop_first), check_drop_tokens(model, drop_tokens)
        self.model_name, self.source = name_of(model) if model_name is None else model_name, source
        self.d_in = run_at(model, rows[:1], [self.layer])[0].shape[-1]

    @property
    def about(self) -> dict[str, Any]:
        context = self.rows.shape[1]
        return {"model": self.model_name, "layer": self.layer, "source": self.source, "context": context}

    @property
    def settings(self) -> dict[str, Any]:
        """Weights of the model, the rows, and what is left out of them."""
        return {
            "weights_sha256": weights_digest(self.model),
            "rows_sha256": rows_digest(self.rows),
            "rows_per_shard": self.rows_per_shard,
            "layer": self.layer,
            "drop_first": self.drop_first,
            "drop_tokens": self.drop_tokens,
        }

    @property
    def n_shards(self) -> int:
        return -(-len(self.rows) // self.rows_per_shard)

    def token_shard(self, i: int) -> TokenShard:
        """Activations [n, d] of the rows of one shard in float32, on the CPU."""
        first = i * self.rows_per_shard
        rows = self.rows[first : first + self.rows_per_shard]
        kept: list[Tensor] = []
        stay: list[Tensor] = []
        for batch, (x,) in batches_at([(self.model, self.layer)], rows, self.batch_size, first):
            out, _ = dropped(batch, x, self.drop_first, self.drop_tokens, math.inf)
            kept.append(x[~out].cpu())
            stay.append(~out.cpu())
        return TokenShard(torch.cat(kept), TokenPlaces.of_rows(rows, torch.cat(stay)))
