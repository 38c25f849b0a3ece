"""`sae.splice(model, layer)`: a language model that runs on reconstructions, or with features steered or ablated."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..codes import Entries, SparseCodes
from ..support.argument_checks import check_flag, check_integer, check_number, plain_number
from .blocks import text_config
from .hooks import replace as replace_residual
from .sequence_start import SequenceStart


class Spliceable(Protocol):
    """An SAE, as far as a splice goes."""

    W_enc: Tensor

    def encode_sparse(self, x: Tensor) -> SparseCodes: ...

    def _reconstruction(self, codes: SparseCodes, x: Tensor) -> Tensor:
        """Of codes of x [n, d], in the units of x."""

    def _splice_refusal(self) -> str | None:
        """Why this SAE cannot stand in a model; None where it can."""


class Splicing:
    """The method `splice`, for an SAE whose reconstructions are of the activations that it reads."""

    @contextmanager
    def splice(
        self: Any,
        model: nn.Module,
        layer: int,
        *,
        replace: bool | None = None,
        steer: Mapping[int, float] | None = None,
        ablate: Iterable[int] = (),
        drop_first: bool = True,
        max_norm: float = math.inf,
    ) -> Iterator[None]:
        """Within the context the model goes on from a changed residual stream after block `layer`, generation included.

            with sae.splice(model, 15, steer={3021: 40.0}):
                model.generate(**tokenizer("The weather", return_tensors="pt"))

        With a = the codes of a token x of the residual stream, x becomes

        - nothing else given, or `replace=True`: its reconstruction `decode(a)`, with the changes below in a;
        - steered: x + s (decode(e_j) - decode(0)), which is `x + s * W_dec[j] / input_scale` for a SampledSAE. s is in
          the units of activations; below 0 it pushes away from the feature;
        - ablated: x - (decode(a_j e_j) - decode(0)): the feature's part is taken away, what the SAE does not
          reconstruct stays.

        Args:
            model: a language model of Hugging Face; its parameters are not changed.
            layer: index of the block, from 0; the one whose output the SAE was trained on.
            replace: continue from reconstructions; by default where nothing is steered or ablated.
            steer: feature -> what is added to its activation, at every token.
            ablate: features whose activation becomes 0.
            drop_first: leave the first token of each sequence as it is, as a harvest does. Behind left padding it is
                the first that `attention_mask` lets through.
            max_norm: vectors whose norm is larger stay as they are too; the manifest of a harvest has its `max_norm`.

        Raises:
            ValueError: no such layer or feature, a feature both steered and ablated, an SAE of another width, in
                training mode, spread over processes, or a transcoder; as `sampled_sae.lm.replace` in the forward pass.
            TypeError: an argument of another type.
        """
        edit = Edit(self, replace, steer, ablate)
        _check_width(self, model)
        limit = plain_number(max_norm)
        if limit is None or not limit > 0:
            raise ValueError(f"max_norm={max_norm!r}: must be a number above 0")
        start, leaves_first = SequenceStart(model), check_flag("drop_first", drop_first)

        def change(x: Tensor) -> Tensor:
            changed = ~(x.float().norm(dim=-1) > limit)
            if leaves_first:
                changed &= ~start.mask(x)
            if not changed.any():
                return x
            return x.masked_scatter(changed[..., None], edit(x[changed]).to(x))

        with start.watched(), replace_residual(model, layer, change):
            yield


class Edit:
    """x [n, d] to what takes its place.

    Args: as those of `Splicing.splice`.
    """

    def __init__(
        self, sae: Spliceable, replace: bool | None, steer: Mapping[int, float] | None, ablate: Iterable[int]
    ) -> None:
        if refused := sae._splice_refusal():
            raise ValueError(refused)
        steered, ablated = _checked_features(sae, steer, ablate)
        self._sae = sae
        self._replace = not (steered or ablated) if replace is None else check_flag("replace", replace)
        self._steered = torch.tensor(sorted(steered), dtype=torch.int64)
        self._amounts = torch.tensor([steered[feature] for feature in sorted(steered)], dtype=torch.float64)
        self._ablated = torch.tensor(sorted(ablated), dtype=torch.int64)

    def __call__(self, given: Tensor) -> Tensor:
        sae = self._sae
        x = given.to(sae.W_enc)
        needs_codes = self._replace or len(self._ablated) > 0
        codes = sae.encode_sparse(x) if needs_codes else _empty(sae, x)
        kept = sae._reconstruction(codes, x) if self._replace else x
        changes = self._changes(codes)
        if changes is None:
            return kept
        # as a difference, so that b_dec and the norms of tokens cancel, and a token without a change stays as it is
        return kept + sae._reconstruction(changes, x) - sae._reconstruction(_empty(sae, x), x)

    def _changes(self, codes: SparseCodes) -> SparseCodes | None:
        """What is added to the codes; None for nothing."""
        values, tokens, features = codes.entries()
        n, device = codes.shape[0], values.device
        gone = torch.isin(features, self._ablated.to(device))
        steered, amounts = self._steered.to(device), self._amounts.to(values)
        values = torch.cat((-values[gone], amounts.repeat(n)))
        tokens = torch.cat((tokens[gone], torch.arange(n, device=device).repeat_interleave(len(steered))))
        features = torch.cat((features[gone], steered.repeat(n)))
        if len(values) == 0:
            return None
        order = (tokens * codes.shape[1] + features).argsort()
        return SparseCodes(values[order], tokens[order], features[order], codes.shape)


def _empty(sae: Spliceable, x: Tensor) -> SparseCodes:
    return SparseCodes(*Entries.none(x), (len(x), sae.W_enc.shape[1]))


def _checked_features(
    sae: Spliceable, steer: Mapping[int, float] | None, ablate: Iterable[int]
) -> tuple[dict[int, float], set[int]]:
    if steer is not None and not isinstance(steer, Mapping):
        raise TypeError(f"steer={steer!r}: must map features to what is added to their activations")
    if isinstance(ablate, str) or not isinstance(ablate, Iterable):
        raise TypeError(f"ablate={ablate!r}: must be features")
    steered = {
        _feature(sae, "steer", feature): check_number(f"steer[{feature}]", amount, -math.inf, None)
        for feature, amount in (steer or {}).items()
    }
    ablated = {_feature(sae, "ablate", feature) for feature in ablate}
    if both := sorted(set(steered) & ablated):
        raise ValueError(f"ablate={both}: is steered too; a feature can be one or the other")
    return steered, ablated


def _feature(sae: Spliceable, name: str, feature: Any) -> int:
    number = check_integer(name, feature, 0)
    if number >= sae.W_enc.shape[1]:
        raise ValueError(f"{name}={number}: must be a feature from 0 to {sae.W_enc.shape[1] - 1}")
    return number


def _check_width(sae: Spliceable, model: nn.Module) -> None:
    width = getattr(text_config(model), "hidden_size", None)
    if width is not None and width != sae.W_enc.shape[0]:
        raise ValueError(f"model={type(model).__name__}: has d={width}, the SAE reads d_in={sae.W_enc.shape[0]}")
