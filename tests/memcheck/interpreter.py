"""Triton's interpreter with each access judged before it is made: `checked()`.

What is out of bounds is reported and left undone. Works with Triton 3.6 to 3.9, whose builder's methods it replaces.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import triton.runtime.interpreter as interpreter

from .findings import Finding, Findings, site
from .regions import Access, AddressSpaces
from .shadow import Shadows, is_duplicate

ORDERS = ("forward", "reverse", "shuffle")
# what `torch.empty` is filled with, by bytes of an element: quiet in sums as NaN, unlikely as an integer
POISON = {2: 0x7FB5, 4: 0x7FB5A5C3, 8: 0x7FF5A5C3B7D19E2B}
WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
EMPTY = [(torch, name) for name in ("empty", "empty_like", "empty_strided", "empty_permuted")]
EMPTY += [(torch.Tensor, name) for name in ("new_empty", "new_empty_strided")]


class Launch:
    """One launch under way."""

    def __init__(self, kernel: str) -> None:
        self.kernel = kernel
        self.spaces, self.shadows = AddressSpaces(), Shadows()
        self.program = self.epoch = 0
        self.grid = (1, 1, 1)
        self.order: np.ndarray | None = None


class Checker:
    """Judges what the interpreter is about to do.

    Args:
        order: in which the programs of a launch run: "forward", "reverse", "shuffle". seed: of the shuffle.
        poison: whether reads of what `torch.empty` left are reported.
    """

    def __init__(self, order: str = "forward", seed: int = 0, poison: bool = True) -> None:
        if order not in ORDERS:
            raise ValueError(f"order={order!r}: must be one of {', '.join(ORDERS)}")
        self.order, self.seed, self.poison = order, seed, poison
        self.findings = Findings()
        self.launch: Launch | None = None
        self._sites: list[str] = []
        self._numbers: dict[str, int] = {}

    def begin(self, launch: Launch, grid: tuple[int, int, int]) -> None:
        """The grid is known."""
        launch.grid, n = grid, int(np.prod(grid))
        if self.order == "reverse":
            launch.order = np.arange(n)[::-1]
        elif self.order == "shuffle":
            seed = self.seed + sum(self.findings.kernels.values())
            launch.order = np.random.default_rng(seed).permutation(n)

    def place(self, launch: Launch, x: int, y: int, z: int) -> tuple[int, int, int]:
        """Which program runs where the interpreter wants to run (x, y, z)."""
        _, ny, nz = launch.grid
        at = (x * ny + y) * nz + z
        if launch.order is not None:
            at = int(launch.order[at])
        launch.program = at
        launch.epoch += 1
        self.findings.programs += 1
        return at // (ny * nz), at // nz % ny, at % nz

    def access(self, launch: Launch, kind: str, pointers: np.ndarray, mask: np.ndarray, values: Any = None) -> Access:
        """Where a load, store or atomic may go; the rest is reported, as are its collisions."""
        here = self._here()
        access = launch.spaces.access(pointers, mask)
        self.findings.accesses += 1
        for lanes, where in access.bad:
            self._report(launch, f"out of bounds: {kind}", here, "", lanes, where)
        if kind == "store" and is_duplicate(access, values):
            self._report(launch, "duplicate: two lanes store different values", here)
        who = launch.program, launch.epoch, here
        if kind == "load":
            found = launch.shadows.note(access, lambda shadow, at: shadow.load(at, *who))
        else:
            found = launch.shadows.note(access, lambda shadow, at: shadow.store(at, *who, kind == "atomic"))
        for collision, other, lanes in found:
            self._report(launch, collision, here, self._sites[other], lanes)
        return access

    def seen(self, launch: Launch, data: np.ndarray, good: np.ndarray) -> None:
        """What a load has read."""
        if not self.poison or data.dtype.itemsize not in POISON:
            return
        bits = np.ascontiguousarray(data).view(f"u{data.dtype.itemsize}")
        stale = (bits == POISON[data.dtype.itemsize]) & good
        if stale.any():
            self._report(launch, "uninitialised read", self._here(), "", stale.sum())

    def _here(self) -> int:
        text = site()
        if text not in self._numbers:
            self._numbers[text] = len(self._sites)
            self._sites.append(text)
        return self._numbers[text]

    def _report(self, launch: Launch, kind: str, here: int, other: str = "", lanes: int = 1, note: str = "") -> None:
        self.findings.add(Finding(kind, launch.kernel, self._sites[here], other, note), lanes)


def poisoned(plain: Any, *args: Any, **kwargs: Any) -> Any:
    """A new tensor, its memory filled with the pattern of its width, where it has one."""
    tensor = plain(*args, **kwargs)
    on_cpu = type(tensor) is torch.Tensor and tensor.device.type == "cpu" and tensor.layout == torch.strided
    words = WORDS.get(tensor.element_size()) if on_cpu and kwargs.get("out") is None else None
    # the wrappers of torch.func have no memory of their own
    if words is not None and tensor.numel() and not torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        memory = tensor.untyped_storage()
        torch.tensor([], dtype=words).set_(memory).fill_(POISON[tensor.element_size()])
    return tensor


@contextmanager
def checked(order: str = "forward", seed: int = 0, poison: bool = True) -> Iterator[Findings]:
    """Every launch in the interpreter is checked; see `Checker`."""
    checker = Checker(order, seed, poison)
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    with ExitStack() as stack:

        def replace(owner: Any, name: str, wrapper: Any) -> None:
            plain = getattr(owner, name)

            def call(*args: Any, **kwargs: Any) -> Any:
                return wrapper(plain, *args, **kwargs)

            stack.enter_context(patch.object(owner, name, call))

        replace(executor, "__call__", lambda plain, self, *args, **kw: launched(checker, plain, self, *args, **kw))
        replace(interpreter, "_implicit_cvt", lambda plain, arg: converted(checker, plain, arg))
        for name, method in METHODS.items():
            replace(builder, name, in_launch(checker, method))
        if poison:
            for owner, name in EMPTY:
                replace(owner, name, poisoned)
        yield checker.findings


def launched(checker: Checker, plain: Any, executor: Any, *args: Any, **kwargs: Any) -> Any:
    """GridExecutor.__call__"""
    name = getattr(executor.fn, "__name__", "?")
    checker.findings.kernels[name] += 1
    checker.launch = Launch(name)
    try:
        return plain(executor, *args, **kwargs)
    finally:
        checker.launch = None


def converted(checker: Checker, plain: Any, argument: Any) -> Any:
    """_implicit_cvt: an argument as the kernel gets it; pointers with an address in a space of their own."""
    made = plain(argument)
    if checker.launch is not None and hasattr(argument, "data_ptr") and not isinstance(argument, tuple):
        base = checker.launch.spaces.add(interpreter._unwrap_tensor(argument))
        made.handle.data = np.array([base], dtype=np.uint64)
    return made


def in_launch(checker: Checker, method: Any) -> Any:
    """A method of the builder that is given the checker and its launch, and is left alone outside of one."""

    def call(plain: Any, builder: Any, *args: Any, **kwargs: Any) -> Any:
        if checker.launch is None:
            return plain(builder, *args, **kwargs)
        return method(checker, checker.launch, lambda *a: plain(builder, *a, **kwargs), *args)

    return call


def set_grid_dim(checker: Checker, launch: Launch, plain: Any, *grid: int) -> Any:
    checker.begin(launch, grid)
    return plain(*grid)


def set_grid_idx(checker: Checker, launch: Launch, plain: Any, *at: int) -> Any:
    return plain(*checker.place(launch, *at))


def barrier(checker: Checker, launch: Launch, plain: Any, *rest: Any) -> Any:
    launch.epoch += 1
    return plain(*rest)


def load(checker: Checker, launch: Launch, plain: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
    mask = handle_of(mask)
    access = checker.access(launch, "load", pointers.data, mask.data)
    made = plain(*handles(access, pointers, mask), *rest)
    checker.seen(launch, made.data, access.good)
    return made


def store(checker: Checker, launch: Launch, plain: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
    mask = handle_of(mask)
    access = checker.access(launch, "store", pointers.data, mask.data, value.data)
    pointers, mask = handles(access, pointers, mask)
    return plain(pointers, value, mask, *rest)


def atomic(
    checker: Checker, launch: Launch, plain: Any, op: Any, pointers: Any, value: Any, mask: Any, *rest: Any
) -> Any:
    access = checker.access(launch, "atomic", pointers.data, mask.data)
    pointers, mask = handles(access, pointers, mask)
    return plain(op, pointers, value, mask, *rest)


def compare_and_swap(checker: Checker, launch: Launch, plain: Any, pointers: Any, *rest: Any) -> Any:
    """It has no mask: what would be out of bounds is not made at all."""
    access = checker.access(launch, "atomic", pointers.data, np.ones(pointers.data.shape, bool))
    if not access.good.all():
        raise IndexError(f"{launch.kernel}: atomic_cas out of bounds: {access.bad}")
    return plain(interpreter.TensorHandle(access.real, pointers.dtype), *rest)


def handle_of(mask: Any) -> Any:
    """Those of tensor descriptors are bare arrays in Triton 3.6."""
    return interpreter.TensorHandle(mask, interpreter.tl.int1) if isinstance(mask, np.ndarray) else mask


def handles(access: Access, pointers: Any, mask: Any) -> tuple[Any, Any]:
    """Real addresses and the lanes that may be touched, as the interpreter has them."""
    real = interpreter.TensorHandle(access.real, pointers.dtype)
    return real, interpreter.TensorHandle(access.good, mask.dtype)


METHODS = {
    "set_grid_dim": set_grid_dim,
    "set_grid_idx": set_grid_idx,
    "create_barrier": barrier,
    "create_masked_load": load,
    "create_masked_store": store,
    "create_atomic_rmw": atomic,
    "create_atomic_cas": compare_and_swap,
}
