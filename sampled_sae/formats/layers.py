"""A crosscoder between two formats: a `PortableSAE` whose weights have the layers one behind the other."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..impl.decoder_rows import layer_norms

if TYPE_CHECKING:
    from .portable import PortableSAE

Scale = float | tuple[float, ...]


def scaled_by_layer(sae: PortableSAE, scale: Scale) -> PortableSAE:
    """The same crosscoder, to be fed activations times `scale`, of which each layer may have its own.

    Its codes stay: encoder weights are divided by what a layer's factor is of the one before, decoder rows and b_dec
    are multiplied by it.

    Raises:
        ValueError: a tensor that leaves the range of its dtype.
    """
    if scale == sae.input_scale:
        return sae
    new, old = (_by_number(sae, each) for each in (scale, sae.input_scale))
    moved: dict[str, Any] = {
        "W_enc": (sae.W_enc.double() * (old / new)[:, None]).to(sae.dtype),
        "W_dec": (sae.W_dec.double() * (new / old)).to(sae.dtype),
        "b_dec": (sae.b_dec.double() * (new / old)).to(sae.dtype),
    }
    for name, t in moved.items():
        if not torch.isfinite(t).all():
            raise ValueError(f"scale: {name} for activations times {scale} leaves the range of {t.dtype}")
    return replace(sae, **moved, input_scale=scale)


def _by_number(sae: PortableSAE, scale: Scale) -> Tensor:
    """The factor of each number that the encoder reads: float64 [layers * d_in]."""
    each = scale if isinstance(scale, tuple) else (scale,) * sae.layers
    return torch.tensor(each, dtype=torch.float64).repeat_interleave(sae.d_in // sae.layers)


def norm_sums(sae: PortableSAE) -> Tensor:
    """Of each feature the sum of its decoder rows' norms over the layers: float64 [d_sae]."""
    return layer_norms(sae.W_dec.double(), sae.layers).sum(1)


def divided_by(sae: PortableSAE, norms: Tensor) -> PortableSAE:
    """The same function with decoder rows divided by `norms` > 0, float64 [d_sae], and codes multiplied by them."""
    return replace(
        sae,
        W_enc=(sae.W_enc.double() * norms).to(sae.dtype),
        b_enc=(sae.b_enc.double() * norms).to(sae.dtype),
        W_dec=(sae.W_dec.double() / norms[:, None]).to(sae.dtype),
    )


def uncentred(sae: PortableSAE) -> PortableSAE:
    """The same function of an input from which nothing is subtracted: b_enc - b_dec W_enc in place of b_enc."""
    b_enc = (sae.b_enc.double() - sae.b_dec.double() @ sae.W_enc.double()).to(sae.dtype)
    return replace(sae, b_enc=b_enc, apply_b_dec_to_input=False)
