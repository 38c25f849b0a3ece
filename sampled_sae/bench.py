"""`sampled-sae bench`: a training step on this machine, its parts, its floor, and the same step in eager PyTorch."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace

from .bench_steps import EagerStep, OurStep, Settings, activations, product
from .support.timing import Call, Spread, check_memory, free_memory, interleaved, peak_memory, spread

# share of the time for rounds of our own step
OWN_SHARE = 0.4
# what an eager step may take, with ours and the floor beside it, in floors; how many are made at least
EAGER_FLOORS, EAGER_STEPS = 16, 3
# tensors [B, F] that the eager step holds at once
EAGER_TENSORS = 6
# below it Adam is most of a step
FEWEST_TOKENS = 256


@dataclass(frozen=True)
class Measurement:
    """One line of the report; times in ms, memory in units of one float32 [B, F].

    open: of columns and of entries the share that a bfloat16 product left undecided in a step.
    """

    name: str
    time: Spread | None
    of_floor: float | None = None
    memory: float | None = None
    note: str = ""
    open: dict[str, float] | None = None


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
    if ours.sae.memory.looks is not None:
        yield Measurement("- left open by the screen", None, open=ours.sae.memory.looks.shares())
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


HEADING = "| | ms | p20-p80 | x product | peak memory, [B, F] |\n|---|---:|---:|---:|---:|"


def line(row: Measurement) -> str:
    """The row in the table under HEADING."""
    if row.open is not None:
        shares = (f"{100 * share:.2g}% of the {name}" for name, share in row.open.items())
        return f"| {row.name} | {', '.join(shares) or 'nothing was looked at'} | | | |"
    if row.time is None:
        return f"| {row.name} | {row.note} | | | |"
    times = f"{row.time.ms:.2f} | {row.time.p20:.2f}-{row.time.p80:.2f} | {row.of_floor:.2f}"
    return f"| {row.name} | {times} | {'' if row.memory is None else f'{row.memory:.2f}'} |"
