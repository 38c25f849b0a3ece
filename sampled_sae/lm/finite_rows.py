"""Whether a model's activations are finite, row by row."""

from __future__ import annotations

from torch import Tensor


def check_finite_rows(x: Tensor, place: str, first_row: int, source: str = "") -> None:
    """Raises ValueError for NaN or inf in x [b, T, d], which stands at `place` ("of layer 3").

    first_row: number of the first row, among those of `source`.
    """
    finite = x.isfinite().flatten(1).all(1)
    if not finite.all():
        bad = [first_row + int(row) for row in (~finite).nonzero()]
        rows = f"rows {bad} of {source}" if source else f"rows {bad}"
        raise ValueError(
            f"activations {place} are not finite (NaN or inf) in {rows}: load the model in another dtype, or leave "
            "these rows out"
        )
