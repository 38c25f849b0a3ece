"""Every operation of a training step against eager PyTorch, torch.compile and torch.topk, on a CPU or a GPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from benchmarks.operations import adam, decoding, scores, selection
from benchmarks.operations.operation import Inputs, Operation
from benchmarks.workloads import Workload

Operations = dict[str, Callable[[Inputs], Operation]]

OPERATIONS: Operations = {
    "score l2": partial(scores.scores, score="l2"),
    "score entropy": partial(scores.scores, score="entropy"),
    "pool l=4": partial(scores.pool, l=4.0),
    "top-k of the block, l=4": partial(selection.block_top, l=4.0, select="batch"),
    "top-k of the block, l=4, token": partial(selection.block_top, l=4.0, select="token"),
    "select l=1": partial(selection.select, l=1.0, select="batch"),
    "select l=4": partial(selection.select, l=4.0, select="batch"),
    "select l=16": partial(selection.select, l=16.0, select="batch"),
    "select l=None": partial(selection.select, l=None, select="batch"),
    "select l=None, first batch": partial(selection.select, l=None, select="batch", first_batch=True),
    "select l=None, token": partial(selection.select, l=None, select="token"),
    "decode l=4": partial(decoding.decode, l=4.0),
    "decode l=None": partial(decoding.decode, l=None),
    "backward l=4": partial(decoding.backward, l=4.0),
    "backward l=None": partial(decoding.backward, l=None),
    "row-Adam dense": partial(adam.row_adam, mode="dense"),
    "row-Adam decayed": partial(adam.row_adam, mode="decayed"),
}
# the product by cuBLAS or MKL, and the forms of the score kernel that decide up to which d scores are fused into it
PRODUCT: Operations = {"product": partial(scores.form, name="product")}
SCORE_FORMS: Operations = {name: partial(scores.form, name=name) for name in scores.FORMS}


def first_call(name: str, w: Workload, dtype: torch.dtype, device: str) -> None:
    """Of the Triton form, to be compiled."""
    operation = (OPERATIONS | SCORE_FORMS)[name](Inputs(w, device, dtype, "triton"))
    operation.prepare()
    operation.ours()
