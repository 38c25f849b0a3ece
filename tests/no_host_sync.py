"""Finds host synchronisation without a GPU: operations whose result the host would have to wait for."""

import pytest
import torch
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from sampled_sae.support.late_values import LateScalars


def allow_late_scalars(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was sent to the host a step ago may be read: the device has long done it."""
    arrived = LateScalars.arrived

    def unseen(self, wait=False):
        with _disable_current_modes():
            found = [*arrived(self, wait)]
        return iter(found)

    monkeypatch.setattr(LateScalars, "arrived", unseen)


def seen_in_steps(sae, x, monkeypatch):
    """The operations of training steps none of which waits for the device, after the first; the check of x may."""
    monkeypatch.setattr(sae.memory.inputs, "check", lambda x: None)
    allow_late_scalars(monkeypatch)
    sae(x).loss.backward()
    for _ in range(2):
        with NoHostSync() as mode:
            sae(x).loss.backward()
    return mode.seen


class NoHostSync(TorchDispatchMode):
    """Fails at an operation that reads a value or a size from the device."""

    FORBIDDEN = (
        "_local_scalar_dense",
        "nonzero",
        "is_nonzero",
        "masked_select",
        "unique",
        "repeat_interleave",
        "equal",
    )

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        self.seen.add(name)
        assert not any(word in name for word in self.FORBIDDEN), f"{name} waits for the device"
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        assert not any(i is not None and i.dtype == torch.bool for i in indices), f"{name} by a mask waits"
        if func.namespace != "sampled_sae":
            return func(*args, **(kwargs or {}))
        with self:  # what the operator does inside
            return OPDEFS[func._schema.name]._init_fn(*args, **(kwargs or {}))
