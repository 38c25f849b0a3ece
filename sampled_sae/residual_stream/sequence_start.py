"""Where the sequences of a forward pass begin: at position 0, behind left padding, or in an earlier pass."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

# the arguments in which models of Hugging Face are given what earlier passes have left
_PAST = ("past_key_values", "cache_params", "state")


class SequenceStart:
    """Watches a model's forward passes; after each has begun, `mask` tells the first token of each sequence."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._continues = False
        self._attended: Tensor | None = None

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Within the context forward passes are seen."""
        handle = self._model.register_forward_pre_hook(self._begin, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def mask(self, x: Tensor) -> Tensor:
        """bool [B, T]: the first token of each row of x [B, T, d]; nowhere True in a pass that goes on from a cache."""
        first = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
        if self._continues:
            return first
        if self._attended is None or self._attended.shape != x.shape[:2]:
            first[:, 0] = True
            return first
        at = self._attended.to(x.device).bool().int().argmax(dim=1)
        return first.scatter_(1, at[:, None], True)

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
        given = {**given, **given.get("kwargs", {})}
        self._continues = any(_holds_tokens(given.get(name)) for name in _PAST)
        attended = given.get("attention_mask")
        self._attended = attended if isinstance(attended, Tensor) and attended.ndim == 2 else None


def _holds_tokens(past: Any) -> bool:
    """Whether a cache has seen tokens; one that is none of Hugging Face's has, or it would not be given."""
    if past is None:
        return False
    if isinstance(past, (tuple, list)):
        return len(past) > 0
    for name in ("get_seq_length", "has_previous_state"):
        try:
            return int(getattr(past, name)()) > 0
        except (AttributeError, TypeError, ValueError):  # a cache of recurrent states has no length, and says so
            continue
    return True
