"""In what precision a training multiplies, and where that can be had."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch

from ..config import SampledSAEConfig
from ..impl.interface import resolve_impl
from ..support.float32_products import are_as_set, float32_products
from .train_config import TrainConfig


def settled(train_config: TrainConfig, sae_config: SampledSAEConfig, device: torch.device) -> TrainConfig:
    """The same config with a precision in place of "auto".

    Raises:
        ValueError: one that this SAE cannot have on this device.
    """
    impl = resolve_impl(sae_config.impl, device, torch.float32)
    return replace(train_config, precision=resolve_precision(train_config.precision, device, impl))


def resolve_precision(precision: str, device: torch.device, impl: str) -> str:
    """ "bf16", "tf32" or "fp32": what `precision` stands for in a training by `impl`, as `resolve_impl` names it.

    Raises:
        ValueError: "bf16" where products take float32 alone, "tf32" away from a GPU that has it.
    """
    if precision == "auto":
        return "bf16" if device.type == "cuda" and impl == "triton" else "fp32"
    if precision == "bf16" and impl != "triton":
        raise ValueError(
            f"precision='bf16': impl={impl!r} multiplies float32 operands; use 'fp32', or impl='triton' on a GPU"
        )
    if precision == "tf32" and not _has_tf32(device):
        raise ValueError(
            f"precision='tf32': needs an NVIDIA GPU of compute capability 8.0 or newer, this is {device}; use 'fp32'"
        )
    return precision


def _has_tf32(device: torch.device) -> bool:
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device)[0] >= 8


def forward_in(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """A forward pass whose products take operands of this precision, whatever autocast stands around it."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def is_as_set(precision: str, device: torch.device) -> bool:
    """Whether steps in this precision leave torch's switches as they are: then another thread may compute meanwhile."""
    return are_as_set(_float32(precision), device)


def step_in(precision: str, device: torch.device) -> AbstractContextManager[None]:
    """A step whose float32 products, those of backward and optimizer too, are of this precision.

    torch's switches are set for the step and are then what they were.
    """
    return float32_products(_float32(precision), device)


def _float32(precision: str) -> str:
    """As torch's switches name it."""
    return "tf32" if precision == "tf32" else "ieee"
