"""Documents in files, read as they are asked for: .txt, .json, .jsonl, .csv, .tsv, each also .gz, and .parquet."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Union

from sampled_sae.support.remote_files import AnyPath, RemotePath

Chat = list[dict[str, Any]]  # messages with "role" and "content"
WHOLE_BYTES = 64 << 20  # files of up to so much together are read at once

_KINDS = (".txt", ".jsonl", ".json", ".csv", ".tsv", ".parquet")  # a folder gives the first of them that it holds
_SPEAKERS = {"human": "user", "gpt": "assistant"}  # of ShareGPT, whose messages have "from" and "value"
_TEXT_KEYS = ("text", "extract", "content", "messages", "conversations")
_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_CHUNK = 1 << 20


class LongText:
    """A document too long to be held: iterating over it gives its text in pieces."""

    def __init__(self, file: AnyPath) -> None:
        self.file = file

    def __repr__(self) -> str:
        return f"LongText({str(self.file)!r})"

    def __iter__(self) -> Iterator[str]:
        with _open(self.file) as opened:
            yield opened.read(_CHUNK).lstrip()
            while piece := opened.read(_CHUNK):
                yield piece


Document = Union[str, Chat, LongText]  # noqa: UP007  (evaluated at import, where a class may stand on the left)


def find_files(path: AnyPath) -> list[AnyPath]:
    """The file itself, or those of one kind in a folder, by name.

    Raises:
        ValueError: no such file, a kind that is not known, a folder without files of a known kind.
        ImportError: for .parquet without pyarrow.
    """
    if path.is_dir():
        files = [file for file in path.iterdir() if file.is_file() and not file.name.startswith(".")]
        of_kinds = ([file for file in files if _kind(file) == kind] for kind in _KINDS)
        found = sorted(next(filter(None, of_kinds), []), key=lambda file: file.name)
        if not found:
            raise ValueError(f"source={str(path)!r} is a folder without any {', '.join(_KINDS)} file")
    else:
        found = [path]
        if not path.is_file():
            raise ValueError(f"source={str(path)!r} is no file or folder")
        if _kind(path) not in _KINDS:
            raise ValueError(f"source={str(path)!r} must end in {', '.join(_KINDS)}, or be a folder of such files")
    if _kind(found[0]) == ".parquet":
        _parquet()
    return found


def are_small(files: list[AnyPath]) -> bool:
    """Whether they may be read at once; what is compressed is taken for 20 times as much."""
    compressed = (".gz", ".parquet")
    sizes = [file.size() if isinstance(file, RemotePath) else file.stat().st_size for file in files]
    return sum(size * (20 if file.suffix in compressed else 1) for file, size in zip(files, sizes)) <= WHOLE_BYTES


def read_documents(file: AnyPath, column: str | None) -> Iterator[Document | None]:
    """The documents of one file in order; None where one is null.

    Args:
        column: key of the text in each record; by default the first of "text", "extract", "content", "messages"
            and "conversations" that is there.

    Raises:
        ValueError: naming file and line or record: no JSON, no text in it, bytes that are no text.
    """
    readers = {".txt": _plain, ".jsonl": _json_lines, ".json": _json, ".parquet": _parquet_rows}
    try:
        yield from readers.get(_kind(file), _table)(file, column)
    except UnicodeDecodeError as error:
        raise ValueError(f"{file.name} is not in one encoding to its end ({error}): convert it to UTF-8") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{file.name} is not a whole gzip file ({error})") from None


def document_of(record: Any, where: str, column: str | None = None) -> Document | None:
    """The text or chat in a record; None where it is null."""
    document = _text_or_chat(record)
    if document is not None or record is None:
        return document
    if isinstance(record, dict):
        there = [record[key] for key in ([column] if column else _TEXT_KEYS) if key in record]
        for value in there:
            if (document := _text_or_chat(value)) is not None:
                return document
        if there and all(value is None for value in there):
            return None
    wanted = column or " or ".join(_TEXT_KEYS)
    keys = f", has {', '.join(map(str, record))}" if isinstance(record, dict) else ""
    raise ValueError(
        f"{where} must be a string, or an object with a string or a chat (a list of role and content) under {wanted}"
        + keys
    )


def _text_or_chat(value: Any) -> str | Chat | None:
    return value if isinstance(value, str) else chat_of(value)


def chat_of(value: Any) -> Chat | None:
    """A chat, whose messages may have "from" and "value" as ShareGPT's do; None for what is no chat."""
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        return None
    chat = [
        {"role": _SPEAKERS.get(str(message["from"]), message["from"]), "content": message["value"]}
        if {"from", "value"} <= message.keys()
        else message
        for message in value
    ]
    return chat if all({"role", "content"} <= message.keys() for message in chat) else None


def _kind(file: AnyPath) -> str:
    return Path(file.name.removesuffix(".gz")).suffix.lower()


def _plain(file: AnyPath, column: str | None) -> Iterator[Document]:
    if not are_small([file]):
        yield LongText(file)
        return
    with _open(file) as opened:
        yield opened.read()


def _json_lines(file: AnyPath, column: str | None) -> Iterator[Document | None]:
    with _open(file) as opened:
        for number, line in enumerate(opened, start=1):
            if line.strip():
                where = f"{file.name}, line {number}"
                yield document_of(_parsed(line, where), where, column)


def _json(file: AnyPath, column: str | None) -> Iterator[Document | None]:
    with _open(file) as opened:
        content = _parsed(opened.read(), file.name)
    if not isinstance(content, list | dict):
        raise ValueError(f"{file.name} must hold a list or an object of documents")
    records = [content] if chat_of(content) else content.values() if isinstance(content, dict) else content
    for number, record in enumerate(records):
        yield document_of(record, f"{file.name}, record {number}", column)


def _table(file: AnyPath, column: str | None) -> Iterator[Document | None]:
    csv.field_size_limit(2**31 - 1)  # a cell holds a whole document
    with _open(file) as opened:
        reader = csv.DictReader(opened, delimiter="\t" if _kind(file) == ".tsv" else ",")
        try:
            name = _column(file, column, list(reader.fieldnames or ()))
            for record in reader:
                yield record[name]
        except csv.Error as error:
            raise ValueError(f"{file.name}, line {reader.line_num} is not a table: {error}") from None


def _parquet_rows(file: AnyPath, column: str | None) -> Iterator[Document | None]:
    parquet = _parquet()
    try:
        table = parquet.ParquetFile(file.open("rb") if isinstance(file, RemotePath) else file)
    except Exception as error:  # pyarrow's own classes, which differ from version to version
        raise ValueError(f"{file.name} is not a parquet file ({error})") from None
    with table:
        name = _column(file, column, list(table.schema_arrow.names))
        number = 0
        for batch in table.iter_batches(batch_size=256, columns=[name]):
            for record in batch.to_pylist():
                yield document_of(record, f"{file.name}, record {number}", name)
                number += 1


def _parquet() -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError("a .parquet file needs the package pyarrow: pip install pyarrow") from error
    return pyarrow.parquet


def _column(file: AnyPath, column: str | None, names: list[str]) -> str:
    for name in [column] if column else _TEXT_KEYS:
        if name in names:
            return name
    wanted = f"no column {column!r}" if column else f"no column {' or '.join(_TEXT_KEYS)}"
    raise ValueError(f"{file.name} has {wanted}, but {', '.join(map(repr, names))}: name one, as in {file.name}:COLUMN")


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON: {error}") from error


def _open(file: AnyPath) -> io.TextIOWrapper:
    """The file as text, its line ends as they are."""
    encoding = _encoding(file)  # first: a file in fsspec's memory has one place for all who read it
    return io.TextIOWrapper(_bytes(file), encoding=encoding, newline="\n")


def _bytes(file: AnyPath) -> Any:
    if file.suffix == ".gz":
        return gzip.open(file.open("rb") if isinstance(file, RemotePath) else file)
    return file.open("rb")


def _encoding(file: AnyPath) -> str:
    """That of its byte order mark, else UTF-8, or Latin-1 where its first 64 MiB are not valid UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    with _bytes(file) as opened:
        head = opened.read(4)
        for mark, encoding in _MARKS.items():
            if head.startswith(mark):
                return encoding
        try:
            decoder.decode(head)
            for _ in range(WHOLE_BYTES // _CHUNK + 1):
                chunk = opened.read(_CHUNK)
                decoder.decode(chunk, final=not chunk)
                if not chunk:
                    break
        except UnicodeDecodeError:
            return "latin-1"
    return "utf-8"
