"""What users give as activations, as what a training reads."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Union

import numpy as np
import torch
from torch import Tensor

from ..support.remote_files import AnyPath, place
from .activation_store import ActivationStore
from .activation_stream import ActivationStream, StreamedActivations
from .activations import Activations
from .array_activations import SUFFIXES, ArrayActivations, is_array_file, open_array
from .iterator_source import IteratorSource
from .store_writer import MANIFEST

# the stores of a pair, in one folder: what is read, what is reconstructed from it
PAIR = ("inputs", "outputs")
# the stores of layers beside each other, in one folder: beside_0, beside_1, ...
STACK = "beside_"
Stored = Union[Activations, Tensor, np.ndarray, str, Path]  # noqa: UP007  (evaluated at import)
Readable = Union[Stored, StreamedActivations, ActivationStream, Iterable[Any]]  # noqa: UP007


def as_activations(x: Any, holdout: int | None = None) -> Activations:
    """`x` as what can be read in any order.

    Args:
        x: an `ActivationStore` or other `Activations`, as they are; a tensor or array [n, d]; the name of a store's
            folder, of one that has the stores of a pair or of layers beside each other in it, or of a .npy,
            .safetensors or .pt file.
        holdout: of a tensor, array or file: how many tokens, the last ones, are kept for evaluation. A store has
            settled that when it was written.

    Raises:
        TypeError, ValueError: anything else, a `holdout` for a store, what the kinds raise.
    """
    if isinstance(x, (Tensor, np.ndarray)):
        return ArrayActivations(x, holdout or 0)
    if isinstance(x, (str, Path)) and is_array_file(x) and not place(x).is_dir():
        return open_array(x, holdout or 0)
    if holdout is not None:
        name = x.where if isinstance(x, Activations) else x if isinstance(x, (str, Path)) else type(x).__name__
        raise ValueError(f"holdout={holdout}: is for a tensor or a file of one; {name} has settled what it holds out")
    if isinstance(x, Activations):
        return x
    if isinstance(x, (str, Path)):
        if Path(x).is_file():
            raise ValueError(f"{x}: must be the folder of a store or a file of a tensor, {', '.join(SUFFIXES)}")
        from .joined_activations import PairedActivations, StackedActivations

        found = stores_in(x)
        parts = [f"{str(x).rstrip('/')}/{name}" for name in found]
        if found == [*PAIR]:
            return PairedActivations(parts[0], parts[1])
        return StackedActivations(parts) if found and found[0] not in PAIR else ActivationStore.open(x)
    raise TypeError(
        f"store={type(x).__name__}: must be an ActivationStore, a tensor or array [n, d], or the name of one"
    )


def as_part(name: str, x: Any, holdout: int | None = None) -> Activations:
    """As `as_activations`, of what stands beside others; its errors begin with the `name` that it has among them."""
    try:
        return as_activations(x, holdout)
    except (ValueError, TypeError) as error:
        raise type(error)(f"{name}: {error}") from error


def as_readable(x: Any) -> Activations | StreamedActivations:
    """`x` as what a training reads: as `as_activations`, or a stream, which is read in its order.

    Args:
        x: also an `ActivationStream` of one part, a part of one, or whatever gives activations [n, d] when iterated
            over (`IteratorSource` has the rules).
    """
    if isinstance(x, ActivationStream):
        if len(x.parts) > 1:
            raise ValueError(
                f"store: a stream of {len(x.parts)} parts; give one of them, stream.pair() for a transcoder, "
                "stream.beside() for a crosscoder, or SAEGroup all of them"
            )
        return x.parts[0]
    if isinstance(x, StreamedActivations):
        return x
    stored = isinstance(x, (Activations, Tensor, np.ndarray, str, Path))
    if stored or not isinstance(x, Iterable) or isinstance(x, (bytes, dict, torch.nn.Module)):
        return as_activations(x)
    return as_readable(ActivationStream(IteratorSource(x)))


def stack_part(i: int) -> str:
    """The name of the store of layer i of a stack, from 0."""
    return f"{STACK}{i}"


def stores_in(folder: str | AnyPath) -> list[str]:
    """The names of the stores that a harvest of several places writes, of those in a folder, or a URL of one: those of
    a pair, or of the layers of a stack. None in a store."""
    at, stack = place(folder), list[str]()
    if (at / MANIFEST).exists():
        return []
    if pair := [part for part in PAIR if (at / part / MANIFEST).exists()]:
        return pair
    while (at / (name := stack_part(len(stack))) / MANIFEST).exists():
        stack.append(name)
    return stack
