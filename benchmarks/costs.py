"""What one launch on a GPU costs: its bytes, FLOPs and instructions, and every constant that turns them into time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from benchmarks.compiled.table import committed
from sampled_sae.kernels.configs import FITS_L2


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
# Of the library's rate, what kernels multiply at that make something else of the product in place of writing it. With
# operands by tensor descriptors: an assumption, before its tiles and its epilogue are counted. On H100s Triton's loops
# are published at 0.92 of cuBLAS's rate with the epilogue at K = 512 (triton-lang/triton, pull 5726) and at 1.04 at
# K = 4096 in 8 bits (pull 5461); one with specialised warps, which this is not, at 0.97 at K = 1024
# (facebookexperimental/triton, pull 1038). Whether l=4 meets its targets hangs on it.
FUSED, DESCRIBED = 0.8, 0.95
# of a Hopper multiprocessor: bytes that shared memory moves, and multiplications of 16 bits, a cycle
SHARED_BYTES, MULTIPLICATIONS, ROWS_OF_A_WARPGROUP = 128, 2048, 64
# of the columns, what a screen leaves open: benchmarks/results/cpu_step.md has 4.9% for l=4 at this F, and more below
UNDECIDED = 1 / 20
# passes of a radix sort, each of which reads and writes keys and places
SORT_PASSES = 4
# microseconds that the shortest launch takes on the device, and that any takes on the host
SHORTEST_US, HOST_US = 2.0, 12.0
# kernel -> its row in the tables of compiled code, for kernels that are not bound by a loop of unknown length
CODE = {
    "append_above_kernel": "chunk_filter: whole dictionary",
    # of d = 768, the only width here for which it runs
    "append_products_kernel": "product_filter: bf16 small d",
    "chunk_partials_kernel": "chunk_scores: partials l2",
    "described_partials_kernel": "column_scores: descriptors bf16 l2",
    "row_adam_kernel": "row_adam: dense d=4096",
}
# those whose loop, of known length, goes STEPS times through its code
STEPPED = ("append_above_kernel", "chunk_partials_kernel")


@dataclass(frozen=True)
class Work:
    """One launch on the device.

    cached: bytes that come from L2. rate: of the library's, at which it multiplies. alone: whether nothing is
    multiplied while its instructions are issued.
    """

    name: str
    bytes: int = 0
    cached: int = 0
    flops: int = 0
    dtype: str = "float32"
    instructions: Callable[[str], int] = lambda arch: 0
    rate: float = 1.0
    alone: bool = False

    def seconds(self, on: Device) -> float:
        issued = self.instructions(on.arch) / (ISSUED * on.multiprocessors * on.ghz * 1e9)
        moved = self.bytes / (on.tbs * 1e12) + self.cached / (on.l2_tbs * 1e12)
        multiplied = self.flops / (on.tflops[self.dtype] * self.rate * 1e12)
        computed = multiplied + issued if self.alone else max(multiplied, issued)
        return max(moved, computed, SHORTEST_US * 1e-6)


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
    "refill_kernel": lambda a, c: 0,
    # half of the list is filled, or somewhat more
    "append_products_kernel": lambda a, c: size(a["x"], a["W"], a["b"]) + size(a["values"], a["keys"]),
    "row_adam_kernel": adam_bytes,
    "undecided_partials_kernel": lambda a, c: size(a["x"]) + round(UNDECIDED * size(a["W"], a["partials"])),
    "settle_kernel": lambda a, c: round(UNDECIDED * size(a["partials"])),
    "compute_candidates_kernel": lambda a, c: 2 * size(a["values"], a["keys"]) + size(a["left"]),
    # of which each stripe reads the entries anew
    "entry_dots_kernel": lambda a, c: (
        size(a["left"], a["out"]) + math.ceil(c["D"] / c["WIDTH"]) * size(a["tokens"], a["features"])
    ),
    "rests_kernel": lambda a, c: size(a["partials"]),
    "segments_kernel": lambda a, c: size(a["weights"], a["partials"], a["out"]),
    "write_pool_kernel": lambda a, c: 2 * size(a["z"]) + size(a["copy"]),
    "keep_rows_kernel": lambda a, c: 2 * size(a["z"]) + size(a["copy"]),
    "keep_long_rows_kernel": lambda a, c: 4 * size(a["z"]) + size(a["copy"]),
}
# launches that multiply, and the share of 2BdF
MULTIPLIED = {
    "column_partials_kernel": 1.0,
    "described_partials_kernel": 1.0,
    "append_products_kernel": 1.0,
    "undecided_partials_kernel": UNDECIDED,
}
# and of which matrix it gathers a row for each entry of which list
GATHERED = {
    "entry_dots_kernel": ("W", "tokens"),
    "segments_kernel": ("source", "weights"),
    # a full list; those left open are fewer
    "compute_candidates_kernel": ("W", "values"),
}
# kernels whose programs all read one stripe of the gathered matrix before the next, and its columns
STRIPED = {"segments_kernel": "BD", "entry_dots_kernel": "WIDTH"}
# kernels that read the product that cuBLAS has just written, and little else
AFTER_PRODUCT = ("append_above_kernel", "chunk_partials_kernel")
# of the library's rate, that of kernels' products
RATES: dict[str, Callable[[dict[str, Any], dict[str, Any], int], float]] = {
    "column_partials_kernel": lambda a, c, programs: FUSED,
    "append_products_kernel": lambda a, c, programs: FUSED,
    "described_partials_kernel": lambda a, c, programs: DESCRIBED * fed(c) * busy(a, c, programs),
}
# kernels of one program a multiprocessor, whose epilogue hides behind no product
ALONE = ("described_partials_kernel",)


def fed(c: dict[str, Any]) -> float:
    """Of what the matrix units could multiply, what shared memory feeds them in tiles BM x BN.

    Both operands are written there once. Each warpgroup reads its rows of one and all of the other.
    """
    read = c["BM"] + c["BN"] * c["BM"] / ROWS_OF_A_WARPGROUP
    moved = 2 * (read + c["BM"] + c["BN"]) / SHARED_BYTES
    return min(1.0, c["BM"] * c["BN"] / MULTIPLICATIONS / moved)


def busy(a: dict[str, Any], c: dict[str, Any], programs: int) -> float:
    """Of the tiles that programs walk over in rounds, those that exist."""
    return math.ceil(a["F"] / c["BM"]) * math.ceil(a["B"] / c["BN"]) / (programs * int(a["rounds"]))


def work_of_launch(kernel: Any, config: triton.Config, grid: Any, args: tuple[Any, ...], **constexprs: Any) -> Work:
    args = tuple(arg.base if isinstance(arg, TensorDescriptor) else arg for arg in args)
    name, a = kernel.fn.__name__, dict(zip(kernel.arg_names, args))
    c = {**constexprs, **config.kwargs}
    tensors = [t for t in args if isinstance(t, Tensor)]
    moved = BYTES[name](a, c) if name in BYTES else size(*tensors)
    cached = 0
    if name in AFTER_PRODUCT:
        written = size(a["z"])
        others = 0 if name == "append_above_kernel" else size(a["partials"])
        moved, cached = (others, written) if written <= FITS_L2 else (others + written, 0)
    if name in GATHERED:
        source, entries = (a[argument] for argument in GATHERED[name])
        gathered = len(entries) * source.shape[1] * source.itemsize
        again = len(source) * source.itemsize * (c[STRIPED[name]] if name in STRIPED else source.shape[1])
        moved, cached = (moved + size(source), gathered) if again <= FITS_L2 else (moved + gathered, 0)
    programs = math.prod(grid(c) if callable(grid) else grid)
    flops = round(MULTIPLIED[name] * 2 * a["B"] * a["F"] * c["D"]) if name in MULTIPLIED else 0
    dtype = str(a["W"].dtype).removeprefix("torch.") if flops else "float32"
    rate = RATES[name](a, c, programs) if name in RATES else 1.0
    trips = int(a["rounds"]) if name in ALONE else c["STEPS"] if name in STEPPED else 1
    times = programs * config.num_warps * trips
    # where one program has a multiprocessor, what stands behind its last product hides behind none
    column = "behind products" if name in ALONE else "instructions"
    issued = partial(issued_by, CODE.get(name, ""), column, times)
    return Work(name, moved, cached, flops, dtype, issued, rate, name in ALONE)


def issued_by(row: str, column: str, times: int, arch: str) -> int:
    """The instructions of so many passes of a warp through the code of a row, 0 where the table has none."""
    return times * committed(arch).get(row, {column: 0})[column]
