"""benchmarks/study_parts/spelling.py: how often a model names a word's first letter."""

import re
from types import SimpleNamespace

import pytest
import torch

from benchmarks.study_parts.report import spelling_table
from benchmarks.study_parts.rows import Rows
from benchmarks.study_parts.spelling import SHOWN, frequent_words, spelling

WORDS = [f"{a}{b}st" for a in "abcdefgh" for b in "aeiou"]


class Pieces:
    """A tokenizer: each character is a token, with the space before it."""

    def __init__(self):
        self.known = {}

    def __call__(self, text, return_tensors=None, add_special_tokens=True):
        ids = [self.known.setdefault(piece, len(self.known)) for piece in re.findall(r" ?[^ ]", text)]
        return {"input_ids": torch.tensor([ids]) if return_tensors else ids}

    def text(self, ids):
        names = {number: piece for piece, number in self.known.items()}
        return "".join(names[i] for i in ids.tolist())


def model_that(pieces, answer):
    def model(input_ids, use_cache, logits_to_keep):
        *shown, last = pieces.text(input_ids[0]).split("\n")
        assert len(shown) == SHOWN
        assert all(re.fullmatch("([a-h])[aeiou]st: [A-H]", line) and line[0].upper() == line[-1] for line in shown)
        logits = torch.zeros(1, logits_to_keep, 99)
        logits[0, -1, pieces.known[f" {answer(last)}"]] = 1
        return SimpleNamespace(logits=logits)

    return model


@pytest.mark.parametrize(("answer", "right"), [(lambda last: last[0].upper(), 1.0), (lambda last: "Z", 0.0)])
def test_a_model_that_knows_and_one_that_does_not(answer, right):
    pieces = Pieces()
    row = spelling(model_that(pieces, answer), pieces, WORDS, seed=3, asked=20)
    assert row["right"] == right
    assert (row["seed"], row["tokens"]) == (3, 20)
    assert 3 / 20 <= row["by_chance"] <= 5 / 20


def test_one_letter_for_all_is_right_by_chance():
    pieces = Pieces()
    rows = [spelling(model_that(pieces, lambda last: "A"), pieces, WORDS, seed, asked=30) for seed in range(8)]
    assert all(row["right"] <= row["by_chance"] for row in rows)
    assert max(row["right"] for row in rows) > 0
    assert len({row["right"] for row in rows}) > 1


def test_letters_of_several_tokens_are_refused():
    def tokenizer(text, **options):
        return {"input_ids": [1, 2]}

    with pytest.raises(ValueError, match="' A' as 2 tokens"):
        spelling(None, tokenizer, WORDS, seed=0, asked=20)


def test_words_are_the_frequent_small_ones():
    texts = ["Paris paris House of houses; houses house", "houses, a1b2 extraordinarily house paris river"]
    assert frequent_words(texts, 3) == ["houses", "paris", "house"]


def test_the_table_has_a_line_for_each_model(tmp_path):
    rows = Rows(tmp_path / "spelling.csv")
    for seed, right in enumerate((0.25, 0.75)):
        rows.put({"name": "small", "seed": seed, "tokens": 20, "right": right, "by_chance": 0.1})
    assert "| small | 2 | 0.500 ±0.250 | 0.100 ±0.000 |" in spelling_table(rows)
