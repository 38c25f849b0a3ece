"""Tables as notebooks show them; every string is escaped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import MISSING, Field, fields, replace
from html import escape
from typing import Any


def html_table(title: str, rows: Iterable[Sequence[Any]], heads: Sequence[str] = ()) -> str:
    """A `<table>` with a caption, its cells as text.

    Args:
        title: the caption.
        rows: their cells; floats are shown with five significant digits.
        heads: names of the columns; none when empty.
    """
    head = f"<thead><tr>{''.join(f'<th>{escape(name)}</th>' for name in heads)}</tr></thead>" if heads else ""
    body = "".join(f"<tr>{''.join(f'<td>{escape(_text(cell))}</td>' for cell in row)}</tr>" for row in rows)
    caption = f'<caption style="text-align: left; white-space: nowrap">{escape(title)}</caption>'
    return f'<table style="text-align: left">{caption}{head}<tbody>{body}</tbody></table>'


def config_table(config: Any) -> str:
    """The fields of a dataclass and their values; a star marks what is not the default."""
    rows = [(f.name, repr(getattr(config, f.name)), "*" if _is_given(config, f) else "") for f in fields(config)]
    return html_table(type(config).__name__, rows)


def _is_given(config: Any, f: Field[Any]) -> bool:
    """Whether a field has another value than its default stands for beside the others."""
    value = getattr(config, f.name)
    if f.default is MISSING or value == f.default:
        return False
    try:
        return bool(getattr(replace(config, **{f.name: f.default}), f.name) != value)
    except (TypeError, ValueError):  # with its default the config would be none
        return True


def _text(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)
