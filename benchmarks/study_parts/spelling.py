"""Whether a language model can spell: without that, first letters say nothing of absorption."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterable
from string import ascii_uppercase
from typing import Any

import torch

from benchmarks.study_parts.rows import Row

# examples before the word that is asked for; words that are asked; the most frequent ones of which they are drawn
SHOWN, ASKED, FREQUENT = 10, 200, 3000
_WORD = re.compile(r"\b[a-z]{4,9}\b")


def frequent_words(texts: Iterable[str], most: int = FREQUENT) -> list[str]:
    """The most frequent words of 4 to 9 small letters; of two as frequent, the one that is read first."""
    counts = Counter(word for text in texts for word in _WORD.findall(text))
    return [word for word, _ in counts.most_common(most)]


def spelling(model: Any, tokenizer: Any, words: list[str], seed: int, asked: int = ASKED) -> Row:
    """How often the model names a word's first letter, shown SHOWN others with theirs.

    Args:
        words: of which the examples and the `asked` ones are drawn by the seed.

    Returns:
        `right`, the share of the asked words for which the letter is the likeliest of the 26; `by_chance`, what naming
        the most frequent letter would give; `tokens`, how many were asked.
    """
    drawn = random.Random(seed).sample(words, SHOWN + asked)
    shown = "".join(f"{word}: {word[0].upper()}\n" for word in drawn[:SHOWN])
    letters = [_only_token(tokenizer, f" {letter}") for letter in ascii_uppercase]
    firsts = [ascii_uppercase.index(word[0].upper()) for word in drawn[SHOWN:]]
    right = sum(
        _likeliest(model, tokenizer, f"{shown}{word}:", letters) == first for word, first in zip(drawn[SHOWN:], firsts)
    )
    by_chance = Counter(firsts).most_common(1)[0][1] / asked
    return {"seed": seed, "tokens": asked, "right": right / asked, "by_chance": by_chance}


@torch.no_grad()
def _likeliest(model: Any, tokenizer: Any, prompt: str, among: list[int]) -> int:
    row = tokenizer(prompt, return_tensors="pt")["input_ids"]
    return int(model(input_ids=row, use_cache=False, logits_to_keep=1).logits[0, -1, among].argmax())


def _only_token(tokenizer: Any, text: str) -> int:
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(tokens) != 1:
        raise ValueError(f"tokenizer: writes {text!r} as {len(tokens)} tokens; first letters need one")
    return int(tokens[0])
