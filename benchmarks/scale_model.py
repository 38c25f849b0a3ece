"""A model, not a measurement: what a step takes on many GPUs, from sizes, latencies and bandwidths alone.

Each rank computes the scores of its tokens and features, the block of its pool, and moves the rows of the optimizer;
what it sends is the table of docs/scale.md. An all-reduce of n bytes over R ranks takes 2 (R-1)/R n / bandwidth. Each
collective takes 2 log2(R) latencies; how many stand one after another, `benchmarks/scale.py` has counted. One of each
dimension is between hosts, over gloo: a ring of R-1 steps, taken as if no GPU were at work meanwhile. Ranks of one
dimension use NVLink where they are on one machine, else the network.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product

from benchmarks.measure import Row

POOL_MULTIPLIER, K = 4, 32
FLOATS = 4


@dataclass(frozen=True)
class Hardware:
    """Per GPU: flops a second of products and bytes a second of memory that a step reaches, bytes of memory. Links:
    bytes a second each way, seconds of latency; host_latency: of a message from process to process over gloo."""

    flops: float = 3e14
    memory_bandwidth: float = 2.5e12
    memory: float = 80e9
    gpus_a_machine: int = 8
    nvlink: float = 3e11
    nvlink_latency: float = 8e-6
    network: float = 400e9 / 8
    network_latency: float = 2e-5
    host_latency: float = 3e-5


@dataclass(frozen=True)
class Calls:
    """Collectives of a step over each dimension, counted. One of them is between hosts."""

    data: int
    feature: int

    @classmethod
    def counted(cls, rows: Sequence[Row]) -> Calls:
        """From the rows of `benchmarks/scale.py`: of two processes, without a screen.

        Raises:
            ValueError: rows that do not have both.
        """
        counted = [row for row in rows if row["part"] == "counted" and row.get("screen", "off") == "off"]
        found = {row["layout"]: row["calls"] for row in counted}
        if missing := {"2 x 1", "1 x 2"} - found.keys():
            raise ValueError(f"--only model: needs the counted rows of {sorted(missing)}; add counted to --only")
        return cls(found["2 x 1"], found["1 x 2"])


def collectives(n: float, calls: int, ranks: int, stride: int, hardware: Hardware) -> float:
    """Seconds for n bytes in so many calls over ranks that stand `stride` apart, the first call between hosts."""
    if ranks == 1:
        return 0.0
    inside = ranks * stride <= hardware.gpus_a_machine
    speed = hardware.nvlink if inside else hardware.network
    latency = hardware.nvlink_latency if inside else hardware.network_latency
    travel = 2 * (ranks - 1) / ranks * n / speed + (calls - 1) * 2 * math.log2(ranks) * latency
    return travel + (ranks - 1) * hardware.host_latency


def sent(F: float, d: int, tokens: float, data: int, shards: int) -> dict[str, dict[str, float]]:
    """Bytes a rank puts into collectives in a step, by dimension and purpose: data x shards ranks, `tokens` on each."""
    P, radix = K * POOL_MULTIPLIER, 3 * 2048 * 8
    rows = FLOATS * (2 * P * d / shards + P / shards + d)
    over_data = {"column statistics": FLOATS * F / shards, "radix counts": radix, "gradients": rows}
    over_features = {"pool": 16 * P * shards, "radix counts": radix, "decode": FLOATS * tokens * d, "b_dec": FLOATS * d}
    return {"data": over_data if data > 1 else {}, "feature": over_features if shards > 1 else {}}


def compute(F: float, d: int, tokens: float, shards: int, hardware: Hardware) -> float:
    """Seconds of a rank: products of scores and of the pool's block, and memory moved once for weights and rows."""
    P = K * POOL_MULTIPLIER
    moved = FLOATS * (F * d / shards + 12 * P * d)
    return 2 * tokens * d * (F + 5 * P) / shards / hardware.flops + moved / hardware.memory_bandwidth


def step(F: float, d: int, batch: int, data: int, shards: int, calls: Calls, hardware: Hardware) -> Row | None:
    """Milliseconds of a step of `batch` tokens in all, and its parts; None where the shard does not fit into a GPU."""
    held = 2 * 3 * FLOATS * F * d / shards  # weights and two moments of two matrices
    if held > 0.8 * hardware.memory:
        return None
    own, bytes_sent = compute(F, d, batch / data, shards, hardware), sent(F, d, batch / data, data, shards)
    travel = collectives(sum(bytes_sent["data"].values()), calls.data, data, shards, hardware)
    travel += collectives(sum(bytes_sent["feature"].values()), calls.feature, shards, 1, hardware)
    ranks = data * shards
    # no more than the one sum, of which hosts know nothing
    alone = replace(hardware, host_latency=0.0)
    dense = compute(F, d, batch / ranks, 1, hardware) + collectives(2 * FLOATS * F * d, 2, ranks, 1, alone)
    about = {"data": data, "shards": shards, "gigabytes": held / 1e9}
    return {**about, "ms": 1e3 * (own + travel), "travel": travel / (own + travel), "dense_ms": 1e3 * dense}


def rows(calls: Calls, hardware: Hardware, batch: int = 65_536) -> list[Row]:
    """The fastest layout for each F, d and number of GPUs."""
    found: list[Row] = []
    for F, d, gpus in product((2**16, 2**20, 2**24), (768, 4096), (1, 8, 64, 1024)):
        shards = [2**i for i in range(11) if gpus % 2**i == 0 and 2**i <= gpus]
        layouts = [made for s in shards if (made := step(F, d, batch, gpus // s, s, calls, hardware)) is not None]
        best = min(layouts, key=lambda made: made["ms"]) if layouts else {"reason": "does not fit"}
        found.append({"part": "model", "F": F, "d": d, "gpus": gpus, **best})
    return found


def assumptions(hardware: Hardware, batch: int = 65_536) -> Row:
    """What the model takes for granted, for the head of a result."""
    return {**asdict(hardware), "batch": batch, "k": K, "l": POOL_MULTIPLIER}
