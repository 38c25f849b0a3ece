"""An SAE of others with a threshold for each feature, as one of ours, which has one for all."""

from __future__ import annotations

from pathlib import Path

from .portable import PortableSAE, Say


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
