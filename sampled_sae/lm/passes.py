"""Forward passes of language models over rows of token ids, and what stands at places of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, Union

import torch
from torch import Tensor

from sampled_sae.lm.models import device_of
from sampled_sae.residual_stream.hook_points import HookPoint, capture_points, points_of
from sampled_sae.residual_stream.hooks import capture_layers

# a block, whose output is meant, or any other place
Place = Union[int, HookPoint]  # noqa: UP007  (evaluated at import)


@torch.inference_mode()
def run_at(
    model: Any, rows: Tensor, places: Sequence[Place], first_row: int = 0, source: str = "", what: str = ""
) -> list[Tensor]:
    """What stands at each of the places in one pass over rows [b, T]: float32 [b, T, d], on the device of its module.

    Args:
        first_row, source, what: for errors, the number of the first row, among those of `source`; what the rows are.

    Raises:
        ValueError: NaN or inf, naming place and rows.
    """
    given = rows.to(device_of(model))
    blocks = [place for place in places if isinstance(place, int)]
    if len(blocks) == len(places):
        with capture_layers(model, blocks) as of_block:
            model(input_ids=given, use_cache=False)
        found = [of_block[block] for block in blocks]
    else:
        with capture_points(model, points_of(model, places)) as found:
            model(input_ids=given, use_cache=False)
    for place, x in zip(places, found):
        where = f"of layer {place}" if isinstance(place, int) else f"at {place}"
        _check_finite_rows(x, f"{where}{what}", first_row, source)
    return [x.float() for x in found]


def batches_at(
    places: Sequence[tuple[Any, Place]], rows: Tensor, batch_size: int, first_row: int = 0, autocast: bool = False
) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """(rows [b, T], what stands at each of the places, float32 [b, T, d]), on the device of the first model.

    Args:
        places: with the model of each; one that stands there several times in a row is run once a batch.
        first_row: number of the first row, for errors.
        autocast: products in bfloat16.

    Raises:
        ValueError: as `run_at`.
    """
    device = device_of(places[0][0])
    for start in range(0, len(rows), batch_size):
        batch, found = rows[start : start + batch_size].to(device), list[Tensor]()
        for _, of_model in groupby(places, key=lambda at: id(at[0])):
            models, here = zip(*of_model)
            with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                found += run_at(models[0], batch, here, first_row + start)
        yield batch, [x.to(device) for x in found]


def _check_finite_rows(x: Tensor, place: str, first_row: int, source: str) -> None:
    finite = x.isfinite().flatten(1).all(1)
    if not finite.all():
        bad = [first_row + int(row) for row in (~finite).nonzero()]
        rows = f"rows {bad} of {source}" if source else f"rows {bad}"
        raise ValueError(
            f"activations {place} are not finite (NaN or inf) in {rows}: load the model in another dtype, or leave "
            "these rows out"
        )
