"""Any place in a language model: the input or the output of one of its modules, read or replaced."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..support.argument_checks import check_integer
from .blocks import PassEnded, check_layer

SIDES = ("in", "out")
MLP_NAMES = ("mlp", "feed_forward", "ffn", "ff")


@dataclass(frozen=True)
class HookPoint:
    """What a module reads or writes; written `model.layers.3.mlp:in`.

    Attributes:
        module: its name, as in `model.named_modules()`.
        side: "in", its first argument, or "out", what it returns, of a tuple the first.
    """

    module: str
    side: str

    @classmethod
    def parse(cls, text: str) -> HookPoint:
        """The point of its written form; ValueError for anything else."""
        module, colon, side = str(text).rpartition(":")
        if not module or not colon or side not in SIDES:
            raise ValueError(f"hook point {text!r}: must be MODULE:in or MODULE:out, as model.layers.3.mlp:in")
        return cls(module, side)

    def __str__(self) -> str:
        return f"{self.module}:{self.side}"

    def of(self, model: nn.Module) -> nn.Module:
        """The module; ValueError where the model has none of this name, with names like it."""
        modules = dict(model.named_modules())
        if self.module not in modules:
            like = difflib.get_close_matches(self.module, modules, n=3, cutoff=0.5)
            among = f", as {', '.join(like)}" if like else ""
            raise ValueError(f"hook point {self}: {type(model).__name__} has no module of this name{among}")
        return modules[self.module]


def mlp_of(model: nn.Module, layer: int) -> nn.Module:
    """The MLP of block `layer`: a module of the block that is named as one, from one tensor [B, T, d] to another.

    Raises:
        ValueError: no such block, or no such module in it.
    """
    block = check_layer(model, layer)
    found = [child for name, child in block.named_children() if name in MLP_NAMES]
    if len(found) != 1:
        held = ", ".join(name for name, _ in block.named_children())
        raise ValueError(f"layer={layer}: its block has no MLP by the name of {', '.join(MLP_NAMES)}, but {held}")
    return found[0]


def mlp_points(model: nn.Module, layer: int) -> tuple[HookPoint, HookPoint]:
    """Input and output of the MLP of block `layer`."""
    mlp = mlp_of(model, layer)
    name = next(name for name, module in model.named_modules() if module is mlp)
    return HookPoint(name, "in"), HookPoint(name, "out")


def layer_point(model: nn.Module, layer: int) -> HookPoint:
    """The output of block `layer`, which is the residual stream after it; ValueError for no such block."""
    block = check_layer(model, layer)
    return HookPoint(next(name for name, module in model.named_modules() if module is block), "out")


def check_place(model: Any, place: int | HookPoint) -> int | HookPoint:
    """A block as an int, another place as it is; ValueError for one that the model has not."""
    if isinstance(place, HookPoint):
        place.of(model)
        return place
    check_layer(model, place)
    return check_integer("layer", place, 0)


def check_places(model: Any, places: Sequence[int | HookPoint]) -> list[int | HookPoint]:
    """As `check_place`, of each; ValueError for none, or one twice."""
    found = [check_place(model, place) for place in places]
    if not found or len(set(found)) < len(found):
        given = [place if isinstance(place, int) else str(place) for place in places]
        raise ValueError(f"layers={given}: must be one or more blocks, none twice")
    return found


def points_of(model: nn.Module, places: Sequence[int | HookPoint]) -> list[HookPoint]:
    """Of blocks the outputs, of other places themselves."""
    return [layer_point(model, place) if isinstance(place, int) else place for place in places]


@contextmanager
def capture_points(model: nn.Module, points: Sequence[HookPoint]) -> Iterator[list[Any]]:
    """What stands at the points in a forward pass, which ends at the last of them and with it the `with` block.

    with capture_points(model, points) as found:
        model(input_ids=rows, use_cache=False)
    x, y = found  # [B, T, d] each

    Raises:
        ValueError: a point that the model has not; in the forward pass one that is not reached, or that has no tensor.
    """
    found: list[Any] = [None] * len(points)
    missing = set(range(len(points)))

    def keep(i: int, value: Any) -> None:
        if i in missing:
            # what comes after may add to it in place
            found[i] = _tensor(points[i], value).clone()
            missing.discard(i)
        if not missing:
            raise PassEnded

    with ExitStack() as stack:
        for i, point in enumerate(points):
            stack.callback(_watched(model, point, partial(keep, i)))
        stack.enter_context(torch.compiler.set_stance("force_eager"))  # what is compiled already knows no hooks
        try:
            yield found
        except PassEnded:
            return
    names = ", ".join(str(points[i]) for i in sorted(missing))
    raise ValueError(f"hook point {names}: {type(model).__name__} ran without it")


@contextmanager
def replaced_point(
    model: nn.Module, read: HookPoint, target: HookPoint, fn: Callable[[Tensor, Tensor], Tensor]
) -> Iterator[None]:
    """Within it, every forward pass goes on from fn(x, y) where y stands at `target`; x stands at `read` before it.

    Raises:
        ValueError: in the forward pass: `fn` changes shape or dtype of y, `read` comes after `target`.
    """
    seen: list[Tensor] = []

    def substitute(value: Any) -> Any:
        y = _tensor(target, value)
        if read != target and not seen:
            raise ValueError(f"hook point {read}: comes after {target}, which is to be made from it")
        after = fn(y if read == target else seen.pop(), y)
        if after.shape != y.shape or after.dtype != y.dtype:
            raise ValueError(f"fn returned {after.dtype} {list(after.shape)} for {y.dtype} {list(y.shape)}")
        return (after, *value[1:]) if isinstance(value, (tuple, list)) else after

    def keep(value: Any) -> None:
        seen[:] = [_tensor(read, value)]

    with ExitStack() as stack:
        if read != target:
            stack.callback(_watched(model, read, keep))
        stack.callback(_watched(model, target, substitute))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


@torch.inference_mode()
def check_points(model: Any, points: Sequence[HookPoint], rows: Tensor) -> list[int]:
    """The widths of what stands at the points, by a forward pass over the first of rows of token ids [b, T], twice.

    Raises:
        ValueError: a point that the model has not, that is reached never or more than once (a module that serves
            several blocks), or where another shape than [b, T, d] stands.
    """
    shapes: list[list[Tensor]] = [[] for _ in points]
    rows = rows[:1].expand(2, -1)  # what is the same for all rows has one

    def note(point: HookPoint, seen: list[Tensor], value: Any) -> None:
        seen.append(_tensor(point, value))

    with ExitStack() as stack:
        for point, seen in zip(points, shapes):
            stack.callback(_watched(model, point, partial(note, point, seen)))
        model(input_ids=rows, use_cache=False)
    for point, seen in zip(points, shapes):
        if len(seen) != 1:
            times = f"{len(seen)} times" if seen else "never"
            raise ValueError(
                f"hook point {point}: is reached {times} in a pass of {type(model).__name__}, must be once"
            )
        x = seen[0]
        if x.ndim != 3 or x.shape[:2] != rows.shape or not x.is_floating_point():
            raise ValueError(f"hook point {point}: has {x.dtype} {list(x.shape)}, must be [{rows.shape[0]}, T, d]")
    return [seen[0].shape[-1] for seen in shapes]


def _watched(model: nn.Module, point: HookPoint, fn: Callable[[Any], Any]) -> Callable[[], None]:
    """Calls fn with what stands at the point; what it gives takes its place unless it is None. Returns what ends it."""

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            after = fn(args[0])
            return None if after is None else ((after, *args[1:]), kwargs)
        name = next(iter(kwargs), "")
        after = fn(kwargs.get(name))
        return None if after is None else (args, {**kwargs, name: after})

    def behind(module: nn.Module, args: Any, output: Any) -> Any:
        return fn(output)

    module = point.of(model)
    if point.side == "in":
        return module.register_forward_pre_hook(before, with_kwargs=True).remove
    return module.register_forward_hook(behind).remove


def _tensor(point: HookPoint, value: Any) -> Tensor:
    x = value[0] if isinstance(value, (tuple, list)) and value else value
    if not isinstance(x, Tensor):
        raise ValueError(f"hook point {point}: has {type(x).__name__}, must be a tensor")
    return x
