"""`sampled-sae bench`: a training step on this machine, its parts, its floor, and the same step in eager PyTorch."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from . import reference
from .config import SampledSAEConfig, batch_budget, pool_size
from .impl.interface import Implementation
from .optim import MODES, RowAdam
from .sae import SampledSAE
from .support.argument_checks import check_choice, check_device, check_integer, check_number
from .support.timing import Call, Sections, Spread, check_memory, free_memory, interleaved, peak_memory, spread

DTYPES = ("float32", "bfloat16")
PARTS = {"column_scores": "scores", "candidate_pool": "pool", "select": "select", "decode": "decode"}
# share of the time for rounds of our own step
OWN_SHARE = 0.4
# what an eager step may take, with ours and the floor beside it, in floors; how many are made at least
EAGER_FLOORS, EAGER_STEPS = 16, 3
# tensors [B, F] that the eager step holds at once
EAGER_TENSORS = 6
# below it Adam is most of a step
FEWEST_TOKENS = 256


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
    seconds: float = 100

    def __post_init__(self) -> None:
        for name in ("batch", "rounds"):
            object.__setattr__(self, name, check_integer(name, getattr(self, name), 1))
        object.__setattr__(self, "seconds", check_number("seconds", self.seconds, 0, None))
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
        return SampledSAEConfig(
            self.d, self.features, self.k, self.l, score=self.score, select=self.select, row_grads=True
        )

    def autocast(self) -> torch.autocast:
        kind = torch.device(self.device).type
        return torch.autocast(kind, torch.bfloat16, enabled=self.dtype == "bfloat16")


@dataclass(frozen=True)
class Measurement:
    """One line of the report; times in ms, memory in units of one float32 [B, F]."""

    name: str
    time: Spread | None
    of_floor: float | None = None
    memory: float | None = None
    note: str = ""


def run(settings: Settings) -> Iterator[Measurement]:
    """The rows as they come: floor, our step with its parts, the eager step.

    No feature is dead, so the aux loss is 0.
    """
    start = time.perf_counter()
    floor_ms = yield from own_rows(settings, start)
    yield from eager_rows(settings, floor_ms, settings.seconds - (time.perf_counter() - start))


def own_rows(settings: Settings, start: float) -> Generator[Measurement, None, float]:
    """Floor, our step, its parts; returns the least milliseconds of the floor."""
    device = settings.device
    x = activations(settings.batch, settings.d, 0).to(device)
    ours = OurStep(settings)
    floor = product(x, ours.sae.W_enc.detach(), settings.dtype)
    ours(x)
    memory = peak_of(lambda: ours(x), device)
    ours.read()
    floor()
    seconds = min(OWN_SHARE * settings.seconds, settings.seconds - (time.perf_counter() - start))
    calls = {"floor": floor, "ours": lambda: ours(x)}
    rounds = interleaved(calls, device, settings.rounds, seconds, warm_up=False)
    yield Measurement("product x W_enc, the floor", spread(rounds["floor"]), 1.0)
    yield beside(f"our step ({ours.sae.impl_in_use})", rounds["ours"], rounds["floor"], memory, settings.unit)
    parts = ours.read()
    for name, samples in parts.items():
        yield beside(f"- {name}", samples, rounds["floor"])
    accounted = [sum(each) for each in zip(*parts.values())]
    rest = [whole - some for whole, some in zip(rounds["ours"], accounted)]
    yield beside("- loss, threshold, counts", rest, rounds["floor"])
    return min(rounds["floor"])


def eager_rows(settings: Settings, floor_ms: float, left: float) -> Iterator[Measurement]:
    """The eager step beside its floor; without figures where it does not fit, or disagrees with ours.

    Where the batch is too large for the memory or the seconds that are left, both take one of fewer tokens, and the row
    of our step at that size stands before the eager one.
    """
    name, start = "eager PyTorch step", time.perf_counter()
    tokens = settings.batch
    while note := obstacle(replace(settings, batch=tokens), floor_ms * tokens / settings.batch, left):
        tokens //= 2
        if tokens < FEWEST_TOKENS:
            yield Measurement(name, None, note=note)
            return
    few = replace(settings, batch=tokens)
    at = "" if few == settings else f", {tokens} tokens"
    x = activations(tokens, few.d, 0).to(few.device)
    ours = OurStep(few)
    eager = EagerStep(few, ours.sae)
    expected, loss = float(ours(x)), float(eager(x))
    tolerance = 1e-4 if few.dtype == "float32" else 2e-2
    if not abs(loss - expected) <= tolerance * expected:
        yield Measurement(name + at, None, note=f"no comparison: its first loss is {loss:.6g}, ours {expected:.6g}")
        return
    floor = product(x, ours.sae.W_enc.detach(), few.dtype)
    calls = {"floor": floor, "ours": lambda: ours(x), "eager": lambda: eager(x)}
    memory = {step: peak_of(calls[step], few.device) for step in ("ours", "eager")}
    floor()
    rounds = interleaved(calls, few.device, few.rounds, left - (time.perf_counter() - start), warm_up=False)
    if at:
        impl = ours.sae.impl_in_use
        yield beside(f"our step ({impl}){at}", rounds["ours"], rounds["floor"], memory["ours"], few.unit)
    yield beside(name + at, rounds["eager"], rounds["floor"], memory["eager"], few.unit)


def obstacle(settings: Settings, floor_ms: float, left: float) -> str:
    """Why a comparison with the eager step has to be left out; empty where nothing stands against it."""
    needed = eager_bytes(settings)
    if needed > 0.9 * free_memory(settings.device):
        return f"left out: {settings.batch} tokens need about {1e-9 * needed:.2g} GB of memory"
    if EAGER_STEPS * EAGER_FLOORS * floor_ms > 1e3 * left:
        return f"left out: {settings.batch} tokens may take more than the {max(left, 0):.0f} s that are left"
    return ""


def beside(
    name: str, samples: list[float], floor: list[float], memory: int | None = None, unit: int = 1
) -> Measurement:
    """The row of samples that stand beside samples of the floor in the same rounds."""
    ratio = spread([own / f for own, f in zip(samples, floor)]).ms
    return Measurement(name, spread(samples), ratio, None if memory is None else memory / unit)


def peak_of(call: Call, device: str) -> int | None:
    """`peak_memory`, or None where the system does not tell; the call is made all the same."""
    try:
        return peak_memory(call, device)
    except OSError:
        call()
        return None


def check_fits(settings: Settings) -> None:
    """MemoryError where the floor and our step do not fit: one [B, F], x, both weights and their moments."""
    needed = settings.unit + 4 * settings.d * (settings.batch + 6 * settings.features)
    check_memory(f"batch={settings.batch}, features={settings.features}, d={settings.d}", needed, settings.device)


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


HEADING = "| | ms | p20-p80 | x product | peak memory, [B, F] |\n|---|---:|---:|---:|---:|"


def line(row: Measurement) -> str:
    """The row in the table under HEADING."""
    if row.time is None:
        return f"| {row.name} | {row.note} | | | |"
    times = f"{row.time.ms:.2f} | {row.time.p20:.2f}-{row.time.p80:.2f} | {row.of_floor:.2f}"
    return f"| {row.name} | {times} | {'' if row.memory is None else f'{row.memory:.2f}'} |"
