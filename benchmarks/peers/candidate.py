"""What every candidate has to do, and the weights that all of them start from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sampled_sae import SampledSAE, SampledSAEConfig

ENDLESS = 10**6  # steps: the libraries' schedules want to know an end


@dataclass(frozen=True)
class Setup:
    """What is trained, the same for all.

    Attributes:
        B, d, F, k: tokens a batch, width, features, active features a token.
        lr, warm_up: Adam's learning rate and the steps over which it rises; constant from then on.
        dead_after: tokens without being selected after which a feature is dead.
        device, dtype: where, and "float32" or "bfloat16" for products under autocast.
        layers: of a crosscoder; d is the width of each.
        seed: of initial weights.
    """

    B: int
    d: int
    F: int
    k: int
    lr: float = 1e-3
    warm_up: int = 0
    dead_after: int = 10_000_000
    device: str = "cpu"
    dtype: str = "float32"
    layers: int = 1
    seed: int = 0

    def lr_at(self, step: int) -> float:
        """lr of step 0, 1, ..."""
        return self.lr * min(1.0, (step + 1) / max(1, self.warm_up))

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device, torch.bfloat16, enabled=self.dtype == "bfloat16")


class Weights(NamedTuple):
    """An SAE as relu((x - b_dec) W_enc^T + b_enc) and c W_dec + b_dec; float32.

    Of a transcoder, nothing is taken from x, and x W_skip^T is added. W_enc [F, d], W_dec [F, d_out]; b_enc [F];
    b_dec [d_out]; W_skip [d_out, d], None without.
    """

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    W_skip: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Those that are there."""
        return {name: value for name, value in self._asdict().items() if value is not None}

    def folded(self) -> Weights:
        """The same reconstructions with decoder rows of unit norm and activations that much larger."""
        norm = torch.linalg.vector_norm(self.W_dec, dim=1).clamp_min(1e-12)
        return Weights(self.W_enc * norm[:, None], self.b_enc * norm, self.W_dec / norm[:, None], self.b_dec)

    @torch.no_grad()
    def sae(self, k: float, **rule: Any) -> SampledSAE:
        """A SampledSAE of these weights, where they are; with `layers` in the rule a crosscoder."""
        (F, d_out), d = self.W_dec.shape, self.W_enc.shape[1]
        skip = {} if self.W_skip is None else {"d_out": d_out, "skip": True}
        config = SampledSAEConfig(d_in=d // rule.get("layers", 1), d_sae=F, k=k, **skip, **rule)
        sae = SampledSAE(config, device=self.W_dec.device)
        for name, value in self.tensors().items():
            sae.get_parameter(name).copy_(value.t() if name in ("W_enc", "W_skip") else value)
        return sae


def initial_weights(setup: Setup, b_dec: Tensor | None = None) -> Weights:
    """Unit decoder rows, tied encoder, no encoder bias; b_dec is zero unless given. On the setup's device."""
    device = setup.device
    rows = torch.randn(setup.F, setup.d, generator=torch.Generator(device).manual_seed(setup.seed), device=device)
    rows = torch.nn.functional.normalize(rows, dim=1)
    b_dec = torch.zeros(setup.d, device=device) if b_dec is None else b_dec.to(device)
    return Weights(rows.clone(), torch.zeros(setup.F, device=device), rows, b_dec)


class Candidate(ABC):
    """One SAE in training."""

    setup: Setup
    steps = 0

    @abstractmethod
    def step(self, x: Tensor) -> Tensor | float:
        """One whole training step on x [B, d], float32; of a transcoder on x and its targets.

        Returns the mean over tokens of ||x - x_hat||^2 before the update, as the step itself computed it.
        """

    @abstractmethod
    def tensors(self) -> Weights:
        """Its own, which its steps change."""

    @torch.no_grad()
    def load(self, weights: Weights) -> None:
        for own, given in zip(self.tensors().tensors().values(), weights.tensors().values()):
            own.copy_(given)

    def weights(self) -> Weights:
        """As they are now, copied to the CPU."""
        own = {name: t.detach().float().cpu() for name, t in self.tensors().tensors().items()}
        return Weights(**{name: t.clone(memory_format=torch.contiguous_format) for name, t in own.items()})

    def set_lr(self, optimizer: torch.optim.Optimizer) -> None:
        """That of the next step, by the setup's warm-up."""
        for group in optimizer.param_groups:
            group["lr"] = self.setup.lr_at(self.steps)
        self.steps += 1
