"""Where the features of a crosscoder live: how their decoder norms spread over its layers, as numbers and as PNG."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..sae import SampledSAE
from ..support.argument_checks import check_integer
from ..support.figures import new_figure, save_figure

PLOT = "layers.png"
BINS = 50


@torch.no_grad()
def layer_shares(sae: SampledSAE) -> Tensor:
    """[d_sae, layers], on the CPU: the share that each layer has of a feature's decoder norms; its layers add up to 1.

    Equivalent to `sae.layer_norms() / sae.layer_norms().sum(1, keepdim=True)`. A feature without any row has 0.

    Raises:
        ValueError: an SAE of one layer.
    """
    if not sae.cfg.is_crosscoder:
        raise ValueError(f"layers={sae.cfg.layers}: is an SAE of one layer, where all of each feature is")
    norms = sae.layer_norms().cpu()
    return norms / norms.sum(1, keepdim=True).clamp_min(torch.finfo(norms.dtype).tiny)


@torch.no_grad()
def layer_cosines(sae: SampledSAE, a: int, b: int) -> Tensor:
    """[d_sae], on the CPU: the cosine between a feature's decoder rows in the layers a and b, from 0; 0 without one.

    Raises:
        ValueError, TypeError: a layer that it has not.
    """
    layers = [check_integer(name, i, 0) for name, i in (("a", a), ("b", b))]
    for name, i in zip("ab", layers):
        if i >= sae.cfg.layers:
            raise ValueError(f"{name}={i}: must be below layers={sae.cfg.layers}")
    W = sae.layout.whole(sae.W_dec).float().view(sae.cfg.d_sae, sae.cfg.layers, -1)
    return torch.nn.functional.cosine_similarity(W[:, layers[0]], W[:, layers[1]], dim=1, eps=1e-12).cpu()


class LayerSpread(NamedTuple):
    """Of the features that are not dead, on the CPU.

    Attributes:
        shares: [n, layers], as of `layer_shares`.
        cosines: [n], as of `layer_cosines`, between the first two layers.
    """

    shares: Tensor
    cosines: Tensor

    @classmethod
    def of(cls, sae: SampledSAE) -> LayerSpread:
        alive = ~sae.dead.cpu()
        return cls(layer_shares(sae)[alive], layer_cosines(sae, 0, 1)[alive])


def layer_names(manifest: dict[str, Any], layers: int) -> list[str]:
    """What tells the layers of a stack apart, by what the manifest of its activations says of each."""
    about = manifest.get("layers") or []
    for part, word in (("layer", "layer "), ("point", ""), ("model", ""), ("source", "")):
        said = [each.get(part) for each in about]
        if len(set(said)) == len(said) == layers and None not in said:
            return [f"{word}{Path(str(each)).name}" for each in said]
    return [str(i) for i in range(layers)]


def plot_layers(spread: LayerSpread, folder: Path, names: list[str]) -> Path:
    """Writes layers.png; returns its path.

    Of two layers a histogram of the second's share, and the cosine of the two rows against it: features of one alone
    stand at the ends. Of more, the shares of all features, ordered by where they are on average, and each layer's mean.

    Raises:
        ImportError: when matplotlib is missing, saying what to install.
    """
    shares, layers = spread.shares, range(spread.shares.shape[1])
    figure = new_figure(10.4, 4.2)
    left, right = (figure.add_subplot(1, 2, i) for i in (1, 2))
    names = [name.replace("$", r"\$") for name in names]
    if len(layers) == 2:
        share = shares[:, 1].numpy()
        left.hist(share, [i / BINS for i in range(BINS + 1)], color="tab:blue")
        right.scatter(share, spread.cosines.numpy(), s=4, alpha=0.4, color="tab:gray")
        for axis, label in ((left, "features"), (right, "cosine of the two decoder rows")):
            axis.set(xlabel=f"share of {names[1]} in the decoder norms of {names[0]} and {names[1]}", ylabel=label)
            axis.set_xlim(0, 1)
        right.set_ylim(-1.02, 1.02)
    else:
        place = (shares * torch.arange(len(layers))).sum(1)
        image = left.imshow(shares[place.argsort()].numpy(), aspect="auto", interpolation="nearest", vmin=0, vmax=1)
        figure.colorbar(image, ax=left, label="share of the decoder norms")
        left.set_xticks(layers, names)
        left.set(ylabel="features, by their mean place")
        right.bar(layers, shares.mean(0).numpy(), color="tab:blue")
        right.set_xticks(layers, names)
        right.set(ylabel="mean share of a feature")
        right.axhline(1 / len(layers), color="black", linestyle=":", linewidth=1)
    return save_figure(figure, folder / PLOT)
