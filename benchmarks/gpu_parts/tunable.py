"""The rows of kernels/configs.py that a GPU can choose by timing: how to call each kernel, and how to force a row."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import triton

from benchmarks.gpu_parts import candidates
from benchmarks.gpu_parts.visit import operands
from benchmarks.workloads import Workload
from sampled_sae.config import pool_size
from sampled_sae.impl.triton.layer import by_feature
from sampled_sae.impl.triton.products import chunk_width, product
from sampled_sae.impl.triton.stream import stream_batch
from sampled_sae.kernels import column_scores, configs
from sampled_sae.kernels.batch_topk import keep_largest_
from sampled_sae.kernels.chunk_filter import append_above_
from sampled_sae.kernels.chunk_scores import chunk_statistics
from sampled_sae.kernels.gather_decode import entry_dots, gather_sum
from sampled_sae.kernels.row_adam import row_adam_
from sampled_sae.kernels.segment_sum import segment_sum
from sampled_sae.kernels.token_topk import keep_rows_

Value = Any  # a Config, or the row of a table


@dataclass
class Tunable:
    """One row of a table for one (d, F, B).

    Attributes:
        table, key: where the row stands; `part` of it, where only a part is tried.
        current, candidates: its value, and others.
        put: makes a value the one in use.
        call: a kernel that reads it.
        result: from what the call returned, the tensor that must not depend on the value.
        prepare: what has to be put back before each call, untimed.
        exact: the result must be the same to the bit; else up to the order of sums.
    """

    table: str
    key: str
    current: Value
    candidates: tuple[Value, ...]
    put: Callable[[Value], None]
    call: Callable[[], Any]
    exact: bool = False
    prepare: Callable[[], Any] = lambda: None
    result: Callable[[Any], torch.Tensor] = lambda returned: returned
    written: Callable[[Value], str] = field(default=lambda value: written(value))

    @contextmanager
    def using(self, value: Value) -> Iterator[None]:
        """With `value` in the table."""
        self.put(value)
        try:
            yield
        finally:
            self.put(self.current)


def written(config: triton.Config) -> str:
    """As it would stand in kernels/configs.py."""
    k = config.kwargs
    if {"BM", "BN", "BD", "GROUP"} == set(k):
        return f"tile({k['BM']}, {k['BN']}, {k['BD']}, {config.num_warps}, {config.num_stages})"
    blocks = ", ".join(f'"{name}": {value}' for name, value in k.items())
    return f"triton.Config({{{blocks}}}, num_warps={config.num_warps}, num_stages={config.num_stages})"


def in_table(table: dict[Any, Value], key: Any) -> Callable[[Value], None]:
    return lambda value: table.__setitem__(key, value)


def tunables(w: Workload, device: str, dtype: torch.dtype) -> Iterator[Tunable]:
    """Those of one workload, the most expensive kernels first."""
    arch, bits = configs.architecture(torch.device(device)), 8 * dtype.itemsize
    family = configs.family(arch)
    x, W = operands(w, device, dtype)
    b = torch.zeros(w.F, device=device)
    yield from of_scores(w, x, W, b, arch, bits)
    z = product(x, W[: min(w.F, chunk_width(w.B))].t())
    yield from of_chunks(w, z, b, family)
    yield from of_entries(w, x, W, b, family, bits)
    yield from of_selection(w, x, W, family)
    yield of_adam(w, W.float(), family)


def of_scores(
    w: Workload, x: torch.Tensor, W: torch.Tensor, b: torch.Tensor, arch: str, bits: int
) -> Iterator[Tunable]:
    table, key = configs.COLUMN_SCORES, (arch, bits)
    at = 0 if w.d <= configs.SMALL_D else 1

    def put(value: Value) -> None:
        row = list(table[key])
        row[at] = value
        table[key] = tuple(row)

    tiles = candidates.TILES_16 if bits == 16 else candidates.TILES_32
    name = f"{key}, {'d <= SMALL_D' if at == 0 else 'larger d'}"
    for score in ("l2", "entropy"):

        def scores(score: str = score) -> torch.Tensor:
            return column_scores.column_statistics(x, W, b, score)

        yield Tunable("COLUMN_SCORES", f"{name}, {score}", table[key][at], tiles, put, scores)

    def set_fold(value: Value) -> None:
        column_scores.FOLD = value

    def sums() -> torch.Tensor:
        return column_scores.fold_partials(partials, 1, tokens, w.F)

    tokens = triton.cdiv(w.B, table[key][at].kwargs["BN"])
    partials = torch.rand(tokens * w.F, device=x.device)
    yield Tunable("FOLD", "", configs.FOLD, candidates.FOLDS, set_fold, sums)


def of_chunks(w: Workload, z: torch.Tensor, b: torch.Tensor, family: str) -> Iterator[Tunable]:
    bias = b[: z.shape[1]]

    def statistics() -> torch.Tensor:
        return chunk_statistics(z, bias, None, "entropy")

    n = max(1, w.k * w.B * z.shape[1] // w.F)
    tau = z.flatten()[:: max(1, z.numel() >> 20)].sort(descending=True).values
    tau = tau[max(0, len(tau) * n // z.numel() - 1)].clamp_min(0).reshape(1)
    values = torch.zeros(4 * n + 4096, device=z.device)
    keys = torch.zeros(len(values), dtype=torch.int64, device=z.device)
    count = torch.zeros(1, dtype=torch.int64, device=z.device)

    def entries() -> None:
        append_above_(z, bias, None, 0, w.F, tau, values, keys, count)

    def listed(_: None) -> torch.Tensor:
        return torch.cat((count, keys.sort().values))

    def clear() -> None:
        for tensor in (values, keys, count):
            tensor.zero_()

    put = in_table(configs.CHUNK_SCORES, family)
    yield Tunable("CHUNK_SCORES", repr(family), configs.CHUNK_SCORES[family], candidates.CHUNK_SCORES, put, statistics)
    current, put = configs.CHUNK_FILTER[family], in_table(configs.CHUNK_FILTER, family)
    yield Tunable("CHUNK_FILTER", repr(family), current, candidates.CHUNK_FILTER, put, entries, True, clear, listed)


def of_entries(
    w: Workload, x: torch.Tensor, W: torch.Tensor, b: torch.Tensor, family: str, bits: int
) -> Iterator[Tunable]:
    values, tokens, features, _ = stream_batch(x, W, b, None, None, w.B * w.k)
    slots = by_feature(values, tokens, features, None, w.B, w.F)
    key = (family, bits)

    def decode() -> torch.Tensor:
        return gather_sum(values, features, slots.token_ends, W)

    def gradients() -> torch.Tensor:
        return segment_sum(values, tokens, slots.order, slots.row_ends, x, None, len(slots.rows))[0]

    def dots() -> torch.Tensor:
        return entry_dots(x, W, tokens, features, slots.token_ends)

    put = in_table(configs.SEGMENT_SUM, key)
    for name, call in (("decode", decode), ("gradients", gradients)):
        row = configs.SEGMENT_SUM[key]
        yield Tunable("SEGMENT_SUM", f"{key}, {name}", row, candidates.SEGMENT_SUM, put, call)
    row = configs.ENTRY_DOTS[key]
    yield Tunable("ENTRY_DOTS", str(key), row, candidates.ENTRY_DOTS, in_table(configs.ENTRY_DOTS, key), dots)


def of_selection(w: Workload, x: torch.Tensor, W: torch.Tensor, family: str) -> Iterator[Tunable]:
    """Selection from a pool of l = 4, which holds random features here."""
    size = pool_size(w.k, 4.0, w.F)
    z = product(x, W[:size].t())
    work = torch.empty_like(z)

    def batch() -> torch.Tensor:
        keep_largest_(work, w.B * w.k)
        return work

    def rows() -> torch.Tensor:
        keep_rows_(work, w.k)
        return work

    def fill() -> None:
        work.copy_(z)

    put = in_table(configs.RADIX, family)
    yield Tunable("RADIX", repr(family), configs.RADIX[family], candidates.RADIX, put, batch, True, fill)
    table = configs.ROWS
    at = next((i for i, (longest, _) in enumerate(table[family]) if size <= longest), None)
    if at is None:
        return
    longest = table[family][at][0]

    def set_warps(value: Value) -> None:
        listed = list(table[family])
        listed[at] = value
        table[family] = tuple(listed)

    tried = tuple((longest, warps) for warps in candidates.WARPS)
    key = f"{family!r}, {longest}"
    yield Tunable("ROWS", key, table[family][at], tried, set_warps, rows, True, fill, written=str)


def of_adam(w: Workload, W: torch.Tensor, family: str) -> Tunable:
    """A decoder with the gradient of a pool of l = 4."""
    table = configs.ROW_ADAM
    at = next(i for i, row in enumerate(table[family]) if w.d <= row[0])
    longest = table[family][at][0]
    features = torch.arange(pool_size(w.k, 4.0, w.F), device=W.device) * 3
    features = features[features < w.F]
    m, v = torch.zeros_like(W), torch.zeros_like(W)
    grad = torch.randn(len(features), w.d, generator=torch.Generator(W.device).manual_seed(2), device=W.device)
    step, start = torch.ones((), device=W.device), W.clone()
    hyper = {"factor": None, "lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0}

    def update() -> torch.Tensor:
        row_adam_(W, m, v, grad, features, step, mode="dense", project=True, renormalize=True, **hyper)
        return W

    def restore() -> None:
        W.copy_(start)
        m.zero_()
        v.zero_()

    def put(value: Value) -> None:
        listed = list(table[family])
        listed[at] = value
        table[family] = tuple(listed)

    tried = tuple((longest, elements, warps) for elements, warps in candidates.ADAM_SHAPES)
    key = f"{family!r}, {longest}"
    return Tunable("ROW_ADAM", key, table[family][at], tried, put, update, False, restore, written=str)
