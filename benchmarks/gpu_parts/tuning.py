"""Other configurations of each kernel against the blessed one, at the widths of real models.

Each is first held to the result of the current one. Besides its rows the part writes tuning.txt, the lines for
kernels/configs.py, and best.json, the best of each (d, F, B).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from math import prod
from typing import Any

import torch

from benchmarks.gpu_parts.compiling import Named, compile_all, small
from benchmarks.gpu_parts.tunable import Tunable, tunables
from benchmarks.gpu_parts.visit import Row, Visit, failure
from benchmarks.workloads import Workload
from sampled_sae.support.atomic_files import write_json, write_text
from sampled_sae.support.timing import interleaved, spread
from sampled_sae.testing import relative_error

# a sum in another order
TOLERANCE = 1e-5
# below this a candidate is not worth a change
LEAST_GAIN = 0.02
ROUNDS = 9
DTYPE = torch.bfloat16
# for all configurations of one table's row
LEAST_SECONDS, MOST_SECONDS = 3, 5


def run(visit: Visit) -> None:
    compile_all(visit, configurations, [(w, visit.device) for w in small(visit, visit.workloads)])
    for w in visit.workloads:
        # what a kernel is timed on comes from other kernels, which may fail too
        visit.attempt({"table": "all", "key": "", **w.columns()}, try_all, visit, w)
        report(visit)


def try_all(visit: Visit, w: Workload) -> list[Row]:
    """Adds the rows of one workload; there are no others."""
    for tunable in tunables(w, visit.device, DTYPE):
        row = {"table": tunable.table, "key": tunable.key, **w.columns()}
        visit.attempt(row, tried, tunable, w, visit, least=LEAST_SECONDS)
    return []


def configurations(w: Workload, device: str) -> Iterator[Named]:
    """To be compiled."""
    for tunable in tunables(w, device, DTYPE):
        for value in tunable.candidates:
            yield f"{tunable.table} {tunable.written(value)}", partial(result_under, tunable, value)


def tried(tunable: Tunable, w: Workload, visit: Visit) -> list[Row]:
    """A row for each configuration, the current one first."""
    same = {"table": tunable.table, "key": tunable.key, **w.columns()}
    tunable.prepare()
    expected = tunable.result(tunable.call()).clone()
    rows, values = [], {}
    current = tunable.written(tunable.current)
    for value in (tunable.current, *tunable.candidates):
        name = tunable.written(value)
        if name in values:
            continue
        try:
            wrong = difference(tunable, value, expected)
        except Exception as error:
            wrong = failure(error)
        if wrong:
            rows.append({**same, "config": name, "current": name == current, "note": wrong})
        else:
            values[name] = value
    del expected
    samples = race(tunable, values, visit)
    measured = [
        {**same, "config": name, "current": name == current, **vars(spread(own)), "of current": ratio}
        for name, own in samples.items()
        for ratio in [spread([a / c for a, c in zip(own, samples[current])]).ms]
    ]
    return measured + rows


def difference(tunable: Tunable, value: Any, expected: torch.Tensor) -> str | None:
    """How the result under `value` differs from the current one's, if it does."""
    found = tunable.result(result_under(tunable, value))
    if tunable.exact:
        return None if torch.equal(found, expected) else "another result"
    error = relative_error(found, expected.double())
    return None if error <= TOLERANCE else f"differs by {error:.2g}"


def result_under(tunable: Tunable, value: Any) -> Any:
    """What the kernel returns in a configuration."""
    tunable.prepare()
    return called(tunable, value)


def called(tunable: Tunable, value: Any) -> Any:
    with tunable.using(value):
        return tunable.call()


def race(tunable: Tunable, values: dict[str, Any], visit: Visit) -> dict[str, list[float]]:
    """Milliseconds by name, all in turn."""
    return interleaved(
        {name: partial(called, tunable, value) for name, value in values.items()},
        visit.device,
        1 if visit.rehearse else ROUNDS,
        visit.share(1, MOST_SECONDS),
        warm_up=False,
        queued=True,
        prepare=tunable.prepare,
    )


def report(visit: Visit) -> None:
    """best.json and tuning.txt, from the rows so far."""
    timed_rows = [row for row in visit.rows if "ms" in row]
    best: dict[str, Row] = {}
    for row in timed_rows:
        place = f"{row['table']} {row['key']} at (B={row['B']}, d={row['d']}, F={row['F']})"
        if place not in best or row["ms"] < best[place]["ms"]:
            best[place] = row
    write_json(visit.out / "best.json", best)
    lines = ["# by the geometric mean over all sizes; rows that gain less than 2% stay as they are"]
    for table, key in dict.fromkeys((row["table"], row["key"]) for row in timed_rows):
        lines.append(advice(table, key, [r for r in timed_rows if (r["table"], r["key"]) == (table, key)]))
    write_text(visit.out / "tuning.txt", "\n".join(lines) + "\n")


def advice(table: str, key: str, rows: list[Row]) -> str:
    """The line for one row of a table."""
    sizes = len({(r["B"], r["d"], r["F"]) for r in rows})
    ratios: dict[str, list[float]] = {}
    for row in rows:
        ratios.setdefault(row["config"], []).append(row["of current"])
    means = {name: prod(r) ** (1 / len(r)) for name, r in ratios.items() if len(r) == sizes}
    name = min(means, key=lambda name: means[name])
    current = next(row["config"] for row in rows if row["current"])
    if means[name] > 1 - LEAST_GAIN:
        return f"{table}[{key}]: {current}  # stays"
    return f"{table}[{key}]: {name}  # {means[name]:.3f} of {current}"
