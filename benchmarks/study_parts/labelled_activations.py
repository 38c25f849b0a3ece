"""Activations of labelled texts, made once by the model and kept beside the store that they belong to."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.study_parts import labelled_texts
from sampled_sae.lm import capture, load_model, token_rows

# the first tokens of a document, of which every third is read; the first one stands where nothing is trained
CONTEXT, FIRST, EVERY = 48, 2, 3
# texts of a task, half of them for training; passages and words of the part-of-speech task
TEXTS, PASSAGES, WORDS = 800, 160, 24
ROWS_AT_ONCE = 16


@dataclass(frozen=True)
class Task:
    """What a probe is asked: the class of each item.

    Attributes:
        name: topic, sentiment, language or speech.
        x: float32 [n, p, d], as the model made them: p tokens of each of n items.
        labels: int64 [n]. The first half of the items are for training, the others for measures.
    """

    name: str
    x: Tensor
    labels: Tensor


def tasks_of(file: Path, model: str, layer: int, texts: Path) -> list[Task]:
    """Reads the file; where it is not there it is made from the texts in the folder `texts`."""
    if not file.exists():
        save_file(_harvested(model, layer, texts), file)
    found = load_file(file)
    names = [name.removesuffix(".labels") for name in found if name.endswith(".labels")]
    return [Task(name, found[f"{name}.x"].float(), found[f"{name}.labels"]) for name in names]


def _harvested(name: str, layer: int, texts: Path) -> dict[str, Tensor]:
    model, tokenizer = load_model(name)
    found = {}
    for task, labelled in labelled_texts.documents(texts, characters=6 * CONTEXT).items():
        rows, labels = _rows(labelled, tokenizer)
        x = torch.cat([x[:, FIRST::EVERY] for x in _residuals(model, layer, rows)])
        found |= {f"{task}.x": x.contiguous(), f"{task}.labels": torch.tensor(labels)}
    rows, places, labels = _words(labelled_texts.tagged(texts), tokenizer)
    x = torch.cat(list(_residuals(model, layer, rows))).flatten(0, 1)[places]
    return found | {"speech.x": x[:, None].contiguous(), "speech.labels": torch.tensor(labels)}


def _rows(labelled: list[tuple[str, int]], tokenizer: Any) -> tuple[Tensor, list[int]]:
    """As many texts of each class, each cut to one row [TEXTS, CONTEXT]; in an order that mixes the classes."""
    most = TEXTS // len({label for _, label in labelled})
    rows, labels = [], []
    for text, label in labelled:
        beginning = tokenizer(text[: 10 * CONTEXT], add_special_tokens=False)["input_ids"]
        if labels.count(label) < most and len(beginning) >= CONTEXT:
            rows.append(token_rows([text], tokenizer, CONTEXT, limit=1))
            labels.append(label)
    return torch.cat(rows), labels


def _words(passages: Iterable[tuple[str, list[tuple[int, int]]]], tokenizer: Any) -> tuple[Tensor, Tensor, list[int]]:
    """Rows [n, CONTEXT]; of some words the place of their last token among all, and their class."""
    draw = random.Random(0)
    rows, places, labels = [], [], []
    for text, words in passages:
        if len(rows) == PASSAGES:
            break
        row = token_rows([text], tokenizer, CONTEXT, limit=1)
        found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        start = CONTEXT - 1  # a row begins with one token of its own
        if row[0, 1:].tolist() != found["input_ids"][:start]:
            raise ValueError(f"the tokens of {text[:40]!r} are not where they are expected")
        at = {end: place for place, (_, end) in enumerate(found["offset_mapping"][:start], 1)}
        seen = [(at[end], kind) for end, kind in words if at.get(end, 0) >= FIRST]
        for place, kind in sorted(draw.sample(seen, min(WORDS, len(seen)))):
            places.append(len(rows) * CONTEXT + place)
            labels.append(kind)
        rows.append(row)
    return torch.cat(rows), torch.tensor(places), labels


@torch.no_grad()
def _residuals(model: Any, layer: int, rows: Tensor) -> Iterator[Tensor]:
    for part in rows.split(ROWS_AT_ONCE):
        with capture(model, layer) as captured:
            model(input_ids=part, use_cache=False)
        yield captured.value.float()
