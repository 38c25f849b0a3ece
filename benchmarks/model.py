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
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.costs import DEVICES, HOST_US, SORT_PASSES, Work, size, work_of_launch
from benchmarks.measure import RESULTS, Row
from benchmarks.record import markdown
from benchmarks.replaced import replaced
from sampled_sae import RowAdam, SampledSAE, SampledSAEConfig
from sampled_sae.impl import interface
from sampled_sae.impl.triton import block, layer, products, screen_columns, stream
from sampled_sae.support.late_values import LateScalars, squares_finite

FILE = RESULTS / "predicted.json"
B, F, K = 8192, 65536, 64
WIDTHS, LS, DTYPES = (768, 2304, 4096), (4.0, None), ("bfloat16", "float32")
# RowAdam's, by the name that its rows have
ADAMS: dict[str, dict[str, Any]] = {
    "decayed": {"mode": "decayed"},
    "decayed, bf16 moments": {"mode": "decayed", "moments": torch.bfloat16},
    "dense": {"mode": "dense"},
    "dense, bf16 moments": {"mode": "dense", "moments": torch.bfloat16},
}
ALLOWED = 1.05


class Trace(TorchDispatchMode):
    """Notes every operation of PyTorch, those inside this package's operators too, and the memory that they make.

    works: one an operation. alive, peak: bytes of what was made and is not gone, now and at the most.
    """

    FREE = (
        "empty",
        "new_empty",
        "view",
        "detach",
        "alias",
        "resize",
        "set_",
        "_unsafe_view",
        "lift_fresh",
        "expand",
        "_reshape",
        "squeeze_",
        "promote_types",
        "_record_function",
    )
    # what is made of a shape alone: nothing is read for it
    FILLED = ("fill_", "zero_", "new_zeros", "new_ones", "new_full", "zeros_like", "ones_like", "full_like")

    def __init__(self) -> None:
        super().__init__()
        self.begin()

    def begin(self) -> None:
        """Anew."""
        self.works: list[Work] = []
        self.alive = self.peak = 0
        self._made: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func.namespace == "sampled_sae":
            with self:
                return OPDEFS[func._schema.name]._init_fn(*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        self._watch(tensors_of([out]), tensors_of([*args, *(kwargs or {}).values()]))
        name = func._schema.name.split("::")[1]
        if not name.startswith(self.FREE) and not (func.is_view and shares_memory(out, args[0])):
            self.works.append(self._work(name, [*args, *(v for k, v in (kwargs or {}).items() if k != "out")], out))
        return out

    def _watch(self, made: list[Tensor], given: list[Tensor]) -> None:
        """Counts the memory of what is made and not part of what was given, until nothing holds it."""
        known = {t.untyped_storage()._cdata for t in given}
        for storage in (t.untyped_storage() for t in made):
            key = storage._cdata
            if key not in known and key not in self._made:
                self._made.add(key)
                self.alive += storage.nbytes()
                self.peak = max(self.peak, self.alive)
                weakref.finalize(storage, self._gone, self._made, key, storage.nbytes()).atexit = False

    def _gone(self, made: set[int], key: int, n_bytes: int) -> None:
        made.remove(key)
        if made is self._made:
            self.alive -= n_bytes

    def _work(self, name: str, args: list[Any], out: Any) -> Work:
        flat, made = tensors_of(args), tensors_of([out])
        if name == "mm":
            return product_work(flat[0], flat[1], made[0])
        if name == "sort":
            return Work("sort", SORT_PASSES * 2 * size(*made))
        if name == "index_select":
            return Work("gather", 2 * size(*made) + size(flat[1]))
        if name.startswith(("index_copy", "index_fill", "index_put")):
            return Work("scatter", 2 * size(*flat[1:]))
        read = [] if name in self.FILLED else flat[1:] if name == "copy_" else flat
        return Work("PyTorch passes", size(*made) + size(*read))


def tensors_of(values: list[Any]) -> list[Tensor]:
    """Those among them, and in their lists and tuples."""
    flat = [v for value in values for v in (value if isinstance(value, (list, tuple)) else [value])]
    return [v for v in flat if isinstance(v, Tensor)]


def shares_memory(out: Any, source: Tensor) -> bool:
    """False where "to", "contiguous" or "reshape", views by their schema, have made a copy."""
    return not isinstance(out, Tensor) or out.untyped_storage()._cdata == source.untyped_storage()._cdata


def product_work(a: Tensor, b: Tensor, out: Tensor) -> Work:
    flops = 2 * a.shape[0] * a.shape[1] * b.shape[1]
    return Work("products of cuBLAS", size(a, b, out), 0, flops, str(a.dtype).removeprefix("torch."))


class Step(NamedTuple):
    """works: its launches. peak: bytes alive at the most beside what lives from step to step."""

    works: list[Work]
    peak: int


@cache
def traced(d: int, l: float | None, dtype: str, arch: str) -> dict[str, Step]:
    """One step in training, in which no feature is dead, by mode of RowAdam."""
    trace = Trace()

    def launch(*args: Any, **constexprs: Any) -> None:
        trace.works.append(work_of_launch(*args, **constexprs))

    def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
        made = a.new_empty(a.shape[0], b.shape[1], dtype=torch.float32) if out is None else out
        trace.works.append(product_work(a, b, made))
        return made

    with ExitStack() as stack:
        for owner in (products, block, screen_columns):
            stack.enter_context(patch.object(owner, "product", product))
        stack.enter_context(patch.object(layer, "product_dtype", lambda x: getattr(torch, dtype)))
        stack.enter_context(patch.object(stream, "architecture", lambda device: arch))
        stack.enter_context(patch.object(interface, "interpreted", lambda: True))
        stack.enter_context(patch.object(LateScalars, "arrived", lambda self, wait=False: iter(())))
        known = {"architecture": lambda device: arch, "multiprocessors": lambda device: 132}
        stack.enter_context(replaced(launch=launch, **known))
        # as "auto" on a GPU: float32 products of a step are looked through in bfloat16 first
        config = SampledSAEConfig(d, F, K, l, impl="triton", row_grads=True, aux_coefficient=0.0, screen="bf16")
        with patch.object(torch, "randn", lambda *shape, **options: torch.empty(*shape, device="meta")):
            sae = SampledSAE(config, device="meta")
        stack.enter_context(patch.object(sae.memory.inputs, "check", squares_finite))
        x = torch.empty(B, d, device="meta")

        def second(call: Callable[[], Any]) -> Step:
            """What it does once there are moments, and a threshold to begin with."""
            call()
            trace.begin()
            with trace:
                call()
            return Step([*trace.works], trace.peak)

        def forward_and_backward() -> None:
            sae.zero_grad()
            sae(x, scaled=True).loss.backward()

        # what an optimizer remembers of a backward pass counts too, once
        watching = RowAdam(sae, keep_rounded=True)
        both, gradients = second(forward_and_backward), trace.alive
        del watching
        found = {}
        for name, settings in ADAMS.items():
            optimizer = RowAdam(sae, keep_rounded=True, **settings)
            forward_and_backward()
            step = second(optimizer.step)
            found[name] = Step(both.works + step.works, max(both.peak, gradients + step.peak))
        return found


def predictions() -> Iterator[Row]:
    """A row for each size, rule, optimizer and device."""
    for dtype in DTYPES:
        for d in WIDTHS:
            for l in LS:
                for name, on in DEVICES.items():
                    steps = traced(d, l, dtype, on.arch)
                    yield from (predicted(steps[mode], name, d, l, dtype, mode) for mode in ADAMS)


def predicted(step: Step, name: str, d: int, l: float | None, dtype: str, mode: str) -> Row:
    works, on = step.works, DEVICES[name]
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
        "memory": round(step.peak / (4 * B * F), 4),
        "host_ms": round(1e-3 * HOST_US * len(works), 3),
        "shares": {part: round(share, 4) for part, share in shares.most_common()},
    }


COLUMNS = {name: f"{{{name}}}" for name in ("device", "dtype", "d", "l", "adam", "launches", "GB", "TFLOP")}
COLUMNS |= {"ms": "{ms:.2f}", "of the product": "{of_product:.2f}", "host, ms": "{host_ms:.1f}"}
COLUMNS |= {"memory": "{memory:.3f}"}
# What a step is to take on an H100 in bfloat16, of the product: (l, adam, d) -> at most; and for each of them
TARGETS = {
    (4.0, "decayed", 768): 1.45,
    (4.0, "decayed", 4096): 1.25,
    (4.0, "dense, bf16 moments", 768): 2.0,
    (4.0, "dense, bf16 moments", 4096): 2.0,
    (None, "decayed, bf16 moments", 768): 2.5,
    (None, "decayed, bf16 moments", 4096): 2.0,
}
HOST_MS, MEMORY = 1.2, 0.1
AIMS = {"l": "{l}", "adam": "{adam}", "d": "{d}", "of the product": "{of_product:.2f}", "asked": "{asked}"}
AIMS |= {"host, ms": "{host_ms:.2f}", "asked ": str(HOST_MS), "memory": "{memory:.3f}", "asked  ": str(MEMORY)}
PARTS = {"d": "{d}", "l": "{l}", "adam": "{adam}", "of the product, part by part": "{parts}"}
HEAD = f"""# Predicted, not measured

Written by `python -m benchmarks.model`, which says how: a training step of B={B} tokens, F={F}, k={K}, in units of the
encoder product 2BdF. No GPU has run it. The constants, such as the rates of each GPU, stand in `benchmarks/costs.py`.
Memory is the most that a step makes beside parameters, moments and copies of 16 bits, its gradients among it, in units
of a float32 [B, F].
"""


def table(rows: list[Row]) -> str:
    shown = [row for row in rows if (row["device"], row["dtype"]) == ("H100", "bfloat16")]
    aims, lines = [], []
    for row in shown:
        asked = TARGETS.get((row["l"], row["adam"], row["d"]))
        aims += [] if asked is None else [{**row, "asked": asked}]
        parts = ", ".join(f"{part} {share:.2f}" for part, share in row["shares"].items() if share >= 0.02)
        lines.append({**row, "parts": parts})
    asked_for = f"{HEAD}\nWhat was asked for on an H100 in bfloat16, at most:\n\n{markdown(AIMS, aims)}"
    where = f"Where it goes on an H100 in bfloat16:\n\n{markdown(PARTS, lines)}"
    return f"{asked_for}\n{markdown(COLUMNS, rows)}\n{where}"


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
