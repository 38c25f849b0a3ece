"""The norms of decoder rows, which training keeps: of one layer the row's is 1, of several theirs add up to 1.

W_dec is [F, layers * d]; a feature's rows of its layers stand side by side. What is done for several layers is, for
one, what is done for unit rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

TINY = 1e-12


def layer_norms(W: Tensor, layers: int) -> Tensor:
    """[F, layers]; equivalent to `W.view(F, layers, -1).norm(dim=2)`."""
    return torch.linalg.vector_norm(_by_layer(W, layers), dim=2)


def normalize_(W: Tensor, layers: int) -> Tensor:
    """W, each row divided by the sum of its layers' norms, in place."""
    norms = layer_norms(W, layers)
    return W.div_((norms if layers == 1 else norms.sum(1, keepdim=True)).clamp_min_(TINY))


def without_growth(grad: Tensor, W: Tensor, layers: int) -> Tensor:
    """The gradient of rows W, both [T, layers * d], without the part that changes the sum of the layers' norms.

    With u the rows of W, each layer's of unit norm, `grad - (grad * u).sum(1, keepdim=True) / layers * u`.
    """
    unit = torch.nn.functional.normalize(_by_layer(W, layers), dim=2, eps=TINY).view(W.shape)
    return grad - (grad * unit).sum(1, keepdim=True) / layers * unit


def _by_layer(W: Tensor, layers: int) -> Tensor:
    """[F, layers, d], of no rows too."""
    return W.reshape(len(W), layers, W.shape[1] // layers)
