"""What a training step should take on a GPU, predicted without one: launches, bytes, FLOPs and instructions, added up.

    python -m benchmarks.model                 writes benchmarks/results/predicted.json and .md
    python -m benchmarks.model --check         exits 1 where a prediction is worse than the file's by more than 5%

A step runs on tensors without memory (device "meta") at its real size: every launch of a kernel and every operation of
PyTorch is recorded, none is made. Each then takes the longest of its bytes at the memory's rate, its FLOPs at the
product's and its instructions at the rate they are issued, as `benchmarks/results/compiled` counts them; one after
another. No overlap, no cache, no waiting: these are predictions and no measurements.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.compiled.table import TABLES
from benchmarks.measure import RESULTS, Row
from benchmarks.record import markdown
from benchmarks.replaced import replaced
from sampled_sae import RowAdam, SampledSAE, SampledSAEConfig
from sampled_sae.impl import interface
from sampled_sae.impl.triton import block, layer, products, scores

FILE = RESULTS / "predicted.json"
B, F, K = 8192, 65536, 64
WIDTHS, LS, DTYPES, MODES = (768, 2304, 4096), (4.0, None), ("bfloat16", "float32"), ("decayed", "dense")
ALLOWED = 1.05


@dataclass(frozen=True)
class Device:
    """What a GPU reaches, not its peak: TFLOP/s of products by dtype, TB/s of its memory and of its L2, multiprocessors
    and their GHz."""

    arch: str
    tflops: dict[str, float]
    tbs: float
    l2_tbs: float
    multiprocessors: int
    ghz: float


# every constant of the model
DEVICES = {
    "H100": Device("sm_90", {"bfloat16": 798, "float32": 51}, 3.0, 5.5, 132, 1.75),
    "H200": Device("sm_90", {"bfloat16": 790, "float32": 51}, 4.3, 5.5, 132, 1.75),
    "A100": Device("sm_80", {"bfloat16": 260, "float32": 17}, 1.75, 4.0, 108, 1.41),
}
# a multiprocessor issues so many instructions of warps a cycle
ISSUED = 4
# bytes of a matrix whose rows, gathered again and again, come from L2
FITS_L2 = 32 << 20
# of the library's rate, what the fused score kernel multiplies at
FUSED = 0.8
# passes of a radix sort, each of which reads and writes keys and places
SORT_PASSES = 4
# microseconds that the shortest launch takes on the device, and that any takes on the host
SHORTEST_US, HOST_US = 2.0, 12.0
# kernel -> its row in the tables of compiled code, for kernels that are not bound by a loop of unknown length
CODE = {
    "append_above_kernel": "chunk_filter: whole dictionary",
    "chunk_partials_kernel": "chunk_scores: partials l2",
    "row_adam_kernel": "row_adam: dense d=4096",
}
# times that a kernel's loop, of known length, goes through its code
TRIPS: dict[str, Callable[[dict[str, Any]], int]] = {"chunk_partials_kernel": lambda c: c["STEPS"]}


@dataclass(frozen=True)
class Work:
    """One launch on the device. cached: bytes that come from L2."""

    name: str
    bytes: int = 0
    cached: int = 0
    flops: int = 0
    dtype: str = "float32"
    instructions: Callable[[str], int] = lambda arch: 0

    def seconds(self, on: Device) -> float:
        rate = on.tflops[self.dtype] * (FUSED if self.name == "column_partials_kernel" else 1)
        issued = self.instructions(on.arch) / (ISSUED * on.multiprocessors * on.ghz * 1e9)
        moved = self.bytes / (on.tbs * 1e12) + self.cached / (on.l2_tbs * 1e12)
        return max(moved, self.flops / (rate * 1e12), issued, SHORTEST_US * 1e-6)


def size(*tensors: Any) -> int:
    """Bytes of tensors, an expanded one as often as it is in memory."""
    return sum(t.itemsize * math.prod(n for n, s in zip(t.shape, t.stride()) if s) for t in tensors if t is not None)


def adam_bytes(a: dict[str, Any], c: dict[str, Any]) -> int:
    """Weight and moments read and written, the gradient read, the copy written."""
    row = 2 * sum(a[name].itemsize for name in ("weight", "exp_avg", "exp_avg_sq"))
    row += 0 if a["copy"] is None else a["copy"].itemsize
    return a["R"] * c["D"] * row + size(a["grad"])


# what a launch moves: of the others each argument once
BYTES: dict[str, Callable[[dict[str, Any], dict[str, Any]], int]] = {
    "append_above_kernel": lambda a, c: size(a["z"]),
    "refill_kernel": lambda a, c: 0,
    "row_adam_kernel": adam_bytes,
    "entry_dots_kernel": lambda a, c: size(a["left"], a["tokens"], a["features"]),
    "rests_kernel": lambda a, c: size(a["partials"]),
    "segments_kernel": lambda a, c: size(a["weights"], a["partials"], a["out"]),
    "write_pool_kernel": lambda a, c: 2 * size(a["z"]) + size(a["copy"]),
    "keep_rows_kernel": lambda a, c: 2 * size(a["z"]) + size(a["copy"]),
    "keep_long_rows_kernel": lambda a, c: 4 * size(a["z"]) + size(a["copy"]),
}
# and of which matrix it gathers a row for each entry of which list
GATHERED = {"entry_dots_kernel": ("W", "tokens"), "segments_kernel": ("source", "weights")}


def work_of_launch(kernel: Any, config: triton.Config, grid: Any, args: tuple[Any, ...], **constexprs: Any) -> Work:
    name, a = kernel.fn.__name__, dict(zip(kernel.arg_names, args))
    c = {**constexprs, **config.kwargs}
    tensors = [t for t in args if isinstance(t, Tensor)]
    moved = BYTES[name](a, c) if name in BYTES else size(*tensors)
    cached = 0
    if name in GATHERED:
        source, entries = (a[argument] for argument in GATHERED[name])
        gathered = len(entries) * source.shape[1] * source.itemsize
        moved, cached = (moved + size(source), gathered) if size(source) <= FITS_L2 else (moved + gathered, 0)
    programs = math.prod(grid(c) if callable(grid) else grid)
    flops = 2 * a["B"] * a["F"] * c["D"] if name == "column_partials_kernel" else 0
    dtype = str(a["W"].dtype).removeprefix("torch.") if flops else "float32"
    times = programs * config.num_warps * TRIPS.get(name, lambda c: 1)(c)
    return Work(name, moved, cached, flops, dtype, lambda arch: times * instructions(arch).get(CODE.get(name, ""), 0))


def instructions(arch: str) -> dict[str, int]:
    """By row of the table of compiled code."""
    rows = re.findall(r"^\| (\w+: .*?) \|(.*)\|$", (TABLES / f"{arch}.md").read_text(), re.MULTILINE)
    return {name: int(cells.split("|")[4]) for name, cells in rows}


class Trace(TorchDispatchMode):
    """Notes every operation of PyTorch, those inside this package's operators too."""

    FREE = ("empty", "view", "detach", "alias", "resize", "set_", "_unsafe_view", "lift_fresh", "expand", "_reshape")

    def __init__(self) -> None:
        super().__init__()
        self.works: list[Work] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func.namespace == "sampled_sae":
            with self:
                return OPDEFS[func._schema.name]._init_fn(*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        if not func.is_view and not name.startswith(self.FREE):
            self.works.append(self._work(name, [*args, *(kwargs or {}).values()], out))
        return out

    def _work(self, name: str, args: list[Any], out: Any) -> Work:
        flat = [t for a in args for t in (a if isinstance(a, (list, tuple)) else [a]) if isinstance(t, Tensor)]
        made = [t for t in (out if isinstance(out, (list, tuple)) else [out]) if isinstance(t, Tensor)]
        if name == "mm":
            return product_work(flat[0], flat[1], made[0])
        if name == "sort":
            return Work("sort", SORT_PASSES * 2 * size(*made))
        if name == "index_select":
            return Work("gather", 2 * size(*made) + size(flat[1]))
        if name.startswith(("index_copy", "index_fill", "index_put")):
            return Work("scatter", 2 * size(*flat[1:]))
        written = () if name in ("fill_", "zero_") else flat
        return Work("PyTorch passes", size(*made) + size(*written))


def product_work(a: Tensor, b: Tensor, out: Tensor) -> Work:
    flops = 2 * a.shape[0] * a.shape[1] * b.shape[1]
    return Work("products of cuBLAS", size(a, b, out), 0, flops, str(a.dtype).removeprefix("torch."))


def traced(d: int, l: float | None, dtype: str, arch: str) -> dict[str, list[Work]]:
    """The launches of one step in training, in which no feature is dead, by mode of RowAdam."""
    trace = Trace()

    def launch(*args: Any, **constexprs: Any) -> None:
        trace.works.append(work_of_launch(*args, **constexprs))

    def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
        made = a.new_empty(a.shape[0], b.shape[1], dtype=torch.float32) if out is None else out
        trace.works.append(product_work(a, b, made))
        return made

    with ExitStack() as stack:
        for owner in (products, block):
            stack.enter_context(patch.object(owner, "product", product))
        stack.enter_context(patch.object(layer, "product_dtype", lambda x: getattr(torch, dtype)))
        stack.enter_context(patch.object(scores, "architecture", lambda device: arch))
        stack.enter_context(patch.object(interface, "interpreted", lambda: True))
        known = {"architecture": lambda device: arch, "resident_programs": lambda device: 2 * 132}
        stack.enter_context(replaced(launch=launch, **known))
        config = SampledSAEConfig(d, F, K, l, impl="triton", row_grads=True, aux_coefficient=0.0)
        with patch.object(torch, "randn", lambda *shape, **options: torch.empty(*shape, device="meta")):
            sae = SampledSAE(config, device="meta")
        stack.enter_context(patch.object(sae.memory.inputs, "check", lambda x: torch.isfinite(x).all()))
        x = torch.empty(B, d, device="meta")

        def second(call: Callable[[], Any]) -> list[Work]:
            """What it does once there are moments, and a threshold to begin with."""
            call()
            trace.works.clear()
            with trace:
                call()
            return [*trace.works]

        def forward_and_backward() -> None:
            sae.zero_grad()
            sae(x, scaled=True).loss.backward()

        both = second(forward_and_backward)
        return {mode: both + second(RowAdam(sae, mode=mode).step) for mode in MODES}


def predictions() -> Iterator[Row]:
    """A row for each size, rule, optimizer and device."""
    for dtype in DTYPES:
        for d in WIDTHS:
            for l in LS:
                for name, on in DEVICES.items():
                    works = traced(d, l, dtype, on.arch)
                    yield from (predicted(works[mode], name, d, l, dtype, mode) for mode in MODES)


def predicted(works: list[Work], name: str, d: int, l: float | None, dtype: str, mode: str) -> Row:
    on = DEVICES[name]
    floor = 2 * B * d * F / (on.tflops[dtype] * 1e12)
    shares: Counter[str] = Counter()
    for work in works:
        shares[work.name] += work.seconds(on) / floor
    return {
        "device": name,
        **{"dtype": dtype, "B": B, "d": d, "F": F, "k": K, "l": l, "adam": mode, "launches": len(works)},
        "GB": round(sum(work.bytes + work.cached for work in works) / 1e9, 3),
        "TFLOP": round(sum(work.flops for work in works) / 1e12, 3),
        "ms": round(1e3 * floor * shares.total(), 4),
        "of_product": round(shares.total(), 4),
        "host_ms": round(1e-3 * HOST_US * len(works), 3),
        "shares": {part: round(share, 4) for part, share in shares.most_common()},
    }


COLUMNS = {name: f"{{{name}}}" for name in ("device", "dtype", "d", "l", "adam", "launches", "GB", "TFLOP")}
COLUMNS |= {"ms": "{ms:.2f}", "of the product": "{of_product:.2f}", "host, ms": "{host_ms:.1f}"}
PARTS = {"d": "{d}", "l": "{l}", "adam": "{adam}", "of the product, part by part": "{parts}"}
HEAD = f"""# Predicted, not measured

Written by `python -m benchmarks.model`, which says how: a training step of B={B} tokens, F={F}, k={K}, in units of the
encoder product 2BdF. No GPU has run it. The constants, such as the rates of each GPU, stand in `benchmarks/model.py`.
"""


def table(rows: list[Row]) -> str:
    shown = [row for row in rows if (row["device"], row["dtype"]) == ("H100", "bfloat16")]
    lines = []
    for row in shown:
        parts = ", ".join(f"{part} {share:.2f}" for part, share in row["shares"].items() if share >= 0.02)
        lines.append({**row, "parts": parts})
    return f"{HEAD}\n{markdown(COLUMNS, rows)}\nWhere it goes on an H100 in bfloat16:\n\n{markdown(PARTS, lines)}"


def key(row: Row) -> str:
    return " ".join(str(row[name]) for name in ("device", "dtype", "d", "l", "adam"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where a prediction became worse")
    args = parser.parse_args()
    if triton.knobs.runtime.interpret:
        sys.exit("TRITON_INTERPRET is set: the kernels' sizes would be the interpreter's; unset it")
    rows = [*predictions()]
    if not args.check:
        FILE.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
        FILE.with_suffix(".md").write_text(table(rows))
        return 0
    before = {key(row): row for row in json.loads(FILE.read_text())["rows"]}
    worse = [row for row in rows if row["ms"] > ALLOWED * before.get(key(row), {"ms": 0})["ms"]]
    for row in worse:
        print(f"{key(row)}: {row['ms']} ms, {before.get(key(row), {}).get('ms', 'nothing')} in {FILE.name}")
    return 1 if worse else 0


if __name__ == "__main__":
    raise SystemExit(main())
