"""A full training step of ours and of the peers, each as its own library does it, as a multiple of the encoder product.

Every candidate runs in a process of its own; rounds go over all of them in turn, and only one computes at a time. Each
sample of a step stands beside one of the product x @ W_enc, into memory that exists, in the same process. All start
from the same weights and see the same batches. A candidate whose reconstruction error on the first batch is not that
of the reference implementation gets no figure but the reason, and so does one that is not installed.

    python benchmarks/peer_steps.py --out benchmarks/results/peer_steps.json

Memory is the peak of a step above what the process holds between steps (gradients count), in units of one float32
[B, F]. With --device cuda in bfloat16 autocast, the product in bfloat16.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.measure import in_turn, machine, product, spread_columns, table, write_result
from benchmarks.peers import CANDIDATES, DISTRIBUTIONS, Setup, initial_weights, installed, make
from benchmarks.worker import Worker, WorkerError
from benchmarks.workloads import CPU_STEPS, GPU_STEPS, REHEARSAL, Workload, activations
from sampled_sae.support.timing import peak_memory, timed

TOLERANCE = {"cpu": 1e-3, "cuda": 2e-2}  # relative, of the first batch's error; bfloat16 moves some kept entries
BATCHES = 4


class StepSession:
    """One candidate in training on a workload, beside the product of the same sizes."""

    def __init__(self, name: str, workload: Workload, device: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self.workload, self.device = workload, device
        setup = Setup(workload.B, workload.d, workload.F, workload.k, device=device)
        weights = initial_weights(setup)
        self.batches = [activations(workload, seed).to(device) for seed in range(BATCHES)]
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        self.floor = product(self.batches[0].to(dtype), weights.W_enc.to(device, dtype))
        self.candidate = make(name, setup, weights)

    def first_error(self) -> float:
        """Of batch 0 and the initial weights, by a whole step."""
        return float(self.candidate.step(self.batches[0]))

    def sample(self, round_: int) -> tuple[float, float]:
        """Seconds of a step, and of the product before it."""
        self.floor()  # wakes threads and caches after the other processes' turns
        floor = timed(self.floor, self.device)
        x = self.batches[round_ % BATCHES]
        return timed(lambda: self.candidate.step(x), self.device), floor

    def memory(self) -> float:
        """Peak above what is held between steps, of one float32 [B, F]."""

        def steps() -> None:
            for x in self.batches[:2]:
                self.candidate.step(x)

        return peak_memory(steps, self.device) / (4 * self.workload.B * self.workload.F)


class ReferenceSession:
    """What the reference implementation says of the first batch."""

    def __init__(self, workload: Workload, threads: int) -> None:
        torch.set_num_threads(threads)
        self.k = workload.k
        self.weights = initial_weights(Setup(workload.B, workload.d, workload.F, workload.k))
        self.x = activations(workload, 0)

    @torch.no_grad()
    def error(self, rule: dict[str, Any]) -> float:
        return float(self.weights.sae(self.k, impl="reference", **rule)(self.x).mse)


def expected_errors(workload: Workload, names: list[str], threads: int) -> dict[str, float]:
    """The first batch's error of each candidate's rule, by the reference implementation."""
    worker = Worker(ReferenceSession, workload, threads)
    found: dict[str, float] = {}
    for name in names:
        rule = CANDIDATES[name].rule
        same = [other for other in found if CANDIDATES[other].rule == rule]
        found[name] = found[same[0]] if same else worker.call("error", rule)
    worker.close()
    return found


def groups(names: list[str], workload: Workload, limit: float) -> Iterator[list[str]]:
    """Candidates that fit into `limit` bytes together: weights, moments and a [B, F] each, ten [B, F] for a step."""
    block = 4 * workload.B * workload.F
    each = 4 * 7 * workload.d * workload.F + block + 2**29
    size = max(1, int((limit - 10 * block) // each))
    for start in range(0, len(names), size):
        yield names[start : start + size]


def measure(
    workload: Workload, names: list[str], rounds: int, device: str, threads: int, limit: float
) -> list[dict[str, Any]]:
    """A row for each candidate; one that failed has a `reason` and no figures."""
    rows: dict[str, dict[str, Any]] = {name: {"candidate": name} for name in names}
    present = [name for name in names if installed(name)]
    for name in set(names) - set(present):
        rows[name]["reason"] = "not installed"
    expected = expected_errors(workload, present, threads)
    for group in groups(present, workload, limit):
        workers = {}
        for name in group:
            try:
                workers[name] = Worker(StepSession, name, workload, device, threads)
                error = workers[name].call("first_error")
            except WorkerError as failure:
                rows[name]["reason"] = str(failure)
                workers.pop(name, None)
                continue
            rows[name] |= {"first_error": error, "reference_error": expected[name]}
            if abs(error / expected[name] - 1) > TOLERANCE[device]:
                rows[name]["reason"] = f"error {error:.6g} on the first batch, the reference has {expected[name]:.6g}"
                workers.pop(name).close()
        samples = in_turn({name: sampler(worker, rows[name]) for name, worker in workers.items()}, rounds)
        for name, worker in workers.items():
            if "reason" not in rows[name]:
                rows[name] |= figures(samples[name])
                rows[name]["peak_extra_memory"] = worker.call("memory")
            worker.close()
        for name in group:
            print(f"{workload.name}: {line(rows[name])}", flush=True)
    return list(rows.values())


def sampler(worker: Worker, row: dict[str, Any]) -> Callable[[int], tuple[float, float]]:
    """A worker that fails leaves its reason in the row and is not asked again."""

    def sample(round_: int) -> tuple[float, float]:
        try:
            return worker.call("sample", round_) if "reason" not in row else (0.0, 1.0)
        except WorkerError as failure:
            row["reason"] = str(failure)
            return 0.0, 1.0

    return sample


def figures(samples: list[tuple[float, float]]) -> dict[str, Any]:
    return {
        **spread_columns([own / floor for own, floor in samples], "ratio"),
        **spread_columns([1e3 * own for own, _ in samples], "step_ms"),
        **spread_columns([1e3 * floor for _, floor in samples], "product_ms"),
        "rounds": len(samples),
    }


def line(row: dict[str, Any]) -> str:
    if "reason" in row:
        return f"{row['candidate']}: {row['reason']}"
    return f"{row['candidate']}: {row['ratio']:.2f} x product, memory {row['peak_extra_memory']:.2f}"


def markdown_table(result: dict[str, Any]) -> str:
    """Ratios to the product with p20 to p80, milliseconds, memory; the reason where there is no figure."""
    rows = []
    for workload in result["workloads"]:
        size = "({B}, {d}, {F}, {k})".format(**workload)
        for row in workload["rows"]:
            if "reason" in row:
                rows.append([size, row["candidate"], f"– ({row['reason']})", "", "", ""])
                continue
            rows.append(
                [
                    size,
                    row["candidate"],
                    f"{row['ratio']:.2f}",
                    f"{row['ratio_p20']:.2f}–{row['ratio_p80']:.2f}",
                    f"{row['step_ms']:.0f}",
                    f"{row['peak_extra_memory']:.2f}",
                ]
            )
    return table(["(B, d, F, k)", "step of", "step / product", "p20–p80", "ms", "peak extra memory"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write; a table goes beside it")
    parser.add_argument("--rounds", type=int, default=7, help="samples of each candidate")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory", type=float, default=18.0, help="GiB that the processes may take together")
    parser.add_argument("--candidates", nargs="+", choices=list(CANDIDATES), default=list(CANDIDATES))
    parser.add_argument("--workloads", nargs="+", help="names in benchmarks/workloads.py")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes, to see that nothing is broken")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    workloads = REHEARSAL if args.rehearse else CPU_STEPS if args.device == "cpu" else GPU_STEPS
    if args.workloads:
        workloads = tuple(w for w in workloads if w.name in args.workloads)
    result: dict[str, Any] = {**machine(args.device, DISTRIBUTIONS), "workloads": []}
    for workload in workloads:
        rows = measure(workload, args.candidates, args.rounds, args.device, args.threads, args.memory * 2**30)
        result["workloads"].append({**asdict(workload), "rows": rows})
        write_result(args.out, result, markdown_table(result))
    print(markdown_table(result))


if __name__ == "__main__":
    main()
