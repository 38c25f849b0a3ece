"""A `SampledSAE` as the dictionaries that dictionary_learning trains, saves and loads."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from dictionary_learning.dictionary import Dictionary
from dictionary_learning.trainers import batch_top_k, top_k
from torch import Tensor

from ...codes import SparseCodes
from ...config import SampledSAEConfig
from ...formats.dictionary_learning import UNSET, check_state, read_state
from ...sae import SampledSAE
from ...support.argument_checks import check_integer
from ..replaced import has_other_methods, methods_of
from .linear_view import LinearView, parameter_of_sae
from .peer_files import NAMES, Names, from_peer_names, held_k, matrix_sizes, to_peer_names


class SampledDictionary(Dictionary):
    """A dictionary on a `SampledSAE`, `self.sae`, whose state dict is that of dictionary_learning's own class.

    Initial weights are drawn as that class draws them, from torch's global generator. `encoder.weight` [F, d],
    `encoder.bias` [F], `decoder.weight` [d, F] and `b_dec` [d] are views of the SAE's parameters, which are what
    `parameters()` lists; `threshold` is the SAE's, -1 as long as none is known.

    Args:
        activation_dim, dict_size: d and F.
        k: average number of active features a token, a whole number.
        device: of the parameters.
        rule: other fields of the `SampledSAEConfig`.

    Raises:
        ValueError, TypeError: naming the argument, its value and what is allowed.
    """

    peer: type[Any]
    names: Names = NAMES
    select: str
    by_threshold: bool
    _methods: dict[str, Any]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__module__.startswith(__name__.rpartition(".")[0]):
            cls._methods = methods_of(cls, ("encode", "decode"), "dictionary_learning")

    def __init__(
        self, activation_dim: int, dict_size: int, k: int, device: torch.device | str | None = None, **rule: Any
    ) -> None:
        super().__init__()
        activation_dim = check_integer("activation_dim", activation_dim, 1)
        dict_size = check_integer("dict_size", dict_size, 1)
        k = check_integer("k", k, 1)
        rule = {"l": None, "select": self.select, "aux_pool": None, **rule}
        self.sae = SampledSAE(SampledSAEConfig(d_in=activation_dim, d_sae=dict_size, k=k, **rule), device=device)
        self.sae.threshold.fill_(UNSET)
        self.register_buffer("k", torch.tensor(k, dtype=torch.int, device=device))
        self._seen_k: tuple[int, int] | None = None
        self._begin_as(self.made_by_peer(activation_dim, dict_size, k))
        self.register_state_dict_post_hook(to_peer_names)
        self.register_load_state_dict_pre_hook(from_peer_names)

    def made_by_peer(self, activation_dim: int, dict_size: int, k: int) -> Any:
        """The peer's own dictionary, whose weights this one begins with."""
        return self.peer(activation_dim, dict_size, k)

    @torch.no_grad()
    def _begin_as(self, made: Any) -> None:
        drawn = made.state_dict()
        for theirs, ours, transposed in self.names:
            if ours != "sae.threshold":
                self.get_parameter(ours).copy_(drawn[theirs].t() if transposed else drawn[theirs])

    def __setattr__(self, name: str, value: Any) -> None:
        """Parameters and modules too go to the properties below, which torch would hide them behind."""
        if isinstance(getattr(type(self), name, None), property):
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    @property
    def activation_dim(self) -> int:
        return self.sae.cfg.d_in

    @property
    def dict_size(self) -> int:
        return self.sae.cfg.d_sae

    @property
    def threshold(self) -> Tensor:
        """0-dim; below 0 as long as none is known. Assigning copies the value, a number or a 0-dim tensor."""
        return self.sae.threshold

    @threshold.setter
    def threshold(self, value: Tensor | float) -> None:
        with torch.no_grad():
            self.sae.threshold.copy_(torch.as_tensor(value))
            self.sae.threshold_steps.copy_(self.sae.threshold >= 0)

    b_dec = parameter_of_sae("b_dec", "[d]. Assigning copies the values.")

    @property
    def encoder(self) -> LinearView:
        """weight [F, d], bias [F]."""
        return LinearView(self.sae.W_enc, self.sae.b_enc)

    @property
    def decoder(self) -> LinearView:
        """weight [d, F]."""
        return LinearView(self.sae.W_dec, None)

    def hear_k(self) -> None:
        """Takes over what someone has written to `k`. A GPU is waited for where it is another tensor or was written to.

        Raises:
            ValueError: a k that is not a whole number in [1, dict_size].
        """
        seen = (id(self.k), self.k._version)
        if self.k.device.type != "cpu" and seen == self._seen_k:
            return
        # without an operation: a schedule may write to `.data`, of which torch keeps no count
        k = self.k.detach().cpu().numpy().item()
        if k != self.sae.cfg.k:
            check_integer("k", int(k) if k == int(k) else k, 1)
            self.sae.cfg = replace(self.sae.cfg, k=int(k))
        self._seen_k = seen

    def has_other_methods(self) -> bool:
        """Whether `encode` or `decode` is someone else's; also of what torch.compile has wrapped."""
        return has_other_methods(self, self._methods)

    def decode(self, f: Tensor | SparseCodes) -> Tensor:
        """Features [..., F], or SparseCodes, to activations [..., d]."""
        return self.sae.decode(f)

    def forward(self, x: Tensor, output_features: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """The reconstruction of x [..., d], and with `output_features` the features [..., F] too."""
        codes = self._codes(x, self.by_threshold)
        x_hat = self.decode(codes).view(*x.shape[:-1], self.activation_dim)
        return (x_hat, self._dense(codes, x)) if output_features else x_hat

    @torch.no_grad()
    def scale_biases(self, scale: float) -> None:
        """What follows from activations that are `scale` times as large: biases and threshold are multiplied."""
        self.sae.b_enc.mul_(scale)
        self.sae.b_dec.mul_(scale)
        self.threshold.copy_(torch.where(self.threshold >= 0, self.threshold * scale, self.threshold))

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        k: int | None = None,
        device: torch.device | str | None = None,
        **kwargs: Any,
    ) -> SampledDictionary:
        """Reads an `ae.pt` of dictionary_learning's class of this name, whoever trained it.

        Args:
            path: of the file.
            k: needed where the file does not hold it.
            kwargs: other fields of the `SampledSAEConfig`.

        Raises:
            ValueError: a missing, truncated or foreign file, or one of another k.
        """
        path = Path(path)
        tensors = read_state(path)
        shape = cls._shape_in(path, tensors)
        dictionary = cls(**shape, k=held_k(path, tensors, k), device=device, **kwargs)
        dictionary.load_state_dict(tensors)
        return dictionary

    @classmethod
    def _shape_in(cls, path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """What a file's tensors say of the arguments; they are those of this class."""
        d_sae, d_in = matrix_sizes(path, tensors, "encoder.weight", "dict_size, activation_dim")
        check_state(path, tensors, d_in, d_sae)
        return {"activation_dim": d_in, "dict_size": d_sae}

    def _codes(self, x: Tensor, by_threshold: bool) -> SparseCodes | Tensor:
        """What is kept of x [..., d], by the threshold or as in training; dense where no threshold is known yet."""
        self.hear_k()
        if by_threshold and float(self.threshold) < 0:
            # every positive activation: so many that a list of them is the larger form
            return self._activations(x)
        x = x.to(self.sae.W_enc.dtype)
        if by_threshold:
            return self.sae.encode_above_threshold(x)
        return self.sae.train().encode_sparse(x)

    def _activations(self, x: Tensor) -> Tensor:
        """relu((x - b_dec) W_enc + b_enc), [..., F]."""
        return self.encoder(x.to(self.b_dec.dtype) - self.b_dec).relu()

    def _dense(self, codes: SparseCodes | Tensor, x: Tensor) -> Tensor:
        """[..., F], in the weights' dtype."""
        if isinstance(codes, SparseCodes):
            codes = codes.to_dense().to(self.sae.W_enc.dtype)
        return codes.view(*x.shape[:-1], self.dict_size)


class BatchTopKSAE(SampledDictionary):
    """dictionary_learning's `BatchTopKSAE`: a feature is active where its activation exceeds the threshold."""

    peer = batch_top_k.BatchTopKSAE
    select = "batch"
    by_threshold = True

    def encode(self, x: Tensor, return_active: bool = False, use_threshold: bool = True) -> Any:
        """Features [..., F] of x [..., d].

        Args:
            return_active: also give bool [..., F] without the first dimension, the features active in it, and all
                activations after the relu, [..., F].
            use_threshold: False keeps, as in training, the k * tokens largest activations.
        """
        f = self._dense(self._codes(x, use_threshold), x)
        return (f, f.sum(0) > 0, self._activations(x)) if return_active else f


class AutoEncoderTopK(SampledDictionary):
    """dictionary_learning's `AutoEncoderTopK`: the k largest activations of each token."""

    peer = top_k.AutoEncoderTopK
    select = "token"
    by_threshold = False

    def encode(self, x: Tensor, return_topk: bool = False, use_threshold: bool = False) -> Any:
        """Features [..., F] of x [..., d].

        Args:
            return_topk: also give the k largest activations and their features, [..., k] each, in any order, and
                all activations after the relu, [..., F].
            use_threshold: keep what exceeds the threshold instead.
        """
        f = self._dense(self._codes(x, use_threshold), x)
        if not return_topk:
            return f
        activations = self._activations(x)
        values, features = activations.topk(int(self.k), dim=-1, sorted=False)
        return f, values, features, activations
