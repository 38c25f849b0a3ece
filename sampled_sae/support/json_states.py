"""A state of tensors and plain values as JSON, to the bit."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import torch

# where JSON has no words for a state, torch's file of it is in a string
_TORCH = "torch file in base64"


def as_json(state: dict[str, Any]) -> dict[str, Any]:
    """`state` itself where JSON gives back the same."""
    try:
        if json.loads(json.dumps(state, allow_nan=False)) == state:
            return state
    except (TypeError, ValueError):
        pass
    written = io.BytesIO()
    torch.save(state, written)
    return {_TORCH: base64.b64encode(written.getvalue()).decode()}


def of_json(where: str, found: Any) -> Any:
    """What `as_json` was given.

    Raises:
        ValueError: it is damaged; begins with `where`.
    """
    if not isinstance(found, dict) or set(found) != {_TORCH}:
        return found
    try:
        return torch.load(io.BytesIO(base64.b64decode(found[_TORCH], validate=True)), weights_only=True)
    except Exception as error:
        raise ValueError(f"{where}: damaged ({type(error).__name__}: {error})") from error
