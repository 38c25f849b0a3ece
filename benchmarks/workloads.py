"""Sizes named after real work."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Workload:
    """B tokens of width d, F features, k active a token."""

    name: str
    B: int
    d: int
    F: int
    k: int

    def columns(self) -> dict[str, str | int]:
        """For the rows of a result file."""
        return {"workload": self.name, "B": self.B, "d": self.d, "F": self.F, "k": self.k}


def three_groups(F: int) -> tuple[int, ...]:
    """Of a Matryoshka SAE: a sixteenth of its features, a quarter, and all."""
    return F // 16, F // 4, F


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
CPU_KERNELS = (
    Workload("SmolLM2-135M", 2048, 576, 16384, 32),
    Workload("Pythia-160M", 2048, 768, 32768, 64),
)
LARGE_KERNELS = (
    Workload("Pythia-160M, wide", 8192, 768, 65536, 64),
    Workload("Gemma-2-2B", 4096, 2304, 65536, 64),
    Workload("Llama-3-8B", 2048, 4096, 131072, 128),
)
GPU_KERNELS = (
    Workload("SmolLM2-135M", 32768, 576, 16384, 32),
    *GPU_STEPS[1:3],
    Workload("Llama-3-8B", 4096, 4096, 131072, 128),
    Workload("Pythia-160M, a million features", 4096, 768, 1 << 20, 32),
)
REHEARSAL = (Workload("rehearsal", 12, 16, 70, 2),)
# of real models, at one B and F, so that they compare
WIDTHS = tuple(Workload(f"d={d}", 8192, d, 32768, 64) for d in (576, 768, 2304, 4096))
