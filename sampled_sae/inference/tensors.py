"""The tensors of an SAE that is only used: which a rule needs, of which shape and dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from ..support.argument_checks import FLOATS, bad_values, describe
from .config import InferenceConfig

WEIGHTS = ("W_enc", "W_dec", "W_skip")


def shapes_of(cfg: InferenceConfig) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor by name."""
    n_features = (cfg.d_sae,)
    shapes: dict[str, tuple[int, ...]] = {"W_enc": (cfg.d_in, cfg.d_sae), "W_dec": (cfg.d_sae, cfg.width_out)}
    shapes["b_dec"] = (cfg.width_out,)
    if cfg.rule == "gated":
        shapes |= dict.fromkeys(("b_gate", "b_mag", "r_mag"), n_features)
    else:
        shapes["b_enc"] = n_features
    if cfg.rule in ("jumprelu", "threshold"):
        shapes["threshold"] = n_features if cfg.rule == "jumprelu" else ()
    if cfg.skip:
        shapes["W_skip"] = (cfg.width_out, cfg.d_in)
    return shapes


def prepared(cfg: InferenceConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as the forms read them, but for how W_enc lies: W_dec contiguous, vectors of at least float32.

    What is so already is not copied.

    Raises:
        ValueError, TypeError: a missing, unknown or misshapen tensor, one with NaN, an infinite one other than a
            threshold; weights of several dtypes or devices.
    """
    shapes = shapes_of(cfg)
    unknown, missing = sorted(set(tensors) - set(shapes)), sorted(set(shapes) - set(tensors))
    if unknown or missing:
        raise ValueError(f"tensors: unknown {unknown}, missing {missing}; rule={cfg.rule!r} has {sorted(shapes)}")
    for name, shape in shapes.items():
        t = tensors[name]
        if not isinstance(t, Tensor) or tuple(t.shape) != shape:
            raise ValueError(f"{name}={describe(t)}: must be a tensor of shape {list(shape)}")
        if t.dtype not in FLOATS:
            raise TypeError(f"{name}.dtype={t.dtype}: must be one of {', '.join(map(str, FLOATS))}")
        if t.device != tensors["W_enc"].device:
            raise ValueError(f"{name}.device={t.device}: W_enc is on {tensors['W_enc'].device}; all must share one")
        if name in WEIGHTS and t.dtype != tensors["W_enc"].dtype:
            raise ValueError(
                f"{name}.dtype={t.dtype}: W_enc has {tensors['W_enc'].dtype}; weights must share one dtype"
            )
    exact = torch.promote_types(tensors["W_enc"].dtype, torch.float32)
    made = {name: t.detach() if name in WEIGHTS else t.detach().to(exact) for name, t in tensors.items()}
    made["W_dec"] = made["W_dec"].contiguous()
    for name, t in made.items():
        check_values(name, t)
    return {name: made[name] for name in shapes}


def check_values(name: str, t: Tensor) -> None:
    """ValueError for NaN, and for inf in anything but a threshold."""
    may_be_infinite = name == "threshold"
    if count := bad_values(t, may_be_infinite):
        raise ValueError(f"{name}: {count} of its values are {'NaN' if may_be_infinite else 'NaN or inf'}")
