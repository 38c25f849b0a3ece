"""The parts of one process made those of many, behind the interface that the layer asks."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from ..impl.interface import Implementation, implementation
from .aux_loss import aux_loss
from .mesh import Mesh
from .parts import SpreadParts
from .weights import Weights


def spread_parts(name: str, weights: Weights, mesh: Mesh) -> Implementation:
    """The parts of "triton" or "torch" over a mesh."""
    local = implementation(name)
    spread = SpreadParts(local, weights, mesh, waits=name == "torch")
    return replace(
        local,
        column_scores=spread.column_scores,
        column_bounds=lambda operands, score: None,
        candidate_pool=spread.candidate_pool,
        select=spread.select,
        decode=spread.decode,
        decode_levels=spread.decode_levels,
        aux_loss=partial(aux_loss, spread),
        totals=spread.totals,
        errors=None,
    )
