"""What users give as activations, as `Activations`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Union

import numpy as np
from torch import Tensor

from .activation_store import ActivationStore
from .activations import Activations
from .array_activations import ArrayActivations, is_array_file, open_array

Readable = Union[Activations, Tensor, np.ndarray, str, Path]  # noqa: UP007  (evaluated at import)


def as_activations(x: Any, holdout: int | None = None) -> Activations:
    """`x` as what a training reads.

    Args:
        x: an `ActivationStore` or other `Activations`, as they are; a tensor or array [n, d]; the name of a store's
            folder or of a .npy, .safetensors or .pt file.
        holdout: of a tensor, array or file: how many tokens, the last ones, are kept for evaluation. A store has
            settled that when it was written.

    Raises:
        TypeError, ValueError: anything else, a `holdout` for a store, what the kinds raise.
    """
    if isinstance(x, (Tensor, np.ndarray)):
        return ArrayActivations(x, holdout or 0)
    if isinstance(x, (str, Path)) and is_array_file(x) and not Path(x).is_dir():
        return open_array(x, holdout or 0)
    if holdout is not None:
        raise ValueError(f"holdout={holdout}: is for a tensor or a file of one; {x} has settled what it holds out")
    if isinstance(x, Activations):
        return x
    if isinstance(x, (str, Path)):
        return ActivationStore.open(x)
    raise TypeError(
        f"store={type(x).__name__}: must be an ActivationStore, a tensor or array [n, d], or the name of one"
    )
