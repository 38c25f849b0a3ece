"""Other configurations of each kernel against the blessed one, at the widths of real models.

Each is first held to the result of the current one. Besides its rows the part writes tuning.txt, the lines for
kernels/configs.py, and best.json, the best of each (d, F, B).
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from math import prod
from typing import Any

import torch

from benchmarks.gpu_parts.tunable import Tunable, tunables
from benchmarks.gpu_parts.visit import Row, Visit
from benchmarks.workloads import GPU_STEPS, REHEARSAL, Workload
from sampled_sae.files import write_json, write_text
from sampled_sae.testing import relative_error
from sampled_sae.timing import spread, timed

# a sum in another order
TOLERANCE = 1e-5
# below this a candidate is not worth a change
LEAST_GAIN = 0.02
ROUNDS = 9
COMPILERS = 6


def run(visit: Visit) -> None:
    dtype = torch.bfloat16
    compile_all(visit, dtype)
    for w in visit.workloads:
        for tunable in tunables(w, visit.device, dtype):
            if visit.left < 3:
                visit.add({"table": tunable.table, "key": tunable.key, "note": "no time left", **w.columns()})
            else:
                visit.add(*tried(tunable, w, visit))
            visit.release()
        report(visit)


def compile_all(visit: Visit, dtype: torch.dtype) -> None:
    """Fills Triton's cache from several processes: compilation takes longer than all timings together."""
    # few tokens and features, of which the code does not depend, and a width that it does depend on
    small = REHEARSAL if visit.rehearse else [Workload(w.name, 512, w.d, 4096, w.k) for w in GPU_STEPS]
    workers = 1 if visit.rehearse else min(COMPILERS, (os.cpu_count() or 2) // 2)
    end = time.time() + visit.left / 2
    tasks = [(w, visit.device, dtype, i, workers, end) for w in small for i in range(workers)]
    try:
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            for failed in pool.map(compile_some, tasks):
                if failed:
                    visit.add({"note": failed})
    except BrokenProcessPool as error:
        visit.add({"note": f"a compiling process died: {error}"[:200]})


def compile_some(task: tuple[Workload, str, torch.dtype, int, int, float]) -> str:
    """Runs every `of`-th candidate from the `first` on, until `end`; what failed, in a line."""
    w, device, dtype, first, of, end = task
    failed = []
    pairs = ((tunable, value) for tunable in tunables(w, device, dtype) for value in tunable.candidates)
    for tunable, value in itertools.islice(pairs, first, None, of):
        if time.time() > end:
            break
        tunable.prepare()
        try:
            with tunable.using(value):
                tunable.call()
        except Exception as error:
            failed.append(f"{tunable.table} {tunable.written(value)}: {type(error).__name__}"[:120])
    return "; ".join(failed)


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
            wrong = " ".join(f"{type(error).__name__}: {error}".split())[:160]
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
    tunable.prepare()
    with tunable.using(value):
        found = tunable.result(tunable.call())
    if tunable.exact:
        return None if torch.equal(found, expected) else "another result"
    error = relative_error(found, expected.double())
    return None if error <= TOLERANCE else f"differs by {error:.2g}"


def race(tunable: Tunable, values: dict[str, Any], visit: Visit) -> dict[str, list[float]]:
    """Milliseconds by name, all in turn."""
    samples: dict[str, list[float]] = {name: [] for name in values}
    for _ in range(1 if visit.rehearse else ROUNDS):
        for name, value in values.items():
            tunable.prepare()
            with tunable.using(value):
                samples[name].append(1e3 * timed(tunable.call, visit.device))
    return samples


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
