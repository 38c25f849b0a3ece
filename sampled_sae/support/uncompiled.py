"""`uncompiled`: `torch.compiler.disable`, without loading the compiler, seconds of it, where nobody compiles."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def uncompiled(function: Callable[P, R]) -> Callable[P, R]:
    """The function as `torch.compiler.disable` makes it, from the first call on at which torch._dynamo is loaded."""
    disabled: list[Callable[P, R]] = []

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if not disabled:
            if "torch._dynamo" not in sys.modules:
                return function(*args, **kwargs)
            disabled.append(torch.compiler.disable(function))
        return disabled[0](*args, **kwargs)

    # what torch.compiler.disable marks: a graph ends before the call
    call._torchdynamo_disable = True  # type: ignore[attr-defined]
    return call
