"""Tokens that no SAE is trained on, and that a splice therefore leaves as they are: attention sinks and outliers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from sampled_sae.residual_stream.blocks import text_config
from sampled_sae.support.argument_checks import check_integer

_ROLES = ("bos", "eos", "pad", "cls", "sep", "mask")
END_OF_TEXT = "<|endoftext|>"


def special_tokens(tokenizer: Any, model: Any = None) -> list[int]:
    """Ids, ascending, of a tokenizer's bos, eos, pad, cls, sep and mask tokens and <|endoftext|>, those it has.

    With a model only those in its vocabulary: a padding token is often added to the tokenizer alone.
    """
    found = _ids(_by_role(tokenizer), tokenizer.get_vocab().get(END_OF_TEXT))
    return found if model is None else _known(found, text_config(model))


def check_drop_tokens(model: Any, drop_tokens: Iterable[int] | None) -> list[int]:
    """The ids, ascending, checked; for None the special tokens that the model's configuration names."""
    about = text_config(model)
    if drop_tokens is None:
        return _known(_ids(_by_role(about), _by_role(getattr(model, "generation_config", None))), about)
    if isinstance(drop_tokens, str) or not isinstance(drop_tokens, Iterable):
        raise TypeError(f"drop_tokens={drop_tokens!r}: must be token ids, or None for the model's special tokens")
    tokens = sorted({check_integer("drop_tokens", token, 0) for token in drop_tokens})
    if len(_known(tokens, about)) < len(tokens):
        raise ValueError(f"drop_tokens={tokens[-1]}: must be a token id from 0 to {about.vocab_size - 1}")
    return tokens


def dropped(
    rows: Tensor, x: Tensor, drop_first: bool, drop_tokens: Iterable[int], max_norm: float
) -> tuple[Tensor, dict[str, int]]:
    """Which vectors are left out, and how many by the first reason that holds.

    Args:
        rows: int64 [b, T] token ids.
        x: float [b, T, d], their residual stream.
        drop_first: leave out position 0 of each row.
        drop_tokens: ids left out wherever they stand.
        max_norm: the largest norm that stays.

    Returns:
        (bool [b, T]; counts of "first_position", "special_token" and "norm", which add up to its sum).
    """
    out = torch.zeros_like(rows, dtype=torch.bool)
    out[:, 0] = drop_first
    special = torch.isin(rows, torch.tensor(list(drop_tokens), dtype=rows.dtype, device=rows.device))
    counts = {"first_position": int(out.sum())}
    for reason, found in (("special_token", special), ("norm", ~(x.float().norm(dim=-1) <= max_norm))):
        counts[reason] = int((found & ~out).sum())
        out |= found
    return out, counts


def left_out(
    rows: Tensor, found: Sequence[Tensor], drop_first: bool, drop_tokens: Iterable[int], max_norms: Sequence[float]
) -> tuple[Tensor, dict[str, int]]:
    """Which tokens are left out of all places for what stands at one of them, and how many by which reason.

    found, max_norms: of each place what stands there, float [b, T, d], on any device; the largest norm that stays. The
    rest is as of `dropped`.
    """
    out, counts = dropped(rows.to(found[0].device), found[0], drop_first, drop_tokens, max_norms[0])
    for x, max_norm in zip(found[1:], max_norms[1:]):
        also = dropped(rows.to(x.device), x, False, (), max_norm)[0].to(out.device) & ~out
        counts["norm"] += int(also.sum())
        out = out | also
    return out, counts


def largest_norm(rows: Tensor, x: Tensor, drop_first: bool, drop_tokens: Iterable[int], ratio: float) -> float:
    """The largest norm that stays: `ratio` times the median of x [b, T, d] without what is left out by its place.

    Raises:
        ValueError: nothing stays.
    """
    norms = x[~dropped(rows.to(x.device), x, drop_first, drop_tokens, math.inf)[0]].norm(dim=-1)
    if len(norms) == 0:
        raise ValueError(
            f"drop_tokens={list(drop_tokens)} leaves nothing of {len(rows)} rows: drop fewer, or check the texts"
        )
    return ratio * float(norms.median())


def _by_role(holder: Any) -> list[Any]:
    return [getattr(holder, f"{role}_token_id", None) for role in _ROLES]


def _ids(*found: Any) -> list[int]:
    """Ascending; from ids, lists of them (a model may have several eos tokens) and None."""
    nested = [_ids(*one) if isinstance(one, (list, tuple)) else [one] for one in found]
    return sorted({int(one) for some in nested for one in some if one is not None})


def _known(tokens: list[int], about: Any) -> list[int]:
    """Those in the vocabulary of a configuration."""
    size = getattr(about, "vocab_size", None)
    return [token for token in tokens if token >= 0 and (size is None or token < size)]
