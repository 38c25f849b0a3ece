"""Sizes named after real work, and data shaped like a model's activations."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Workload:
    """B tokens of width d, F features, k active a token."""

    name: str
    B: int
    d: int
    F: int
    k: int


CPU_STEPS = (
    Workload("SmolLM2-135M, small", 1024, 576, 8192, 32),
    Workload("Pythia-160M", 2048, 768, 16384, 32),
    Workload("Pythia-160M, wide", 2048, 768, 65536, 32),
)


GPU_STEPS = (
    Workload("SmolLM2-135M", 8192, 576, 32768, 64),
    Workload("Pythia-160M, wide", 8192, 768, 65536, 64),
    Workload("Gemma-2-2B", 8192, 2304, 65536, 64),
    Workload("Llama-3-8B", 4096, 4096, 131072, 64),
)
REHEARSAL = (Workload("rehearsal", 40, 24, 300, 4),)


def activations(workload: Workload, seed: int) -> Tensor:
    """[B, d] float32: Gaussian, with a spectrum that falls by a factor of ten, mean ||x||^2 = d."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(workload.B, workload.d, generator=generator) * torch.logspace(0, -1, workload.d)
    return x * (workload.d / x.square().sum(1).mean()).sqrt()
