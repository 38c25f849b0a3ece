"""A full training step without a GPU, as a multiple of the encoder product alone.

One step: forward, backward, clip, decoder projection, Adam on every parameter, renormalisation. Each sample of
a variant stands beside two samples of the product x @ W_enc in the same round, one into memory that exists (the
floor), one that allocates its result; rounds go over the variants in turn. Ratios are medians of per-round
ratios. Memory is the peak of the process above what it holds between steps, in units of a float32 [B, F].

    python benchmarks/cpu_step.py --out benchmarks/results/cpu_step.json
"""

from __future__ import annotations

import argparse
import ctypes
import json
import multiprocessing
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.workloads import CPU_STEPS, Workload, activations
from sampled_sae import RowAdam, SampledSAE, SampledSAEConfig


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


def timed(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def measure_time(workload: Workload, rounds: int) -> list[dict[str, Any]]:
    batches = [activations(workload, seed) for seed in range(4)]
    steps = {name: training_step(workload, variant) for name, variant in VARIANTS.items()}
    W = torch.randn(workload.F, workload.d).t()
    out = torch.empty(workload.B, workload.F)
    samples: dict[str, list[tuple[float, float, float]]] = {name: [] for name in steps}
    for round_ in range(rounds + 2):
        x = batches[round_ % 4]
        for name, step in steps.items():
            floor = timed(lambda x=x: torch.mm(x, W, out=out))
            allocating = timed(lambda x=x: torch.mm(x, W))
            n = VARIANTS[name].steps
            own = sum(timed(lambda step=step, x=batches[(round_ + i) % 4]: step(x)) for i in range(n)) / n
            if round_ >= 2:
                samples[name].append((own, floor, allocating))
    rows = []
    for name, measured in samples.items():
        ratios = sorted(own / floor for own, floor, _ in measured)
        rows.append(
            {
                "variant": name,
                "ratio": statistics.median(ratios),
                "ratio_p20": ratios[len(ratios) // 5],
                "ratio_p80": ratios[-1 - len(ratios) // 5],
                "ratio_to_allocating_product": statistics.median(own / fresh for own, _, fresh in measured),
                "step_ms": 1e3 * statistics.median(own for own, _, _ in measured),
                "product_ms": 1e3 * statistics.median(floor for _, floor, _ in measured),
                "rounds": len(measured),
            }
        )
    return rows


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process, bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def measure_memory(workload: Workload, variant: Variant, threads: int, queue: Any) -> None:
    torch.set_num_threads(threads)
    batches = [activations(workload, seed) for seed in range(4)]
    step = training_step(workload, variant)
    for x in batches[:2]:
        step(x)
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    for x in batches[2:]:
        step(x)
    queue.put((resident("VmHWM") - before) / (4 * workload.B * workload.F))


def memory_of(workload: Workload, variant: Variant, threads: int) -> float:
    """In a process of its own, so that nothing else's peak is counted."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=measure_memory, args=(workload, variant, threads, queue))
    process.start()
    result = queue.get(timeout=600)
    process.join()
    return float(result)


def machine() -> dict[str, Any]:
    model = [
        line.split(":")[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "device": model[0] if model else platform.processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": date.today().isoformat(),
        "command": "python " + " ".join(sys.argv),
    }


def markdown_table(result: dict[str, Any]) -> str:
    """Ratios to the product, with p20 to p80, and memory."""
    lines = ["| (B, d, F, k) | variant | step / product | p20–p80 | step / allocating product | peak extra memory |"]
    lines.append("|---|---|---|---|---|---|")
    for workload in result["workloads"]:
        size = ", ".join(str(workload[field]) for field in ("B", "d", "F", "k"))
        for row in workload["rows"]:
            spread = f"{row['ratio_p20']:.2f}–{row['ratio_p80']:.2f}"
            lines.append(
                f"| ({size}) | {row['variant']} | {row['ratio']:.2f} | {spread} | "
                f"{row['ratio_to_allocating_product']:.2f} | {row['peak_extra_memory']:.2f} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write; a table goes beside it")
    parser.add_argument("--rounds", type=int, default=9, help="samples of each variant")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    result = {**machine(), "workloads": []}
    print(f"{'(B, d, F, k)':28} {'variant':32} {'x product':>9} {'p20-p80':>11} {'x alloc.':>8} {'memory':>7}")
    for workload in CPU_STEPS:
        rows = measure_time(workload, args.rounds)
        size = (workload.B, workload.d, workload.F, workload.k)
        for row in rows:
            row["peak_extra_memory"] = memory_of(workload, VARIANTS[row["variant"]], args.threads)
            spread = f"{row['ratio_p20']:.2f}-{row['ratio_p80']:.2f}"
            print(
                f"{size!s:28} {row['variant']:32} {row['ratio']:9.2f} {spread:>11} "
                f"{row['ratio_to_allocating_product']:8.2f} {row['peak_extra_memory']:7.3f}",
                flush=True,
            )
        result["workloads"].append({**vars(workload), "rows": rows})
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    args.out.with_suffix(".md").write_text(markdown_table(result))


if __name__ == "__main__":
    main()
