"""`sampled-sae bench`: a training step on this machine, its parts, its floor, and the same step in eager PyTorch."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import reference
from .config import SampledSAEConfig, batch_budget, pool_size
from .implementations import Implementation
from .optim import RowAdam
from .sae import SampledSAE
from .timing import Call, Sections, Spread, free_memory, interleaved, peak_memory, spread, timed
from .validate import check_choice, check_device, check_integer, check_number

DTYPES = ("float32", "bfloat16")
PARTS = {"column_scores": "scores", "candidate_pool": "pool", "select": "select", "decode": "decode"}
# share of the time for rounds of our own step; what an eager step may take, and one of our rounds, in floors
OWN_SHARE, EAGER_FLOORS, ROUND_FLOORS = 0.4, 16, 3
# tensors [B, F] that the eager step holds at once
EAGER_TENSORS = 6


@dataclass(frozen=True)
class Settings:
    """What is timed.

    Args:
        d, features, batch, k, l, score, select: d_in, d_sae, tokens in a batch, and the rule, as in SampledSAEConfig.
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
    l: float | None = 4.0
    score: str = "l2"
    select: str = "batch"
    adam: str = "dense"
    device: str = "cpu"
    dtype: str = "float32"
    rounds: int = 9
    seconds: float = 110

    def __post_init__(self) -> None:
        check_integer("batch", self.batch, 1)
        check_integer("rounds", self.rounds, 1)
        check_number("seconds", self.seconds, 0, None)
        check_choice("dtype", self.dtype, DTYPES)
        if self.dtype == "bfloat16" and check_device(self.device).type == "cpu":
            raise ValueError("dtype='bfloat16': without a GPU the layer computes in float32")

    def config(self) -> SampledSAEConfig:
        return SampledSAEConfig(
            self.d, self.features, self.k, self.l, score=self.score, select=self.select, row_grads=True
        )

    def autocast(self) -> torch.autocast:
        kind = torch.device(self.device).type
        return torch.autocast(kind, torch.bfloat16, enabled=self.dtype == "bfloat16")


@dataclass(frozen=True)
class Row:
    """One line of the report; times in ms, memory in units of one float32 [B, F]."""

    name: str
    time: Spread | None
    of_floor: float | None = None
    memory: float | None = None
    note: str = ""


def run(settings: Settings) -> Iterator[Row]:
    """The rows as they come: floor, our step with its parts, the eager step.

    No feature is dead, so the aux loss is 0.
    """
    start = time.perf_counter()
    device, unit = settings.device, 4 * settings.batch * settings.features
    x = activations(settings.batch, settings.d, 0).to(device)
    ours = OurStep(settings)
    eager = EagerStep(settings, ours.sae)
    floor = product(x, ours.sae.W_enc.detach(), settings.dtype)
    loss = float(ours(x))
    memory = peak_of(lambda: ours(x), device)
    ours.read()
    floor_seconds = timed(floor, device)
    left = settings.seconds - (time.perf_counter() - start)
    share = OWN_SHARE * settings.seconds
    # a last round may begin when the time is almost over
    spare = left - (EAGER_FLOORS + ROUND_FLOORS) * floor_seconds
    calls = {"floor": floor, "ours": lambda: ours(x)}
    rounds = interleaved(calls, device, settings.rounds, min(share, spare) if spare > 0 else share, warm_up=False)
    yield Row("product x W_enc, the floor", spread(rounds["floor"]), 1.0)
    yield beside(f"our step ({ours.sae.impl_in_use})", rounds["ours"], rounds["floor"], memory, unit)
    parts = ours.read()
    for name, samples in parts.items():
        yield beside(f"- {name}", samples, rounds["floor"])
    accounted = [sum(each) for each in zip(*parts.values())]
    rest = [whole - some for whole, some in zip(rounds["ours"], accounted)]
    yield beside("- loss, threshold, counts", rest, rounds["floor"])
    left = settings.seconds - (time.perf_counter() - start)
    yield eager_row(eager, x, floor, settings, loss, min(rounds["floor"]), left)


def beside(name: str, samples: list[float], floor: list[float], memory: int | None = None, unit: int = 1) -> Row:
    """The row of samples that stand beside samples of the floor in the same rounds."""
    ratio = spread([own / f for own, f in zip(samples, floor)]).ms
    return Row(name, spread(samples), ratio, None if memory is None else memory / unit)


def eager_row(
    eager: EagerStep, x: Tensor, floor: Call, settings: Settings, loss: float, floor_ms: float, left: float
) -> Row:
    """The eager step's row; without figures where it would not fit, would take too long, or disagrees with ours.

    The first step, which makes gradients and moments, counts only where there is no time for another, and is named so.
    """
    name, unit, needed = "eager PyTorch step", 4 * settings.batch * settings.features, eager_bytes(settings)
    if needed > 0.9 * free_memory(settings.device):
        return Row(name, None, note=f"left out: needs about {needed / 1e9:.0f} GB of memory")
    if EAGER_FLOORS * floor_ms > 1e3 * left:
        return Row(name, None, note=f"left out: may take more than the {max(left, 0):.0f} s that are left")
    samples, floors, losses = [], [], []

    def timed_step() -> None:
        floors.append(1e3 * timed(floor, settings.device))
        samples.append(1e3 * timed(lambda: losses.append(eager(x)), settings.device))

    start = time.perf_counter()
    timed_step()
    took = time.perf_counter() - start
    tolerance = 1e-4 if settings.dtype == "float32" else 2e-2
    if not abs(float(losses[0]) - loss) <= tolerance * loss:
        return Row(name, None, note=f"no comparison: its first loss is {float(losses[0]):.6g}, ours {loss:.6g}")
    if left - (time.perf_counter() - start) < took:
        return beside(f"{name}, one cold sample", samples, floors)
    memory = peak_of(timed_step, settings.device)
    while len(samples) <= settings.rounds and left - (time.perf_counter() - start) > took:
        timed_step()
    return beside(name, samples[1:], floors[1:], memory, unit)


def peak_of(call: Call, device: str) -> int | None:
    """`peak_memory`, or None where the system does not tell; the call is made all the same."""
    try:
        return peak_memory(call, device)
    except OSError:
        call()
        return None


def eager_bytes(settings: Settings) -> int:
    """What the eager step takes, about: [B, F] several times, gradients, moments and a copy of both weights."""
    return 4 * settings.features * (EAGER_TENSORS * settings.batch + 9 * settings.d)


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
        return dataclasses.replace(parts, **timed)


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
        w = self.weights
        with self.settings.autocast():
            codes = self.encode(x - w["b_dec"], w["W_enc"], w["b_enc"])
            x_hat = codes @ w["W_dec"] + w["b_dec"]
        loss = reference.reconstruction_loss(x, x_hat)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(w.parameters(), 1.0)
        with torch.no_grad():
            W, grad = w["W_dec"], w["W_dec"].grad
            grad.sub_((grad * W).sum(1, keepdim=True) * W)
            self.optimizer.step()
            W.div_(torch.linalg.vector_norm(W, dim=1, keepdim=True))
        return loss.detach()

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


HEADING = "| | ms | p20-p80 | x product | peak memory, [B, F] |\n|---|---:|---:|---:|---:|"


def line(row: Row) -> str:
    """The row in the table under HEADING."""
    if row.time is None:
        return f"| {row.name} | {row.note} | | | |"
    times = f"{row.time.ms:.2f} | {row.time.p20:.2f}-{row.time.p80:.2f} | {row.of_floor:.2f}"
    return f"| {row.name} | {times} | {'' if row.memory is None else f'{row.memory:.2f}'} |"
