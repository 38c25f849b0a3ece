"""The activations that a caller gives to a layer, as the layer computes with them, and back."""

from __future__ import annotations

from collections.abc import Callable
from operator import mul, truediv
from typing import NamedTuple

import torch
from torch import Tensor

from ..config import SampledSAEConfig
from ..support.argument_checks import HALF, check_activations, check_same, describe
from .layer_weights import LayerWeights


def flat_tokens(layer: LayerWeights, x: Tensor, scaled: bool) -> Tensor:
    """[B, d_in], times `cfg.input_scale`; of a crosscoder [B, layers * d_in].

    Raises:
        ValueError, TypeError: wrong shape, dtype or device, an empty batch, NaN or inf.
    """
    cfg = layer.cfg
    x = _flat(layer, x, cfg.width_in, "x", cfg.layers)
    x = x if scaled or cfg.input_scale == 1 else multiplied(x, cfg.input_scale)
    layer.memory.inputs.check(x)
    return x


def flat_encoded(layer: LayerWeights, x: Tensor, number: int, scaled: bool) -> Tensor:
    """`flat_tokens` of the x that codes of `number` tokens come from.

    Raises:
        ValueError, TypeError: as `flat_tokens`; another number of tokens.
    """
    tokens = flat_tokens(layer, x, scaled)
    if len(tokens) != number:
        raise ValueError(
            f"x={describe(x)}: has {len(tokens)} tokens, must be what was encoded, and the codes have {number}"
        )
    return tokens


class TokensAndGoal(NamedTuple):
    """tokens: [B, d_in]. goal: [B, d_out], what is to be reconstructed."""

    tokens: Tensor
    goal: Tensor


def tokens_and_goal(layer: LayerWeights, x: Tensor, target: Tensor | None, scaled: bool) -> TokensAndGoal:
    """Raises as `flat_tokens`; for a target given to an SAE, or none given to a transcoder."""
    tokens = flat_tokens(layer, x, scaled)
    return TokensAndGoal(tokens, _goal(layer, x, tokens, target, scaled))


def _goal(layer: LayerWeights, x: Tensor, tokens: Tensor, target: Tensor | None, scaled: bool) -> Tensor:
    """What is to be reconstructed, [B, d_out]: `tokens`, those of x [..., d_in], or a transcoder's target [..., d_out].

    Raises:
        ValueError, TypeError: as `flat_tokens`; a target given to an SAE, none given to a transcoder.
    """
    c = layer.cfg
    if not c.is_transcoder:
        if target is not None:
            raise ValueError("target: an SAE reconstructs x; a config with d_out makes a transcoder, which takes one")
        return tokens
    if target is None:
        raise ValueError(f"target=None: a transcoder (d_out={c.d_out}) needs what it is to reconstruct, sae(x, target)")
    must = f"target={describe(target)}: must be a tensor of shape {[*x.shape[:-1], c.width_out]}"
    if not isinstance(target, Tensor):
        raise TypeError(must)
    if target.shape != (*x.shape[:-1], c.width_out):
        raise ValueError(must)
    target = _flat(layer, target, c.width_out, "target")
    target = target if scaled or c.output_scale == 1 else target * c.output_scale
    layer.memory.targets.check(target)
    return target


def given_back(cfg: SampledSAEConfig, x_hat: Tensor, like: Tensor, scaled: bool) -> Tensor:
    """A reconstruction [B, d_out] as the caller gets it: of the dtype and the leading dimensions of `like`, and of a
    crosscoder its layers side by side or one behind the other as there."""
    x_hat = x_hat if scaled or cfg.factor_out == 1 else divided(x_hat, cfg.factor_out)
    side_by_side = cfg.is_crosscoder and like.shape[-1] == cfg.d_in
    return x_hat.to(like.dtype).view(like.shape if side_by_side else (*like.shape[:-1], cfg.width_out))


def leading(cfg: SampledSAEConfig, x: Tensor) -> torch.Size:
    """The dimensions of x that count tokens."""
    return x.shape[:-2] if cfg.is_crosscoder and x.shape[-1] == cfg.d_in else x.shape[:-1]


def multiplied(x: Tensor, scale: float | tuple[float, ...]) -> Tensor:
    """x [..., layers * d] times a factor for all of its numbers, or one for each layer; in its dtype, rounded once."""
    return _layer_by_layer(mul, x, scale)


def divided(x: Tensor, scale: float | tuple[float, ...]) -> Tensor:
    """The inverse of `multiplied`."""
    return _layer_by_layer(truediv, x, scale)


def _layer_by_layer(
    operation: Callable[[Tensor, float], Tensor], x: Tensor, scale: float | tuple[float, ...]
) -> Tensor:
    if not isinstance(scale, tuple):
        return operation(x, scale)
    parts = x.unflatten(-1, (len(scale), -1)).unbind(-2)
    return torch.cat([operation(part, factor) for part, factor in zip(parts, scale)], dim=-1)


def _flat(layer: LayerWeights, x: Tensor, width: int, name: str, layers: int = 1) -> Tensor:
    if layers > 1 and isinstance(x, Tensor) and x.ndim > 1 and x.shape[-2:] == (layers, width // layers):
        x = x.flatten(-2)
    elif layers > 1 and isinstance(x, Tensor) and x.shape[-1:] != (width,):
        raise ValueError(
            f"{name}.shape={tuple(x.shape)}: the last dimensions must be [layers={layers}, d_in={width // layers}], or "
            f"one of {width}, the layers one behind the other"
        )
    check_activations(x, width, name, may_be_empty=layer.layout.size > 1)
    if x.dtype in HALF and layer.W_enc.dtype == torch.float32 and torch.is_autocast_enabled(x.device.type):
        x = x.float()
    check_same(**{name: x, "W_enc": layer.W_enc})
    return x.reshape(-1, width)
