"""What a batch goes through in a layer: the encoder of its tokens, their pool and their selection."""

from __future__ import annotations

import torch
from torch import Tensor

from ..codes import SparseCodes
from . import inference_rule
from .encoder import Encoder, Share
from .given_tokens import flat_tokens, tokens_and_goal
from .hints import Rule
from .inference_rule import Inference
from .interface import Implementation, resolve_impl
from .layer_weights import LayerWeights
from .layout import Leaves
from .pool import Pool, PoolRule


class LayerParts(LayerWeights):
    """Weights, and the parts of the implementation in use, called on them with one batch.

    Attributes:
        generator: of pools that are drawn.
    """

    generator: torch.Generator

    @property
    def impl_in_use(self) -> str:
        """The implementation that `cfg.impl` stands for on this device."""
        return resolve_impl(self.cfg.impl, self.W_enc.device, self.W_enc.dtype)

    @property
    def _parts(self) -> Implementation:
        return self.layout.parts(self.impl_in_use)

    def _batch(self, x: Tensor, target: Tensor | None, scaled: bool, leaves: Leaves) -> tuple[Tensor, Encoder]:
        """What is to be reconstructed [B, d_out], and the encoder of x; those of all processes are one batch."""
        given, share = self.layout.read(lambda: tokens_and_goal(self, x, target, scaled))
        return given.goal, self._encoder(given.tokens, leaves, share)

    def _encoder(self, tokens: Tensor, leaves: Leaves, share: Share | None) -> Encoder:
        """Of tokens [B, d_in] as `flat_tokens` gives them, and of what they are a share."""
        b_dec = leaves.b_in if self.cfg.apply_b_dec_to_input else None
        x, weights = self.layout.into_encoder(tokens), (leaves.W_enc, leaves.b_enc, b_dec)
        screen = self.layout.screen(self.cfg.screen, self.impl_in_use, share)
        return self._parts.encoder(x, *weights, rows=leaves.rows, screen=screen).of_share(share)

    def _encoder_of(self, x: Tensor, scaled: bool = False, by_batch: bool = False) -> Encoder:
        """by_batch: the tokens of all processes are one batch; else each of them stands alone."""
        leaves = self.layout.leaves(self, keep_rows=False)
        (tokens,), share = self.layout.read(lambda: (flat_tokens(self, x, scaled),), by_batch)
        return self._encoder(tokens, leaves, share)

    def _find_pool(self, encoder: Encoder) -> Pool | None:
        return self.memory.pool.find(self._parts, encoder.operands, PoolRule.of(self.cfg), self.generator)

    def _select(self, encoder: Encoder, inference: Inference | None = None) -> SparseCodes:
        """By `inference`; by that of evaluation mode where None, which warns of a threshold not to be relied on."""
        found = inference or inference_rule.of_evaluation(self, self.cfg)
        if found.mode == "token":
            return self._parts.select(encoder, None, Rule(self.cfg.k, "token"))
        if found.mode == "batch":
            return self._select_together(encoder)
        if inference is None:
            self._warn_before_use()
        return self._parts.above_threshold(encoder, found.floors)

    def _select_together(self, encoder: Encoder) -> SparseCodes:
        """What training mode keeps of a batch."""
        pool = self._find_pool(encoder)
        rule = Rule(self.cfg.k, self.cfg.select)
        if pool is None:
            return self._parts.select(encoder, None, rule, self.memory.hints)
        return self._parts.select(pool.of(encoder), pool.members, rule, self.memory.hints)
