"""Documents in the pieces that a tokenizer is given at a time."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from sampled_sae.lm.text_files import Document, chat_of

PIECE = 1 << 16  # characters that are tokenized at a time: tokenizers take long for very long texts


class Piece(NamedTuple):
    """Of a document, which `begins` with it or not. crc32: of all pieces up to this one."""

    number: int
    begins: bool
    text: str
    crc32: int


def numbered_pieces(texts: Iterable[Document], tokenizer: Any) -> Iterator[Piece]:
    """Those of all documents, from 0; a chat in the words of the tokenizer's template."""
    crc32 = 0
    for number, (begins, text) in enumerate(_pieces(texts, tokenizer)):
        crc32 = zlib.crc32(text.encode("utf-8", "surrogatepass") + b"\0", crc32)
        yield Piece(number, begins, text, crc32)


def _pieces(texts: Iterable[Document], tokenizer: Any) -> Iterator[tuple[bool, str]]:
    keeps_space: bool | None = None
    for text in texts:
        if isinstance(text, (list, dict, bytes)) or not isinstance(text, Iterable):
            text = _chat_text(text, tokenizer)
        if isinstance(text, str):
            text = _without_halves(text)
        if isinstance(text, str) and len(text) <= PIECE:
            yield True, text
            continue
        if keeps_space is None:
            keeps_space = _keeps_space(tokenizer)
        begins = True
        for piece in _cut([text] if isinstance(text, str) else text, keeps_space):
            yield begins, piece
            begins = False


def _without_halves(text: str) -> str:
    """U+FFFD for half of a surrogate pair, as a text that was cut in JSON ends with, and which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _cut(parts: Iterable[str], keeps_space: bool) -> Iterator[str]:
    """The text of the parts in pieces of at most PIECE characters; none is empty."""
    held = ""
    for part in parts:
        held += part
        start = 0
        while len(held) - start > PIECE:
            end = _cut_point(held, start)
            yield held[start:end]
            start = end + (held[end] == " " and not keeps_space)
        held = held[start:]
    if held.strip():
        yield held.rstrip()


def _cut_point(text: str, start: int) -> int:
    """Before the last lone space in the second half of the piece, else behind a line's end, else at its end."""
    least, most = start + PIECE // 2, start + PIECE
    at = text.rfind(" ", least, most)
    for _ in range(64):
        if at < 0:
            break
        if not text[at - 1].isspace() and not text[at + 1].isspace():
            return at
        at = text.rfind(" ", least, at)
    line_end = text.rfind("\n", least, most)
    return most if line_end < 0 else line_end + 1


def _keeps_space(tokenizer: Any) -> bool:
    """Whether the space at a cut belongs to the piece behind it, or is what the tokenizer puts before a text itself."""
    texts = ["one two", "one", " two", "two"]
    whole, left, spaced, bare = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return left + spaced == whole or left + bare != whole


def _chat_text(document: Any, tokenizer: Any) -> str:
    chat = chat_of(document)
    if chat is None:
        raise TypeError(
            f"texts: {str(document)[:200]!r} must be a string, a chat (a list of role and content) or an iterator of "
            "a text's pieces"
        )
    if not getattr(tokenizer, "chat_template", None):
        return "\n\n".join(filter(None, (_content(message["content"]) for message in chat)))
    try:
        text = tokenizer.apply_chat_template(chat, tokenize=False)
    except Exception as error:  # a template raises what it likes
        raise ValueError(f"the tokenizer's chat template refuses {str(chat)[:200]}: {error}") from error
    return text.removeprefix(tokenizer.bos_token or "")  # a bos between documents is put in with the others


def _content(content: Any) -> str:
    """A message's text: itself, or its parts of text."""
    if isinstance(content, list):
        return "".join(part.get("text") or "" for part in content if isinstance(part, dict))
    return content or ""
