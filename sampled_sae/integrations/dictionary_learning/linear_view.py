"""`encoder` and `decoder` of a dictionary: what they show lies in a `SampledSAE`, and what is assigned goes there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Transposed(Tensor):
    """W.T, which writes to W whatever is assigned to its `data`; operations give ordinary tensors."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    of: torch.nn.Parameter

    @property
    def data(self) -> Tensor:
        return self.of.data.t()

    @data.setter
    def data(self, value: Tensor) -> None:
        write(self.of, value.t())

    def requires_grad_(self, requires_grad: bool = True) -> Transposed:
        self.of.requires_grad_(requires_grad)
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Saved as an ordinary tensor."""
        return self.detach().__reduce_ex__(protocol)

    def register_hook(self, hook: Any) -> Any:
        raise RuntimeError("register_hook: the trainers here leave gradients as rows, which call no hooks")


class LinearView:
    """What `torch.nn.Linear` computes and how it names its tensors, over parameters W [in, out] and bias [out]."""

    def __init__(self, W: torch.nn.Parameter, bias: torch.nn.Parameter | None) -> None:
        self._W, self._bias = W, bias

    @property
    def weight(self) -> Tensor:
        view = self._W.t().as_subclass(Transposed)
        view.of = self._W
        return view

    @weight.setter
    def weight(self, value: Tensor) -> None:
        write(self._W, value.t())

    @property
    def bias(self) -> torch.nn.Parameter | None:
        return self._bias

    @bias.setter
    def bias(self, value: Tensor) -> None:
        if self._bias is None:
            raise AttributeError("decoder.bias: dictionaries of this kind have none; b_dec is added")
        write(self._bias, value)

    def __call__(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, self._W.t(), self._bias)


def parameter_of_sae(name: str, about: str) -> property:
    """A property of a dictionary: this parameter of its `sae`. Assigning copies the values."""

    def assign(dictionary: Any, value: Tensor) -> None:
        write(getattr(dictionary.sae, name), value)

    return property(lambda dictionary: getattr(dictionary.sae, name), assign, doc=about)


@torch.no_grad()
def write(parameter: torch.nn.Parameter, value: Tensor) -> None:
    """Into the parameter's own memory, which the optimizer knows."""
    if value.shape != parameter.shape:
        raise ValueError(f"a tensor of shape {tuple(value.shape)}: must be {tuple(parameter.shape)}, that of the SAE")
    parameter.copy_(value)
