"""What is timed under which name: candidates, sizes, what stands beside a step, and the columns of its table."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.measure import Row
from benchmarks.peers import AUTOCAST, BATCH, CANDIDATES, TOKEN, UNDER_AUTOCAST, Entry, make, ours, plain
from benchmarks.record import SIZE, Columns, Result, markdown
from benchmarks.steps.harness import Harness, Task
from benchmarks.steps.loop_session import LoopSession
from benchmarks.steps.session import Size
from benchmarks.workloads import CPU_STEPS, GPU_STEPS, REHEARSAL, Workload, three_groups

Tasks = list[Task]
SIZES = {"cpu": CPU_STEPS, "cuda": GPU_STEPS}

RULES: dict[str, dict[str, Any]] = {"l=4": {"l": 4.0}, "l=None (BatchTopK)": BATCH, "token (TopK)": TOKEN}
VARIANTS = {
    "l=4": ours(l=4.0),
    "l=16": ours(l=16.0),
    "l=None (BatchTopK)": ours(**BATCH),
    "token (TopK)": ours(**TOKEN),
    "l=4, decayed": ours("decayed", l=4.0),
    "l=4, score_tokens=0.25": ours(l=4.0, score_tokens=0.25),
    "l=4, pool_every=4": ours(l=4.0, pool_every=4),
    "l=4, decayed, pool_every=4": ours("decayed", l=4.0, pool_every=4),
}


@dataclass(frozen=True)
class Experiment:
    """What it is about, its tasks by (rehearse, device), the columns of its table, and options of its Harness."""

    about: str
    tasks: Callable[[bool, str], Tasks]
    columns: Columns
    options: dict[str, Any] = field(default_factory=dict)


def grid(entries: dict[str, Entry], sizes: tuple[Workload, ...]) -> Tasks:
    """Every candidate at every size; those of one size in turn."""
    return [Task(name, entry, w, group=w.name) for w in sizes for name, entry in entries.items()]


def at_all_sizes(entries: dict[str, Entry], most: int | None = None) -> Callable[[bool, str], Tasks]:
    return lambda rehearse, device: grid(entries, REHEARSAL if rehearse else SIZES[device][:most])


def along_axes(rehearse: bool, device: str) -> Tasks:
    """Each axis alone; all sizes of one axis and rule in turn, so that a machine that slows down bends no curve.

    F goes to a million at d = 128 and 512 tokens, so that weights, moments and the product's result fit into memory;
    there Adam, which does not shrink with the batch, weighs more than in a usual training.
    """
    base = {"B": 32, "d": 16, "F": 128, "k": 2} if rehearse else {"B": 1024, "d": 256, "F": 16384, "k": 32}
    wide = base if rehearse else {"B": 512, "d": 128, "F": 16384, "k": 32}
    exponents = {"F": (wide, range(14, 21)), "B": (base, range(8, 14)), "k": (base, range(3, 9))}
    tasks = []
    for axis, (fixed, powers) in exponents.items():
        values = [fixed[axis], 2 * fixed[axis]] if rehearse else [2**i for i in powers]
        for name, rule in RULES.items():
            for value in values:
                size = Workload(axis, **{**fixed, axis: value})
                tasks.append(Task(name, ours(**rule), size, f"{axis}, {name}", {"value": value}))
    for l in (1, 2) if rehearse else (1, 2, 4, 8, 16, 32, 64):
        tasks.append(Task("l", ours(l=float(l)), Workload("l", **base), "l", {"value": l}))
    return tasks


def with_groups(rehearse: bool, device: str) -> Tasks:
    """Each rule with three groups of features, beside the same without."""
    found = {}
    (w,) = REHEARSAL[:1] if rehearse else SIZES[device][1:2]
    for name, rule in RULES.items():
        found[name] = ours(**rule)
        nested = ours(**rule, groups=three_groups(w.F))
        found[f"{name}, three groups"] = replace(nested, beside=name)
    return grid(found, (w,))


def before_and_after(tree: Path) -> dict[str, Entry]:
    """The variants by the package in `tree`, and by ours."""
    found = {}
    for name, entry in VARIANTS.items():
        found[f"{name}, before"] = replace(entry, tree=tree)
        found[name] = replace(entry, beside=f"{name}, before")
    return found


def library_loops() -> dict[str, Entry]:
    """Each library's loop with us; and alone, as it is and under bfloat16 autocast, as multiples of that."""
    found = {}
    for name in ("SAELens BatchTopK", "dictionary_learning BatchTopK", "sparsify TopK"):
        peer, ours = CANDIDATES[name], f"{name}, with us"
        loop = Entry("loops", peer.rule, {"library": peer.module, "with_us": True}, peer.distribution)
        found[ours] = loop
        found[name] = replace(loop, options={**loop.options, "with_us": False}, beside=ours)
        found[f"{name}{UNDER_AUTOCAST}"] = replace(found[name], dtype="bfloat16")
    return found


def on_a_gpu(graph: bool) -> dict[str, Entry]:
    """Every rule with RowAdam, l=4 with torch's Adam and decayed too, as CUDA graphs or with eager steps of the rules.

    The aux loss is off: no feature is dead, and a graph would compute it all the same.
    """
    fixed = {"impl": "triton", "aux_coefficient": 0.0}
    rules = {**RULES, "l=1": {"l": 1.0}, "l=16": {"l": 16.0}}
    optimizers = {"Adam": "Adam", "RowAdam dense": "dense", "RowAdam decayed": "decayed"}
    found = {}
    for name, rule in rules.items():
        for shown, optimizer in optimizers.items():
            if optimizer == "dense" or name == "l=4":
                entry = replace(ours(optimizer, **fixed, **rule), graph=graph)
                found[f"{name}, {shown}" + ", graph" * graph] = entry
    return found if graph else found | {f"{name}, eager PyTorch": plain(**rule) for name, rule in RULES.items()}


def first_step(name: str, w: Workload, harness: Harness) -> None:
    """Of ours on a GPU, to be compiled."""
    setup = harness.setup(w)
    size = Size(setup)
    make(on_a_gpu(graph=False)[name], setup, size.weights).step(size.batches[0])


P20_P80 = "{ratio_p20:.2f}–{ratio_p80:.2f}"
RATIO = {"step / product": "{ratio:.2f}", "p20–p80": P20_P80}
MEMORY = {"peak extra memory": "{peak_extra_memory:.2f}"}
VARIANT, STEP_OF, MS = {"variant": "{candidate}"}, {"step of": "{candidate}"}, {"ms": "{step_ms:.0f}"}
EXPERIMENTS = {
    "cpu_step": Experiment(
        "our step with each rule and setting",
        at_all_sizes(VARIANTS),
        {**SIZE, **VARIANT, **RATIO, "step / allocating product": "{ratio_to_allocating_product:.2f}", **MEMORY}
        | {"undecided columns": "{undecided_columns:.2%}", "undecided entries": "{undecided_entries:.2%}"},
        {"beside": ("product", "allocating")},
    ),
    "peer_steps": Experiment(
        "our step and those of the peers, each as its own library does it",
        at_all_sizes({**CANDIDATES, **AUTOCAST}),
        {**SIZE, **STEP_OF, **RATIO, **MS, **MEMORY, "first error off by": "{error_off:.0e}"},
    ),
    "scaling": Experiment(
        "our step against F, B, k and l, with fitted exponents",
        along_axes,
        {"axis": "{workload}", "at": "{value}", **SIZE, "rule": "{candidate}", "step / floor": "{ratio:.2f}"}
        | {"p20–p80": P20_P80, **MS, **MEMORY},
        {"beside": ("product", "chunks"), "checked": ""},
    ),
    "before_after": Experiment(
        "our step by another revision of this repository (--revision) and by this one",
        at_all_sizes(VARIANTS),
        {**SIZE, **VARIANT, **RATIO, "after / before": "{quotient:.2f}"}
        | {"its p20–p80": "{quotient_p20:.2f}–{quotient_p80:.2f}", **MS, **MEMORY},
    ),
    "drop_in": Experiment(
        "the libraries' own training loops with us and alone, on --activations; held-out FVU after --steps of them",
        at_all_sizes(library_loops(), 2),
        {**SIZE, "training loop": "{candidate}", **MS, "times as long as with us": "{quotient:.1f}"}
        | {"p20–p80": "{quotient_p20:.1f}–{quotient_p80:.1f}", "step / product": "{ratio:.2f}", **MEMORY}
        | {"held-out FVU": "{fvu:.4f} after {steps} steps", "activations": "{activations}"},
        {"checked": "beside", "session": LoopSession},
    ),
    "family": Experiment(
        "the step of a Matryoshka SAE with three groups beside the same step without",
        with_groups,
        {**SIZE, **STEP_OF, **RATIO, "with / without groups": "{quotient:.2f}"}
        | {"its p20–p80": "{quotient_p20:.2f}–{quotient_p80:.2f}", **MS, **MEMORY},
    ),
    "gpu_steps": Experiment(
        "every rule under bf16 autocast, with and without its optimizer, eager PyTorch's, and as CUDA graphs",
        lambda *where: at_all_sizes(on_a_gpu(graph=False))(*where) + at_all_sizes(on_a_gpu(graph=True))(*where),
        {**SIZE, **STEP_OF, **RATIO, "without optimizer": "{ratio_without_optimizer:.2f}", **MEMORY},
        {"beside": ("product", "without_optimizer")},
    ),
}
FITTED = {"step_ms": "step", "floor_ms": "floor", "peak_bytes": "memory"}


def table(name: str, result: Result) -> str:
    """The rows of an experiment; where one has no figures, the reason. For `scaling` the exponents come first."""
    rows = markdown(EXPERIMENTS[name].columns, result["rows"])
    if name != "scaling":
        return rows
    head = {"axis": "{axis}", "range": "{from} to {to}", "rule": "{rule}"}
    fitted = {f"exponent of {short}": f"{{{short}:.2f}}" for short in FITTED.values()}
    return markdown(head | fitted, exponents(result["rows"])) + "\n" + rows


def exponents(rows: Sequence[Row]) -> list[Row]:
    """For each axis and rule those of step, floor and memory."""
    found = []
    for axis, rule in dict.fromkeys((row["workload"], row["candidate"]) for row in rows if "reason" not in row):
        same = [row for row in rows if (row["workload"], row["candidate"]) == (axis, rule) and "reason" not in row]
        sizes = [row["value"] for row in same]
        slopes = {short: exponent(sizes, [row[measure] or 0 for row in same]) for measure, short in FITTED.items()}
        found.append({"axis": axis, "rule": rule, "from": min(sizes), "to": max(sizes), **slopes})
    return found


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float | None:
    """Slope of ln(values) against ln(sizes) by least squares; None for one point, or where a value is not positive."""
    if len(sizes) < 2 or min(values) <= 0:
        return None
    x, y = [math.log(s) for s in sizes], [math.log(v) for v in values]
    return statistics.linear_regression(x, y).slope
