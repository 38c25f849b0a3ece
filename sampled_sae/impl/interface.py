"""Which implementation computes, and the functions that each of them offers."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType

import torch
from torch import Tensor

from ..codes import Entries, SparseCodes
from ..config import IMPLS
from ..support.argument_checks import check_choice
from . import reference_form
from .adam_step import AdamStep, Moments
from .column_bounds import ColumnBounds, DecidedColumns, SeenColumns
from .encoder import Encoder, Operands
from .hints import Rule
from .ranking import Ranking
from .torch import aux_loss as torch_aux
from .torch import layer as torch_layer
from .torch import row_adam as torch_row_adam
from .totals import Totals

# once: torch 2.11 does not trace through the search
HAS_TRITON = importlib.util.find_spec("triton") is not None
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ONE_PROCESS = Totals(), Ranking()


@dataclass(frozen=True)
class Implementation:
    """The layer's parts, each under one signature: see torch/layer.py, torch/aux_loss.py and torch/row_adam.py.

    `encoder` makes the value that the others are given, once a step. Of `column_statistics`, `use_block`, `search`,
    `take_kept` and `seen_columns` scores and selections of many processes are made (distributed/parts.py); the
    reference has none, and the last one is there where a screen is.
    `errors`, where there is one, adds a bias [d] to a reconstruction [B, d] and gives each token's squared error too.
    """

    encoder: Callable[..., Encoder]
    column_scores: Callable[[Operands, str], Tensor]
    column_bounds: Callable[[Operands, str], ColumnBounds | DecidedColumns | None]
    candidate_pool: Callable[..., Tensor]
    select: Callable[..., SparseCodes]
    encode_at: Callable[[Encoder, Entries], SparseCodes]
    above_threshold: Callable[..., SparseCodes]
    dense_above_threshold: Callable[..., Tensor]
    decode: Callable[..., Tensor]
    decode_levels: Callable[..., Tensor]
    aux_loss: Callable[..., Tensor]
    dead_candidates: Callable[..., Tensor]
    row_adam_: Callable[[Tensor, Moments, Tensor, Tensor | None, AdamStep], None]
    union: Callable[[list[Tensor], int], Tensor]
    column_statistics: Callable[[Operands, str], Tensor] | None = None
    use_block: Callable[[int, float, int], bool] | None = None
    search: Callable[[Operands, Rule, float | None], Entries] | None = None
    take_kept: Callable[[Entries, Tensor, int, int], Entries] | None = None
    seen_columns: Callable[[Operands, str], SeenColumns | None] | None = None
    errors: Callable[[Tensor, Tensor | None, Tensor], tuple[Tensor, Tensor]] | None = None
    totals: Totals = field(default_factory=Totals)
    ranking: Ranking = field(default_factory=Ranking)


def resolve_impl(impl: str, device: torch.device | str, dtype: torch.dtype = torch.float32) -> str:
    """The implementation that `impl` stands for on `device`: "triton", "torch" or "reference".

    "auto" takes Triton on a GPU for float32, bfloat16 and float16, else torch. Asking for Triton where it cannot
    run is an error, never a silent fallback.

    Raises:
        ValueError: an unknown `impl`, or "triton" without Triton, for float64, or away from a GPU.
    """
    check_choice("impl", impl, IMPLS)
    on_gpu = torch.device(device).type == "cuda"
    if impl == "auto":
        return "triton" if on_gpu and dtype in TRITON_DTYPES and HAS_TRITON else "torch"
    if impl == "triton":
        if not HAS_TRITON:
            raise ValueError("impl='triton': the package triton is not installed; use 'auto' or 'torch'")
        if dtype not in TRITON_DTYPES:
            raise ValueError(f"impl='triton': {dtype} has no Triton form; use float32, bfloat16 or float16, or 'torch'")
        if not on_gpu and not interpreted():
            raise ValueError(
                f"impl='triton': needs tensors on a GPU, or TRITON_INTERPRET=1 from the start; these are on {device}"
            )
    return impl


@functools.cache
def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, on any device."""
    from ..kernels.interpreter import INTERPRETED

    return bool(INTERPRETED.value)


@functools.cache
def implementation(name: str) -> Implementation:
    """The parts of "triton", "torch" or "reference"."""
    if name == "triton":
        from .triton import aux_loss as triton_aux
        from .triton import layer as triton_layer
        from .triton import row_adam as triton_row_adam

        return parts_of(triton_layer, triton_aux, triton_row_adam)
    if name == "torch":
        return parts_of(torch_layer, torch_aux, torch_row_adam)
    return parts_of(reference_form, reference_form, torch_row_adam)


def parts_of(layer: ModuleType, aux: ModuleType, optimizer: ModuleType) -> Implementation:
    return Implementation(
        layer.encoder,
        layer.column_scores,
        layer.column_bounds,
        layer.candidate_pool,
        layer.select,
        layer.encode_at,
        layer.above_threshold,
        layer.dense_above_threshold,
        layer.decode,
        layer.decode_levels,
        aux.aux_loss,
        aux.dead_candidates,
        optimizer.row_adam_,
        optimizer.union,
        getattr(layer, "column_statistics", None),
        getattr(layer, "use_block", None),
        getattr(layer, "search", None),
        getattr(layer, "take_kept", None),
        getattr(layer, "seen_columns", None),
        getattr(layer, "squared_errors", None),
        *ONE_PROCESS,
    )
