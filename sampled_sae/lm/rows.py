"""Rows of token ids, made from documents as far as they are needed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from sampled_sae.lm.dropped import END_OF_TEXT
from sampled_sae.lm.pieces import Piece, numbered_pieces
from sampled_sae.lm.text_files import Document
from sampled_sae.support.argument_checks import check_integer

_BATCH = 256  # pieces, and
_BATCH_CHARACTERS = 1 << 20  # characters, that are read before the first of them is needed


def token_rows(texts: Iterable[Document], tokenizer: Any, context: int, limit: int | None = None) -> Tensor:
    """Token ids of the documents, joined and cut into rows; the rest that fills no row is dropped.

    A tokenizer that puts a text between cls and sep (BERT, RoBERTa) gives rows from cls to sep, with sep between
    documents. One that begins a text with its bos token (Gemma, Llama) gives rows that start with bos, with bos
    between documents too. Any other gives a stream with <|endoftext|> before each document, or the eos token where the
    vocabulary has no <|endoftext|>.

    Args:
        texts: documents, read no further than `limit` needs: strings, chats (lists of role and content: written out by
            the tokenizer's chat template, else their contents, a blank line between), or iterators of a text's pieces.
            A text is tokenized in pieces of at most 65,536 characters, which end before a single space where there is
            one: such cuts leave the tokens as they are.
        tokenizer: a Hugging Face tokenizer.
        context: tokens a row, at least 2, or 3 where each row has a cls and a sep.
        limit: stop after that many rows.

    Returns:
        int64 [N, context].

    Raises:
        ValueError: for a context that is too small, texts too short to fill one row, a chat that the template refuses,
            or a tokenizer without a separator.
        TypeError: for texts that are one string, or a document that is none.
    """
    if isinstance(texts, str):
        raise TypeError(f"texts={texts[:40]!r}: must be documents, not one string: give [text]")
    reader = RowReader(lambda: iter(texts), tokenizer, context)
    rows = reader.take(None if limit is None else check_integer("limit", limit, 1))
    if not len(rows):
        raise ValueError(f"the texts hold fewer tokens than one row of context={context}")
    return rows


class RowReader:
    """The rows of `token_rows`, as many at a time as are asked for, from a place in the documents that can be saved.

    A place knows a checksum of what was read before it. Documents that have changed by then are a ValueError.

    Args:
        texts: opens the documents at their beginning; called when the first row is asked for.
        tokenizer, context: as in `token_rows`.
        about: what the documents are of, such as the seed of their order; a training goes on with the same alone.

    Attributes:
        settings: `about` and the context.
    """

    def __init__(
        self,
        texts: Callable[[], Iterable[Document]],
        tokenizer: Any,
        context: int,
        about: dict[str, Any] | None = None,
    ) -> None:
        self.context = check_integer("context", context, 2)
        self._texts, self._tokenizer, self._frame = texts, tokenizer, _frame(tokenizer)
        self._body = context - (self._frame.start is not None) - (self._frame.end is not None)
        if self._body < 1:
            raise ValueError(f"context={context} must be at least 3: each row has a token at its start and at its end")
        self.settings = {"context": self.context, **(about or {})}
        self._which, self._of = 0, 1
        self._dealt, self._ids = False, list[int]()
        self.restart()

    def share(self, which: int, of: int) -> RowReader:
        """A reader of the same documents, at their beginning, that `deal` leaves one of so many equal parts of them."""
        other = copy.copy(self)
        other._which, other._of = which, of
        other.restart()
        return other

    def deal(self) -> None:
        """From here on to the end of the documents their pieces are dealt in turn, and only those of this share are
        read: each begins as a document does. What is in no row yet goes to the first share."""
        if self._of > 1 and not self._dealt:
            self._dealt, self._ids = True, self._ids if self._which == 0 else []

    def restart(self) -> None:
        """To the first document."""
        self.load_state_dict({"pieces": 0, "crc32": 0, "ids": []})

    def take(self, n: int | None) -> Tensor:
        """The next n rows, int64 [<= n, context], fewer where the documents end; all that are left for None."""
        rows: list[Tensor] = []
        count = 0
        while n is None or count < n:
            whole = len(self._ids) // self._body if n is None else min(len(self._ids) // self._body, n - count)
            if whole:
                rows.append(torch.tensor(self._ids[: whole * self._body], dtype=torch.int64).view(-1, self._body))
                count += whole
                del self._ids[: whole * self._body]
            elif not self._read_piece():
                break
        cut = torch.cat(rows) if rows else torch.empty(0, self._body, dtype=torch.int64)
        ends = [None if t is None else torch.full((len(cut), 1), t) for t in (self._frame.start, self._frame.end)]
        return torch.cat([part for part in (ends[0], cut, ends[1]) if part is not None], dim=1)

    def state_dict(self) -> dict[str, Any]:
        """The place behind the rows taken so far: pieces of documents that were read, and ids in no row yet."""
        dealt = {"dealt": self._dealt} if self._of > 1 else {}
        return {"pieces": self._pieces, "crc32": self._crc32, "ids": list(self._ids), **dealt}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """To a place of the same documents, which are read again up to it, but not tokenized."""
        self._pieces, self._ids = int(state["pieces"]), list(state["ids"])
        self._crc32: int | None = state.get("crc32")  # None: of an earlier version
        self._dealt = bool(state.get("dealt", False))
        self._reading: Iterator[tuple[Piece, list[int]]] | None = None

    def _read_piece(self) -> bool:
        """One more piece of a document; False behind the last."""
        if self._reading is None:
            pieces = numbered_pieces(self._texts(), self._tokenizer)
            self._check_before(islice(pieces, self._pieces))
            self._reading = _encoded((one for one in pieces if self._is_own(one.number)), self._tokenizer)
        # some may have been tokenized before the pieces were dealt
        found = next((one for one in self._reading if self._is_own(one[0].number)), None)
        if found is None:
            return False
        piece, ids = found
        if (piece.begins or self._dealt) and (self._ids or self._frame.start is None):
            self._ids.append(self._frame.between)
        self._ids += ids
        self._pieces, self._crc32 = piece.number + 1, piece.crc32
        return True

    def _check_before(self, pieces: Iterable[Piece]) -> None:
        """ValueError unless these are the pieces that were read before."""
        number, crc32 = 0, 0
        for piece in pieces:
            number, crc32 = piece.number + 1, piece.crc32
        if (number, crc32) != (self._pieces, crc32 if self._crc32 is None else self._crc32):
            raise ValueError(
                "texts: are not those that were read before, in their first "
                f"{self._pieces} pieces; a training goes on with the same alone"
            )

    def _is_own(self, number: int) -> bool:
        """Whether a piece of the documents is read."""
        return not self._dealt or number % self._of == self._which


@dataclass(frozen=True)
class _Frame:
    """Ids that stand between documents, and at the start and the end of each row (None: nothing does)."""

    between: int
    start: int | None = None
    end: int | None = None


def _frame(tokenizer: Any) -> _Frame:
    bos, cls, sep = (getattr(tokenizer, f"{role}_token_id", None) for role in ("bos", "cls", "sep"))
    ids = tokenizer(["a"])["input_ids"][0]
    # cls and sep first: RoBERTa's are its bos and eos too
    if cls is not None and sep is not None and (ids[:1], ids[-1:]) == ([cls], [sep]):
        return _Frame(sep, start=cls, end=sep)
    if bos is not None and ids[:1] == [bos]:
        return _Frame(bos, start=bos)
    # SmolLM2's bos and eos are chat marks: <|endoftext|> is what its pretraining put between documents
    for separator in (tokenizer.get_vocab().get(END_OF_TEXT), tokenizer.eos_token_id):
        if separator is not None:
            return _Frame(separator)
    raise ValueError(
        f"the tokenizer has no bos token of its own, no cls and sep around a text, no {END_OF_TEXT} and no eos token"
    )


def _encoded(pieces: Iterable[Piece], tokenizer: Any) -> Iterator[tuple[Piece, list[int]]]:
    """Each with its ids."""
    some: list[Piece] = []
    characters = 0
    for piece in pieces:
        some.append(piece)
        characters += len(piece.text)
        if len(some) == _BATCH or characters >= _BATCH_CHARACTERS:
            yield from _ids(some, tokenizer)
            some, characters = [], 0
    if some:
        yield from _ids(some, tokenizer)


def _ids(some: list[Piece], tokenizer: Any) -> Iterator[tuple[Piece, list[int]]]:
    # verbose=False: long documents are cut here, no need to warn about the model's own limit
    ids = tokenizer([piece.text for piece in some], add_special_tokens=False, verbose=False)["input_ids"]
    yield from zip(some, ids)
