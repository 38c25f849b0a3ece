"""Time and memory of our training step against F, B, k and l, beside the encoder product, with fitted exponents.

Each size of an axis has a process of its own, and rounds go over all of them in turn, so that a machine that slows down
bends no curve. Each sample of a step stands beside one of the product: as one call that writes [B, F], and in chunks of
features that stay in cache, as our step makes it. The faster of the two is the floor: the one call waits for the memory
it writes to where [B, F] is beyond all caches. An exponent is the slope of a least-squares line through ln(value)
against ln(size).

    python benchmarks/scaling.py --out benchmarks/results/scaling.json

F goes to a million at d = 128 and 512 tokens, so that weights, moments and the product's result fit into memory; there
Adam, which does not shrink with the batch, weighs more than in a usual training.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.measure import in_turn, machine, product, product_in_chunks, spread_columns, table, write_result
from benchmarks.peers import Setup, initial_weights, make, ours
from benchmarks.worker import Worker
from benchmarks.workloads import Workload, activations
from sampled_sae.support.timing import peak_memory, timed

RULES: dict[str, dict[str, Any]] = {
    "l=4": {"l": 4.0},
    "l=None (BatchTopK)": {"l": None},
    "token (TopK)": {"l": None, "select": "token"},
}
MEASURES = {"step_ms": "step", "floor_ms": "floor", "peak_bytes": "memory"}


@dataclass(frozen=True)
class Point:
    """A size on an axis, and the rules that are measured there by name."""

    axis: str
    value: float
    workload: Workload
    rules: dict[str, dict[str, Any]]


def points(rehearse: bool) -> list[Point]:
    """All sizes; those of a rehearsal are tiny."""
    base = {"B": 32, "d": 16, "F": 128, "k": 2} if rehearse else {"B": 1024, "d": 256, "F": 16384, "k": 32}
    wide = {"B": 32, "d": 16, "k": 2} if rehearse else {"B": 512, "d": 128, "k": 32}
    axes: dict[str, tuple[dict[str, int], Sequence[int]]] = {
        "F": (wide, (128, 256) if rehearse else [2**i for i in range(14, 21)]),
        "B": (base, (32, 64) if rehearse else [2**i for i in range(8, 14)]),
        "k": (base, (2, 4) if rehearse else [2**i for i in range(3, 9)]),
    }
    found = []
    for axis, (fixed, values) in axes.items():
        for value in values:
            found.append(Point(axis, value, Workload("scaling", **{**fixed, axis: value}), RULES))
    for l in (1, 2) if rehearse else (1, 2, 4, 8, 16, 32, 64):
        found.append(Point("l", l, Workload("scaling", **base), {"l": {"l": float(l)}}))
    return found


class SizeSession:
    """The batches and the product of one size, and the rule that is in training there."""

    def __init__(self, workload: Workload, device: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self.workload, self.device = workload, device
        self.setup = Setup(workload.B, workload.d, workload.F, workload.k, device=device)
        self.batches = [activations(workload, seed).to(device) for seed in range(2)]
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        x, W = self.batches[0].to(dtype), initial_weights(self.setup).W_enc.to(device, dtype)
        self.calls = {"product": product(x, W), "chunks": product_in_chunks(x, W)}

    def train(self, rule: dict[str, Any]) -> None:
        """From now on by this rule, from the first weights."""
        self.calls.pop("step", None)  # before there are two of them
        candidate = make(ours(**rule), self.setup, initial_weights(self.setup))
        turns = itertools.cycle(self.batches)
        self.calls["step"] = lambda: candidate.step(next(turns))

    def sample(self, _: int) -> dict[str, float]:
        """Seconds of each product and of a step after them."""
        self.calls["product"]()  # wakes threads and caches after the other processes' turns
        return {name: timed(call, self.device) for name, call in self.calls.items()}

    def peak_bytes(self) -> int:
        """Of two steps, above what is held between steps."""
        return peak_memory(lambda: [self.calls["step"]() for _ in self.batches], self.device)


def measure_axis(sizes: Sequence[Point], device: str, threads: int, rounds: int) -> list[dict[str, Any]]:
    """A row for each size and rule of one axis."""
    workers = [Worker(SizeSession, point.workload, device, threads) for point in sizes]
    rows = []
    for name in sizes[0].rules:
        for point, worker in zip(sizes, workers, strict=True):
            worker.call("train", point.rules[name])
        turns = {point.value: partial(worker.call, "sample") for point, worker in zip(sizes, workers, strict=True)}
        samples = in_turn(turns, rounds)
        for point, worker in zip(sizes, workers, strict=True):
            figures = figures_of(samples[point.value], worker.call("peak_bytes"), point.workload)
            rows.append({"axis": point.axis, "value": point.value, "rule": name, **asdict(point.workload), **figures})
            print(f"{point.axis}={point.value:g}, {name}: {figures['ratio']:.2f} x floor", flush=True)
    for worker in workers:
        worker.close()
    return sorted(rows, key=lambda row: row["value"])


def figures_of(samples: Sequence[dict[str, float]], peak: int, workload: Workload) -> dict[str, float]:
    """Medians in ms, ratios to the floor and memory."""
    ms = {name: 1e3 * statistics.median(sample[name] for sample in samples) for name in samples[0]}
    floor = min(("product", "chunks"), key=lambda name: ms[name])
    return {
        **spread_columns([sample["step"] / sample[floor] for sample in samples], "ratio"),
        **{f"{name}_ms": value for name, value in ms.items()},
        "floor_ms": ms[floor],
        "peak_bytes": peak,
        "peak_extra_memory": peak / (4 * workload.B * workload.F),
    }


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float | None:
    """Slope of ln(values) against ln(sizes) by least squares; None where a value is not positive."""
    if min(values) <= 0:
        return None
    x, y = [math.log(s) for s in sizes], [math.log(v) for v in values]
    return statistics.linear_regression(x, y).slope


def exponents(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each axis and rule the exponents of step, product and memory."""
    found = []
    for axis, rule in dict.fromkeys((row["axis"], row["rule"]) for row in rows):
        same = [row for row in rows if (row["axis"], row["rule"]) == (axis, rule)]
        sizes = [row["value"] for row in same]
        fitted = {name: exponent(sizes, [row[measure] for row in same]) for measure, name in MEASURES.items()}
        found.append({"axis": axis, "rule": rule, "from": min(sizes), "to": max(sizes), **fitted})
    return found


def markdown_table(result: dict[str, Any]) -> str:
    """The exponents, then every point."""
    fits = []
    for row in result["exponents"]:
        slopes = ["–" if row[name] is None else f"{row[name]:.2f}" for name in MEASURES.values()]
        fits.append([row["axis"], f"{row['from']} to {row['to']}", row["rule"], *slopes])
    each = []
    for row in result["rows"]:
        size = "({B}, {d}, {F}, {k})".format(**row)
        spread = f"{row['ratio_p20']:.2f}–{row['ratio_p80']:.2f}"
        figures = [f"{row['ratio']:.2f}", spread, f"{row['step_ms']:.0f}", f"{row['peak_extra_memory']:.2f}"]
        each.append([row["axis"], str(row["value"]), size, row["rule"], *figures])
    head = ["axis", "range", "rule", *(f"exponent of {name}" for name in MEASURES.values())]
    points_head = ["axis", "at", "(B, d, F, k)", "rule", "step / floor", "p20–p80", "ms", "peak extra memory"]
    return table(head, fits) + "\n" + table(points_head, each)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write; tables go beside it")
    parser.add_argument("--rounds", type=int, default=9, help="samples of each point")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--axes", nargs="+", choices=("F", "B", "k", "l"), default=["F", "B", "k", "l"])
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes, to see that nothing is broken")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows: list[dict[str, Any]] = []
    for axis in args.axes:
        sizes = [point for point in points(args.rehearse) if point.axis == axis]
        rows += measure_axis(sizes, args.device, args.threads, args.rounds)
    result = {**machine(args.device), "exponents": exponents(rows), "rows": rows}
    write_result(args.out, result, markdown_table(result))
    print(markdown_table(result))


if __name__ == "__main__":
    main()
