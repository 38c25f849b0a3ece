"""`SampledSAEOutput`: what a forward pass gives."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .codes import SparseCodes


@dataclass
class SampledSAEOutput:
    """What a forward pass gives.

    Attributes:
        loss: mse + aux_coefficient * aux, 0-dim.
        mse: mean over tokens of ||x - x_hat||^2, summed over d_in, in the units that the SAE is trained in: those of
            x times `cfg.input_scale`.
        aux: the dead-feature loss before its coefficient; 0 when no feature is dead and in evaluation.
        x_hat: reconstruction, the shape and dtype of x.
        codes: kept activations, [B, F] with the leading dimensions of x flattened.
    """

    loss: Tensor
    mse: Tensor
    aux: Tensor
    x_hat: Tensor
    codes: SparseCodes
