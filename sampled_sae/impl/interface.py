"""Which implementation computes, and the functions that each of them offers."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from types import ModuleType

import torch
from torch import Tensor

from ..codes import Entries, SparseCodes
from ..config import IMPLS
from ..support.argument_checks import check_choice
from . import levels, reference_form
from .adam_step import AdamStep, Moments
from .column_bounds import ColumnBounds, DecidedColumns, SeenColumns
from .encoder import Encoder, Operands
from .hints import Rule
from .ranking import Ranking
from .torch import aux_loss as torch_aux
from .torch import layer as torch_layer
from .torch import pool as torch_pool
from .torch import reconstruction as torch_reconstruction
from .torch import row_adam as torch_row_adam
from .torch import scores as torch_scores
from .torch import screen_columns as torch_columns
from .totals import Totals

# once: torch 2.11 does not trace through the search
HAS_TRITON = importlib.util.find_spec("triton") is not None
# made here: torch.compile, which traces `implementation`, makes no object of such a class
ONE_PROCESS = Totals(), Ranking()
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Implementation:
    """The layer's parts, each under one signature: that of the function of its name in torch/.

    `encoder` makes the value that the others are given, once a step. Of `column_statistics`, `use_block`, `search`,
    `take_kept` and `seen_columns` scores and selections of many processes are made (distributed/parts.py); the
    reference has none, and the last one is there where a screen is.
    `squared_errors`, where there is one, adds a bias [d] to a reconstruction [B, d] and gives each token's too;
    `level_errors` gives those of levels [B, G, d], [B, G]. Second derivatives are those of the forms that have neither.
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
    squared_errors: Callable[[Tensor, Tensor | None, Tensor], tuple[Tensor, Tensor]] | None = None
    level_errors: Callable[[Tensor, Tensor], Tensor] | None = None
    totals: Totals = field(default_factory=Totals)
    ranking: Ranking = field(default_factory=Ranking)


# each is a function of the implementation's files, but for what says how processes work together
PARTS = tuple(part.name for part in fields(Implementation) if part.name not in ("totals", "ranking"))


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
        from .triton import aux_loss, layer, pool, reconstruction, row_adam, scores, screen_columns

        return parts_of(layer, aux_loss, pool, reconstruction, row_adam, scores, screen_columns, levels)
    if name == "torch":
        others = torch_aux, torch_pool, torch_reconstruction, torch_row_adam, torch_scores, torch_columns, levels
        return parts_of(torch_layer, *others)
    return parts_of(reference_form, torch_row_adam)


def parts_of(*files: ModuleType) -> Implementation:
    """Each part from the first of the files that has it."""
    found = {name: getattr(file, name) for file in reversed(files) for name in PARTS if hasattr(file, name)}
    return Implementation(**found, totals=ONE_PROCESS[0], ranking=ONE_PROCESS[1])
