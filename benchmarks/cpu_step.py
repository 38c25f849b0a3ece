"""A full training step without a GPU, as a multiple of the encoder product alone.

One step: forward, backward, clip, decoder projection, Adam on every parameter, renormalisation. Each sample of
a variant stands beside two samples of the product x @ W_enc in the same round, one into memory that exists (the
floor), one that allocates its result; rounds go over the variants in turn. Ratios are medians of per-round
ratios. Memory is the peak of the process above what it holds between steps, in units of a float32 [B, F].

    python benchmarks/cpu_step.py --out benchmarks/results/cpu_step.json
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.measure import in_turn, machine, product, spread_columns, table, write_result
from benchmarks.worker import Worker
from benchmarks.workloads import CPU_STEPS, REHEARSAL, Workload, activations
from sampled_sae import RowAdam, SampledSAE, SampledSAEConfig
from sampled_sae.support.timing import peak_memory, timed


@dataclass(frozen=True)
class Variant:
    """A rule, and RowAdam's mode; one sample is the mean of `steps`."""

    rule: dict[str, Any]
    mode: str = "dense"
    steps: int = 1


VARIANTS = {
    "l=4": Variant({"l": 4.0}),
    "l=16": Variant({"l": 16.0}),
    "l=None (BatchTopK)": Variant({"l": None}),
    "token (TopK)": Variant({"l": None, "select": "token"}),
    "l=4, decayed": Variant({"l": 4.0}, "decayed"),
    "l=4, score_tokens=0.25": Variant({"l": 4.0, "score_tokens": 0.25}),
    "l=4, pool_every=4": Variant({"l": 4.0, "pool_every": 4}, steps=4),
    "l=4, decayed, pool_every=4": Variant({"l": 4.0, "pool_every": 4}, "decayed", steps=4),
}


def training_step(workload: Workload, variant: Variant) -> Callable[[torch.Tensor], None]:
    """The function that trains an SAE on one batch."""
    cfg = SampledSAEConfig(d_in=workload.d, d_sae=workload.F, k=workload.k, row_grads=True, **variant.rule)
    sae = SampledSAE(cfg)
    optimizer = RowAdam(sae, mode=variant.mode)

    def step(x: torch.Tensor) -> None:
        sae(x).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure_time(workload: Workload, rounds: int) -> list[dict[str, Any]]:
    batches = [activations(workload, seed) for seed in range(4)]
    steps = {name: training_step(workload, variant) for name, variant in VARIANTS.items()}
    W = torch.randn(workload.F, workload.d)
    floor = product(batches[0], W)

    def sample(name: str, round_: int) -> tuple[float, float, float]:
        """Seconds of a step, of the product into memory that exists and of the product that allocates."""
        n = VARIANTS[name].steps
        floor_seconds, allocating = timed(floor), timed(lambda: torch.mm(batches[0], W.t()))
        own = sum(timed(lambda x=batches[(round_ + i) % 4]: steps[name](x)) for i in range(n)) / n
        return own, floor_seconds, allocating

    samples = in_turn({name: partial(sample, name) for name in steps}, rounds)
    rows = []
    for name, measured in samples.items():
        rows.append(
            {
                "variant": name,
                **spread_columns([own / floor for own, floor, _ in measured], "ratio"),
                "ratio_to_allocating_product": statistics.median(own / fresh for own, _, fresh in measured),
                "step_ms": 1e3 * statistics.median(own for own, _, _ in measured),
                "product_ms": 1e3 * statistics.median(floor for _, floor, _ in measured),
                "rounds": len(measured),
            }
        )
    return rows


class MemorySession:
    """One variant in training, in a process of its own, so that nothing else's peak is counted."""

    def __init__(self, workload: Workload, name: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self.workload, self.step = workload, training_step(workload, VARIANTS[name])
        self.batches = [activations(workload, seed) for seed in range(4)]
        self.train(self.batches[:2])

    def train(self, batches: list[torch.Tensor]) -> None:
        for x in batches:
            self.step(x)

    def peak(self) -> float:
        """Above what is held between steps, of one float32 [B, F]."""
        return peak_memory(lambda: self.train(self.batches[2:])) / (4 * self.workload.B * self.workload.F)


def memory_of(workload: Workload, name: str, threads: int) -> float:
    worker = Worker(MemorySession, workload, name, threads)
    peak = worker.call("peak")
    worker.close()
    return float(peak)


def markdown_table(result: dict[str, Any]) -> str:
    """Ratios to the product, with p20 to p80, and memory."""
    rows = []
    for workload in result["workloads"]:
        for row in workload["rows"]:
            rows.append(
                [
                    "({B}, {d}, {F}, {k})".format(**workload),
                    row["variant"],
                    f"{row['ratio']:.2f}",
                    f"{row['ratio_p20']:.2f}–{row['ratio_p80']:.2f}",
                    f"{row['ratio_to_allocating_product']:.2f}",
                    f"{row['peak_extra_memory']:.2f}",
                ]
            )
    head = ["(B, d, F, k)", "variant", "step / product", "p20–p80", "step / allocating product", "peak extra memory"]
    return table(head, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write; a table goes beside it")
    parser.add_argument("--rounds", type=int, default=9, help="samples of each variant")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes, to see that nothing is broken")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    result = {**machine(), "workloads": []}
    print(f"{'(B, d, F, k)':28} {'variant':32} {'x product':>9} {'p20-p80':>11} {'x alloc.':>8} {'memory':>7}")
    for workload in REHEARSAL if args.rehearse else CPU_STEPS:
        rows = measure_time(workload, args.rounds)
        size = (workload.B, workload.d, workload.F, workload.k)
        for row in rows:
            row["peak_extra_memory"] = memory_of(workload, row["variant"], args.threads)
            spread = f"{row['ratio_p20']:.2f}-{row['ratio_p80']:.2f}"
            print(
                f"{size!s:28} {row['variant']:32} {row['ratio']:9.2f} {spread:>11} "
                f"{row['ratio_to_allocating_product']:8.2f} {row['peak_extra_memory']:7.3f}",
                flush=True,
            )
        result["workloads"].append({**vars(workload), "rows": rows})
    write_result(args.out, result, markdown_table(result))


if __name__ == "__main__":
    main()
