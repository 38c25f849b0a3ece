"""Tokens that no SAE is trained on, and that a splice therefore leaves as they are: attention sinks and outliers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from sampled_sae.lm.blocks import text_config
from sampled_sae.support.argument_checks import check_integer

_ROLES = ("bos", "eos", "pad", "cls", "sep", "mask")
END_OF_TEXT = "<|endoftext|>"


def special_tokens(tokenizer: Any) -> list[int]:
    """Ids, ascending, of a tokenizer's bos, eos, pad, cls, sep and mask tokens and <|endoftext|>, those it has."""
    by_role = (getattr(tokenizer, f"{role}_token_id", None) for role in _ROLES)
    return _ids(*by_role, tokenizer.get_vocab().get(END_OF_TEXT))


def check_drop_tokens(model: Any, drop_tokens: Iterable[int] | None) -> list[int]:
    """The ids, ascending, checked; for None the special tokens that the model's configuration names."""
    about = text_config(model)
    vocabulary = getattr(about, "vocab_size", None)
    if drop_tokens is None:
        holders = [holder for holder in (about, getattr(model, "generation_config", None)) if holder is not None]
        named = _ids(*(getattr(holder, f"{role}_token_id", None) for holder in holders for role in _ROLES))
        return [token for token in named if vocabulary is None or 0 <= token < vocabulary]
    tokens = sorted({check_integer("drop_tokens", token, 0) for token in drop_tokens})
    if vocabulary is not None and tokens and tokens[-1] >= vocabulary:
        raise ValueError(f"drop_tokens={tokens[-1]}: must be a token id from 0 to {vocabulary - 1}")
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


def _ids(*found: Any) -> list[int]:
    listed = [one for value in found for one in (value if isinstance(value, (list, tuple)) else [value])]
    return sorted({int(one) for one in listed if one is not None})
