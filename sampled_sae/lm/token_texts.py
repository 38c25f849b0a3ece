"""Tokens as people read them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# how vocabularies write the space before a word
_SPACES = ("▁", "Ġ")
_NO_TEXT = "\ufffd"


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text of each token alone, its leading space included.

    Part of a character is written as the vocabulary has it, an id without a token as `#id`.
    """
    raw = tokenizer.convert_ids_to_tokens(list(ids))
    decoded = tokenizer.batch_decode([[i] for i in ids], clean_up_tokenization_spaces=False)
    return [_text(*one) for one in zip(ids, raw, decoded)]


def _text(i: int, raw: str | None, decoded: str) -> str:
    if raw is None:
        return f"#{i}"
    if not decoded or _NO_TEXT in decoded:
        return str(raw)
    return f" {decoded}" if raw.startswith(_SPACES) and not decoded[0].isspace() else decoded
