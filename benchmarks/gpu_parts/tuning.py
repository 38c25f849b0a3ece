"""Other configurations of each kernel against the blessed one, in operations at the widths of real models.

A configuration under which an operation fails its check is refused. Besides its rows the part writes tuning.txt, the
lines for kernels/configs.py, and best.json, the best of each (d, F, B).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, suppress
from functools import partial
from math import prod
from typing import Any

import torch
import triton

from benchmarks.gpu_parts.candidates import candidates
from benchmarks.gpu_parts.compiling import compile_all, small
from benchmarks.measure import Row
from benchmarks.operations import OPERATIONS, SCORE_FORMS
from benchmarks.operations.operation import Inputs, Operation
from benchmarks.operations.race import verdict
from benchmarks.record import Record, parser, table_of
from benchmarks.replaced import replaced
from benchmarks.workloads import GPU_STEPS, REHEARSAL, Workload
from sampled_sae.kernels import configs, descriptors
from sampled_sae.support.atomic_files import write_json, write_text
from sampled_sae.support.timing import interleaved, spread

# what chooses a configuration, and the operations that show how good it is, where they ask for it (the filter of a
# search is in its product, or behind it where d is large; scores take their operands by descriptors, or by pointers
# where the GPU has none); the most expensive first
CHOICES = {
    "described_config": ("fused l2", "fused entropy"),
    "column_scores_config": ("fused l2", "fused entropy"),
    "FOLD": ("fused entropy",),
    "chunk_scores_config": ("chunked entropy",),
    "product_filter_config": ("select l=None",),
    "chunk_filter_config": ("select l=None",),
    "segment_sum_config": ("decode l=None", "backward l=None"),
    "entry_dots_config": ("backward l=None",),
    "radix_config": ("top-k of the block, l=4",),
    "rows_config": ("top-k of the block, l=4, token",),
    "row_adam_config": ("row-Adam dense",),
}
COLUMNS = {name: f"{{{name}}}" for name in ("table", "operation", "B", "d", "F", "config")}
COLUMNS |= {"ms": "{ms:.3g}", "of current": "{of current:.3f}"}
# below this a candidate is not worth a change
LEAST_GAIN = 0.02
# for all configurations of one operation
LEAST_SECONDS, MOST_SECONDS = 3, 5


def main() -> None:
    args = parser(__doc__, "--out", "--device", "--rehearse", "--within", rounds=9).parse_args()
    record = Record(args, table_of(COLUMNS))
    workloads = REHEARSAL if args.rehearse else GPU_STEPS
    few = small(record, workloads)
    compile_all(record, {f"{c}, {w.name}": partial(compile_choice, c, w, args.device) for w in few for c in CHOICES})
    for w in workloads:
        inputs = Inputs(w, args.device, torch.bfloat16, "triton")
        for choice, names in CHOICES.items():
            for name in names:
                row = {"table": choice, "operation": name, **w.columns()}
                record.attempt([row], partial(tried, inputs, row, args.rounds), LEAST_SECONDS)
        report(record)


def compile_choice(choice: str, w: Workload, device: str) -> None:
    """Every configuration once; what fails does so again when it is timed, and is told then."""
    operation = (OPERATIONS | SCORE_FORMS)[CHOICES[choice][-1]](Inputs(w, device, torch.bfloat16, "triton"))
    for config in candidates_of(choice, operation).values():
        with suppress(Exception):
            made(operation, choice, config)


def tried(inputs: Inputs, same: Row, rounds: int) -> list[Row]:
    """A row for each configuration, the current one first."""
    choice, operation = same["table"], (OPERATIONS | SCORE_FORMS)[same["operation"]](inputs)
    found = candidates_of(choice, operation)
    wrong = {}
    for name, config in found.items():
        with using(choice, config):
            wrong[name] = verdict(operation)
    right = {name: config for name, config in found.items() if wrong[name] == "passed"}
    samples = interleaved(
        {name: partial(made, operation, choice, config) for name, config in right.items()},
        inputs.device,
        rounds,
        MOST_SECONDS,
        warm_up=False,
        queued=True,
        prepare=operation.prepare,
    )
    rows = []
    current = next(iter(found), "")
    for name in found:
        rows.append({**same, "config": name, "in use": current})
        if name in samples:
            ratios = [own / theirs for own, theirs in zip(samples[name], samples[current])]
            rows[-1] |= {**vars(spread(samples[name])), "of current": spread(ratios).ms}
        else:
            rows[-1]["reason"] = wrong[name]
    return rows


def candidates_of(choice: str, operation: Operation) -> dict[str, triton.Config]:
    """By how they are written, the current one first; none where the operation does not ask for any."""
    real, asked = in_use(choice), []
    if isinstance(real, triton.Config):
        return candidates(choice, real)

    def noted(*args: Any) -> triton.Config:
        asked.append(real(*args))
        return asked[-1]

    with replaced(**{choice: noted}):
        operation.prepare()
        operation.ours()
    return candidates(choice, asked[-1]) if asked and asked[-1] is not None else {}


def in_use(choice: str) -> Any:
    """What stands under that name."""
    return getattr(descriptors if hasattr(descriptors, choice) else configs, choice)


def using(choice: str, config: triton.Config) -> AbstractContextManager[None]:
    """With a configuration in place of a constant, or of what a function chooses."""
    constant = isinstance(in_use(choice), triton.Config)
    return replaced(**{choice: config if constant else lambda *_: config})


def made(operation: Operation, choice: str, config: triton.Config) -> Any:
    with using(choice, config):
        return operation.ours()


def report(record: Record) -> None:
    """best.json and tuning.txt, from the rows so far."""
    timed = [row for row in record.rows if "ms" in row]
    best: dict[str, Row] = {}
    for row in timed:
        place = "{table}, {operation} at (B={B}, d={d}, F={F})".format(**row)
        if place not in best or row["ms"] < best[place]["ms"]:
            best[place] = row
    write_json(record.out.parent / "best.json", best)
    lines = ["# by the geometric mean over all sizes; rows that gain less than 2% stay as they are", *advice(timed)]
    write_text(record.out.parent / "tuning.txt", "\n".join(lines) + "\n")


def advice(rows: list[Row]) -> Iterator[str]:
    """A line for each configuration that is in use, with the one that should stand in its place."""
    for table, current in dict.fromkeys((row["table"], row["in use"]) for row in rows):
        own = [row for row in rows if (row["table"], row["in use"]) == (table, current)]
        races = {(row["operation"], row["B"], row["d"], row["F"]) for row in own}
        ratios: dict[str, list[float]] = {}
        for row in own:
            ratios.setdefault(row["config"], []).append(row["of current"])
        means = {name: prod(found) ** (1 / len(found)) for name, found in ratios.items() if len(found) == len(races)}
        name = min(means, key=lambda name: means[name])
        stays = means[name] > 1 - LEAST_GAIN
        yield f"{table}: {current}  # stays" if stays else f"{table}: {name}  # {means[name]:.3f} of {current}"


if __name__ == "__main__":
    main()
