"""What `sampled-sae bench` times: the encoder product, our step with its parts, and the same step in eager PyTorch."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from . import reference
from .config import SampledSAEConfig, batch_budget, pool_size
from .impl.interface import Implementation
from .optim import MODES, RowAdam
from .sae import SampledSAE
from .support.argument_checks import check_choice, check_device, check_integer, check_number, set_fields
from .support.timing import Call, Sections

DTYPES = ("float32", "bfloat16")
PARTS = {
    "column_bounds": "scores",
    "column_scores": "scores",
    "candidate_pool": "pool",
    "select": "select",
    "decode": "decode",
}


@dataclass(frozen=True)
class Settings:
    """What is timed.

    Args:
        d, features, batch, k, l, score, select, screen: d_in, d_sae, tokens in a batch, and the rule, as in
            SampledSAEConfig.
        adam: mode of RowAdam.
        device, dtype: "float32", or on a GPU "bfloat16" for the products (autocast over float32 weights).
        rounds: samples of each call, fewer where the time runs out.
        seconds: about what all of it may take.

    Raises:
        ValueError, TypeError: naming the argument.
    """

    d: int = 768
    features: int = 65536
    batch: int = 8192
    k: float = 64
    l: float | None = None
    score: str = "l2"
    select: str = "batch"
    screen: str = "auto"
    adam: str = "dense"
    device: str = "cpu"
    dtype: str = "float32"
    rounds: int = 9
    seconds: float = 100

    def __post_init__(self) -> None:
        counts = {name: check_integer(name, getattr(self, name), 1) for name in ("batch", "rounds")}
        set_fields(self, {**counts, "seconds": check_number("seconds", self.seconds, 0, None)})
        check_choice("dtype", self.dtype, DTYPES)
        check_choice("adam", self.adam, MODES)
        self.config()
        if self.dtype == "bfloat16" and check_device(self.device).type == "cpu":
            raise ValueError("dtype='bfloat16': without a GPU the layer computes in float32")

    @property
    def unit(self) -> int:
        """Bytes of one float32 [B, F]."""
        return 4 * self.batch * self.features

    def config(self) -> SampledSAEConfig:
        shape = self.d, self.features, self.k, self.l
        return SampledSAEConfig(*shape, score=self.score, select=self.select, screen=self.screen, row_grads=True)

    def autocast(self) -> torch.autocast:
        kind = torch.device(self.device).type
        return torch.autocast(kind, torch.bfloat16, enabled=self.dtype == "bfloat16")


def activations(B: int, d: int, seed: int) -> Tensor:
    """[B, d] float32: Gaussian, with a spectrum that falls by a factor of ten, mean ||x||^2 = d."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(B, d, generator=generator) * torch.logspace(0, -1, d)
    return x * (d / x.square().sum(1).mean()).sqrt()


def product(x: Tensor, W_enc: Tensor, dtype: str) -> Call:
    """The encoder product into memory that exists."""
    kind = getattr(torch, dtype)
    left, right = x.to(kind), W_enc.t().to(kind).contiguous().t()
    out = torch.empty(len(x), W_enc.shape[1], dtype=kind, device=x.device)
    return lambda: torch.mm(left, right, out=out)


class SectionedSAE(SampledSAE):
    """A SampledSAE that times its parts."""

    def __init__(self, cfg: SampledSAEConfig, device: str) -> None:
        super().__init__(cfg, device=device)
        self.sections = Sections(torch.device(device))

    @property
    def _parts(self) -> Implementation:
        parts = super()._parts
        timed = {attribute: self.sections.timed(name, getattr(parts, attribute)) for attribute, name in PARTS.items()}
        return replace(parts, **timed)  # type: ignore[arg-type]


class OurStep:
    """Forward, backward, RowAdam with clip, projection and renormalisation."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.sae = SectionedSAE(settings.config(), settings.device)
        self.optimizer = RowAdam(self.sae, mode=settings.adam)

    def __call__(self, x: Tensor) -> Tensor:
        """One step; the loss before it."""
        with self.settings.autocast():
            out = self.sae(x)
        with self.sae.sections.section("backward"):
            out.loss.backward()
        with self.sae.sections.section("optimizer"):
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.sae.sections.next_sample()
        return out.mse.detach()

    def read(self) -> dict[str, list[float]]:
        return self.sae.sections.read()


class EagerStep:
    """The same rule in eager PyTorch, dense throughout as SAE libraries write it, with torch's fused Adam."""

    def __init__(self, settings: Settings, sae: SampledSAE) -> None:
        self.settings = settings
        copies = {name: p.detach().clone() for name, p in sae.named_parameters()}
        self.weights = nn.ParameterDict(copies)
        self.optimizer = torch.optim.Adam(self.weights.parameters(), lr=1e-3, fused=True)

    def __call__(self, x: Tensor) -> Tensor:
        """One step; the loss before it."""
        loss = self.loss(x)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.weights.parameters(), 1.0)
        with torch.no_grad():
            W, grad = self.weights["W_dec"], self.weights["W_dec"].grad
            grad.sub_((grad * W).sum(1, keepdim=True) * W)
            self.optimizer.step()
            W.div_(torch.linalg.vector_norm(W, dim=1, keepdim=True))
        return loss.detach()

    def loss(self, x: Tensor) -> Tensor:
        w = self.weights
        with self.settings.autocast():
            codes = self.encode(x - w["b_dec"], w["W_enc"], w["b_enc"])
            x_hat = codes @ w["W_dec"] + w["b_dec"]
        return reference.reconstruction_loss(x, x_hat)

    def encode(self, x: Tensor, W_enc: Tensor, b_enc: Tensor) -> Tensor:
        """Dense codes [B, F]."""
        s = self.settings
        a = torch.addmm(b_enc, x, W_enc).relu_()
        candidates = a
        size = pool_size(s.k, s.l, s.features)
        if size < s.features:
            members = reference.column_scores(a, s.score).topk(size).indices
            candidates = a * torch.zeros_like(a[0]).index_fill(0, members, 1)
        if s.select == "batch":
            flat = candidates.flatten()
            top = flat.topk(batch_budget(len(x), s.k), sorted=False)
            return torch.zeros_like(flat).scatter(0, top.indices, top.values).view_as(a)
        top = candidates.topk(int(s.k), dim=1, sorted=False)
        return torch.zeros_like(candidates).scatter(1, top.indices, top.values)
