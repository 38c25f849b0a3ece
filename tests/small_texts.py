"""Texts of numbers, and a tokenizer for them."""

import random


class Numbers:
    """A tokenizer of one id a word, which are numbers; 0 stands between texts."""

    eos_token_id = 0

    def __call__(self, texts, **_):
        return {"input_ids": [[int(word) if word.isdigit() else 1 for word in text.split()] for text in texts]}

    def get_vocab(self):
        return {}


def numbered_texts(n=150, seed=0, vocabulary=61):
    """So many texts of 3 to 19 words, which are numbers from 1 to below `vocabulary`."""
    draw = random.Random(seed)
    for _ in range(n):
        yield " ".join(str(draw.randrange(1, vocabulary)) for _ in range(draw.randrange(3, 20)))
