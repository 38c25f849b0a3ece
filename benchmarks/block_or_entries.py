"""Where a pool is better computed as a dense block [B, P] and where entry by entry: the training step both ways.

Sets BLOCK_PER_K of sampled_sae/torch_impl/layer.py. Rounds go over all variants in turn, the encoder product
beside each; ratios are medians.

    python benchmarks/block_or_entries.py --out benchmarks/results/block_or_entries.json
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.cpu_step import Variant, training_step
from benchmarks.measure import machine, table, write_result
from benchmarks.workloads import CPU_STEPS, activations
from sampled_sae.impl.torch import layer
from sampled_sae.support.timing import timed


def markdown_table(result: dict[str, Any]) -> str:
    """Multiples of the product for both forms."""
    lines = []
    for row in result["rows"]:
        size = "({B}, {d}, {F}, {k})".format(**row)
        lines.append([size, f"{row['l']:g}", f"{row['block']:.2f}", f"{row['entries']:.2f}"])
    return table(["(B, d, F, k)", "l", "as a block", "by entries"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write; a table goes beside it")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(2)
    rows: list[dict[str, Any]] = []
    for workload in CPU_STEPS[:2]:
        batches = [activations(workload, seed) for seed in range(4)]
        W = torch.randn(workload.F, workload.d).t()
        out = torch.empty(workload.B, workload.F)
        ls = (2.0, 4.0, 8.0, 12.0, 16.0, 24.0, 32.0)
        steps = {(l, form): training_step(workload, Variant({"l": l})) for l in ls for form in ("block", "entries")}
        ratios: dict[tuple[float, str], list[float]] = {key: [] for key in steps}
        for round_ in range(args.rounds + 2):
            x = batches[round_ % 4]
            for (l, form), step in steps.items():
                layer.use_block = lambda *_, form=form: form == "block"
                floor = timed(lambda x=x, W=W, out=out: torch.mm(x, W, out=out))
                own = timed(lambda step=step, x=x: step(x))
                if round_ >= 2:
                    ratios[l, form].append(own / floor)
        for l in ls:
            block, entries = (statistics.median(ratios[l, form]) for form in ("block", "entries"))
            rows.append({**vars(workload), "l": l, "block": block, "entries": entries})
            print(workload.name, l, round(block, 3), round(entries, 3), flush=True)
    result = {**machine(), "rows": rows}
    write_result(args.out, result, markdown_table(result))


if __name__ == "__main__":
    main()
