"""The parts of one process made those of many, behind the interface that the layer asks."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from ..impl.hints import ThresholdHints
from ..impl.interface import Implementation, implementation
from .aux_loss import aux_loss
from .mesh import Mesh
from .parts import SpreadParts
from .weights import Weights


def spread_parts(name: str, weights: Weights, mesh: Mesh, own_hints: ThresholdHints) -> Implementation:
    """The parts of "triton" or "torch" over a mesh; own_hints: of searches that go through what is here alone."""
    local = implementation(name)
    spread = SpreadParts(local, weights, mesh, own_hints, waits=name == "torch")
    return replace(
        local,
        column_scores=spread.column_scores,
        column_bounds=spread.column_bounds,
        candidate_pool=spread.candidate_pool,
        select=spread.select,
        decode=spread.decode,
        decode_levels=spread.decode_levels,
        aux_loss=partial(aux_loss, spread),
        totals=spread.totals,
        squared_errors=None,
        ranking=spread.ranking,
    )
