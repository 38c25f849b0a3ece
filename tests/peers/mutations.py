"""Every change that can be made, in the ways that Python and torch allow, to an object that a peer trains."""

from __future__ import annotations

import functools
import inspect

import torch
from torch import nn


def changed_value(value):
    """Another value of the same kind that a user might set; None where there is none."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value - 1 if value > 1 else value + 1
    if isinstance(value, float):
        return 0.5 * value + 0.1
    if isinstance(value, list) and len(value) > 1 and isinstance(value[0], int):
        return [value[0] + 3, *value[1:]]
    return None


def scaled(result, factor=1.25):
    """The result of a function with its tensors, or it if it is a number, a quarter larger."""
    if isinstance(result, float):
        return result * factor
    if isinstance(result, torch.Tensor):
        return result * factor if result.is_floating_point() else result
    if isinstance(result, dict):
        return {name: scaled(value) for name, value in result.items()}
    if inspect.isgenerator(result):
        return (scaled(value) for value in result)
    if isinstance(result, tuple):
        return type(result)(*map(scaled, result)) if hasattr(result, "_fields") else tuple(map(scaled, result))
    return result


def louder(function):
    """`function` with its result scaled, under its own name and module."""

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return scaled(function(*args, **kwargs))

    return wrapper


class Louder(nn.Module):
    """A module in the place of another."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return scaled(self.module(*args, **kwargs))


def set_attribute(path, value):
    def change(root):
        *parents, last = path.split(".")
        for name in parents:
            root = getattr(root, name)
        setattr(root, last, value)

    return change


def change_in(path, function):
    """Changes the object at `path` by `function(object)`."""

    def change(root):
        for name in filter(None, path.split(".")):
            root = getattr(root, name)
        function(root)

    return change


def wrapped(path, wrap=louder):
    def change(root):
        *parents, last = path.split(".")
        for name in parents:
            root = getattr(root, name)
        setattr(root, last, wrap(getattr(root, last)))

    return change


@torch.no_grad()
def fill(tensor):
    """In place, another value of the same kind."""
    if tensor.is_floating_point():
        tensor.mul_(1.25).add_(0.01)
    else:
        tensor.copy_(torch.tensor(changed_value(int(tensor)) if tensor.dim() == 0 else 1))


def new_data(parameter):
    parameter.data = parameter.data.clone().contiguous() * 1.25


def of_values(root, path=""):
    """Of numbers, switches and lists among an object's attributes: {name: change}."""
    return {
        f"{path}{name} = {changed_value(value)}": set_attribute(f"{path}{name}", changed_value(value))
        for name, value in vars(root).items()
        if not name.startswith("_") and changed_value(value) is not None
    }


def of_functions(root, names):
    """Of functions that stand on the object, and of methods, replaced on the object."""
    own = [name for name, value in vars(root).items() if callable(value) and not name.startswith("_")]
    return {f"{name}() on the object": wrapped(name) for name in sorted({*own, *names})}


def of_tensors(root):
    """Of parameters and buffers, by assignment, in place, through .data, frozen, with a gradient hook."""
    found = {}
    for name, _ in root.named_parameters():
        found[f"{name} in place"] = change_in(name, fill)
        found[f"{name}.data"] = change_in(name, new_data)
        found[f"{name} frozen"] = change_in(name, lambda p: p.requires_grad_(False))
        found[f"{name} new"] = wrapped(name, lambda p: nn.Parameter(1.25 * p.detach().contiguous()))
        found[f"{name} gradient hook"] = change_in(name, lambda p: p.register_hook(lambda grad: 3 * grad))
    for name, buffer in root.named_buffers():
        found[f"{name} in place"] = change_in(name, fill)
        if buffer.is_floating_point():
            found[f"{name} new"] = wrapped(name, lambda b: 1.25 * b + 0.01)
    return found


def of_modules(root):
    """Of submodules: replaced, their forward replaced, hooks, their own values."""
    found = {}
    for name, module in root.named_modules():
        if not name:
            continue
        found |= of_values(module, f"{name}.")
        found[f"{name} replaced"] = wrapped(name, Louder)
        found[f"{name}.forward"] = wrapped(f"{name}.forward")
        found[f"{name} forward hook"] = change_in(
            name, lambda m: m.register_forward_hook(lambda module, inputs, output: scaled(output))
        )
        found[f"{name} forward pre-hook"] = change_in(
            name, lambda m: m.register_forward_pre_hook(lambda module, inputs: scaled(inputs))
        )
        found[f"{name} backward hook"] = change_in(
            name, lambda m: m.register_full_backward_hook(lambda module, inputs, outputs: scaled(inputs))
        )
    return found
