"""Whether methods that a peer's step calls, and ours does without, are still the peer's."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

OURS = __name__.partition(".")[0]


def methods_of(cls: type, names: Iterable[str], peer: str) -> dict[str, Any]:
    """What `cls` has under these names from the peer's package or from this one; of anyone else's, nothing like it."""
    methods = {name: getattr(cls, name, None) for name in names}
    for name, method in methods.items():
        package = str(getattr(method, "__module__", None)).partition(".")[0]
        if method is not None and package not in (peer, OURS):
            methods[name] = object()
    return methods


def has_other_methods(instance: Any, methods: dict[str, Any]) -> bool:
    """Whether the object or its class has something else under these names, a wrapper included."""
    return any(n in vars(instance) or getattr(type(instance), n, None) is not m for n, m in methods.items())
