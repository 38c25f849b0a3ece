"""A `PortableSAE` between two formats: the same function in other words, of a crosscoder layer by layer.

The weights of a crosscoder have its layers one behind the other.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..impl.decoder_rows import layer_norms

if TYPE_CHECKING:
    from .portable import PortableSAE, Say

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


def with_one_threshold(portable: PortableSAE, weights: Path, rescale: bool, say: Say) -> PortableSAE:
    """`portable`, with its features rescaled where `rescale` allows it and they need it.

    Raises:
        ValueError: they need it and may not be, or cannot; names the file `weights`.
    """
    if portable.threshold is None or portable.threshold.dim() == 0:
        return portable
    if not rescale:
        low, high = float(portable.threshold.min()), float(portable.threshold.max())
        raise ValueError(
            f"{weights}: threshold of each feature, {low:.4g} to {high:.4g}, and a SampledSAE has one for all; "
            "rescale_features=True (--rescale-features) makes them one by changing the units of the codes"
        )
    say("features are rescaled to one threshold: the units of the codes and the decoder norms change")
    return portable.one_threshold()
