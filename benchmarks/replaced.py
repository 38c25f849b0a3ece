"""The kernels' launchers with something else in place of what they import, such as a configuration."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def replaced(**values: Any) -> Iterator[None]:
    """With these values, by name, in every module of a kernel that knows the name."""
    modules = [module for name, module in sys.modules.items() if name.startswith("sampled_sae.kernels.")]
    places = [(module, name) for module in modules for name in values if hasattr(module, name)]
    real = [getattr(module, name) for module, name in places]
    for module, name in places:
        setattr(module, name, values[name])
    try:
        yield
    finally:
        for (module, name), value in zip(places, real):
            setattr(module, name, value)
