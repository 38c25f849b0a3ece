"""Decoder rows that begin at tokens of the training, in place of random directions."""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import SampledSAEConfig
from ..impl.decoder_rows import layer_norms
from ..impl.start import geometric_median
from ..sae import SampledSAE
from .feed import CALIBRATION_TOKENS, Feed
from .train_config import TrainConfig


def starts_at_tokens(train: TrainConfig, config: SampledSAEConfig, feed: Feed, init_from: SampledSAE | None) -> bool:
    """Whether decoder rows begin at tokens.

    Raises:
        ValueError: they should, and the weights come from elsewhere, or the tokens go by once.
    """
    if train.decoder_start == "random":
        return False
    reason = None
    if init_from is not None:
        reason = "init_from brings a decoder"
    elif config.is_transcoder:
        reason = "the decoder of a transcoder begins at its targets"
    elif feed.is_streamed:
        reason = f"{feed.store.where} is read once, from its beginning: harvest a store of it"
    if reason is not None:
        raise ValueError(f"decoder_start={train.decoder_start!r}: must be 'random', since {reason}")
    return True


@torch.no_grad()
def begin_at_tokens(sae: SampledSAE, feed: Feed) -> None:
    """Decoder rows become the unit vectors from what b_dec begins as to tokens of the training, encoder columns those
    rows; a crosscoder's of all its layers, divided and multiplied as docs/method.md says ("Start").

    Tokens are drawn by the seed of the SAE from the first of the training, none twice. Rows beyond them stay random.
    """
    F = sae.cfg.d_sae
    tokens = feed.first_tokens(max(F, CALIBRATION_TOKENS))
    origin = geometric_median(tokens[: feed.stream.batch_size])
    rows = _directions(tokens, origin, F, sae.cfg.seed).to(sae.W_dec)
    norms = layer_norms(rows, sae.cfg.layers).sum(1, keepdim=True)
    sae.W_dec[: len(rows)] = rows / norms
    sae.W_enc[:, : len(rows)] = (rows * norms).T


def _directions(tokens: Tensor, origin: Tensor, most: int, seed: int) -> Tensor:
    """Unit vectors [at most `most`, d] from the origin to tokens; features that begin alike would stay alike."""
    draw = torch.Generator().manual_seed(seed)
    drawn = tokens[torch.randperm(len(tokens), generator=draw)[:most]]
    # in ascending order, which the groups of a Matryoshka SAE must not follow
    distinct = drawn.unique(dim=0)
    distinct = distinct[torch.randperm(len(distinct), generator=draw)] - origin
    return torch.nn.functional.normalize(distinct[distinct.norm(dim=1) > 0], dim=1)
