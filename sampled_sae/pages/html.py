"""One HTML file of a template, styles, scripts and data; nothing in the data can become markup or run.

Every value reaches the page as JSON, in which `<`, `>` and `&` are written as escapes, or as base64; the scripts put
texts into the page as text alone. The page's own policy lets nothing load, and no script run but its own.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import json
from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..support.atomic_files import without_nan

# the file of a page, in the folder of what it is about
PAGE = "look.html"
LITTLE = {torch.float32: "<f4", torch.int32: "<i4"}
MARK = '<meta name="generator" content="sampled-sae">'
POLICY = "default-src 'none'; script-src '{script}'; style-src '{style}'; base-uri 'none'; form-action 'none'"


def page(title: str, body: str, scripts: Sequence[str], data: Any, parts: Iterable[Any] = ()) -> str:
    """The text of a page.

    Args:
        title: of the window.
        body: name of the asset with what stands in <body>.
        scripts: names of the assets that make up its one script.
        data: JSON that the script reads at once.
        parts: JSON that it reads when asked for, each compressed on its own.
    """
    style, script = asset("page.css"), "\n".join(map(asset, scripts))
    policy = POLICY.format(script=_digest(script), style=_digest(style))
    kept = "\n".join(
        f'<script type="application/octet-stream" class="part">{_compressed(one)}</script>' for one in parts
    )
    # what is seen first comes first: a browser draws before it has read the parts
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
{MARK}
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<title>{html.escape(title.encode("utf-8", "replace").decode())}</title>
<style>{style}</style>
</head>
<body>
{asset(body)}{asset("help.html")}<script type="application/json" id="data">{in_html(data)}</script>
<script>{script}</script>
{kept}
</body>
</html>
"""


def is_page(path: Path) -> bool:
    """Whether a file is a page that `page` made."""
    with open(path, "rb") as file:
        return MARK.encode() in file.read(1024)


def asset(name: str) -> str:
    """A file of this room's `assets`."""
    return files(__package__).joinpath("assets", name).read_text(encoding="utf-8")


def in_html(value: Any) -> str:
    """Strict JSON that no HTML parser can read as markup; NaN and inf become null, lone surrogates stay escapes."""
    text = json.dumps(without_nan(value), allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def short(value: float) -> float:
    """With four significant digits."""
    return float(f"{value:.4g}")


def packed(column: Tensor) -> str:
    """float32 or int32 values of any shape as base64 of their little-endian bytes."""
    return base64.b64encode(column.contiguous().numpy().astype(LITTLE[column.dtype]).tobytes()).decode()


def _compressed(value: Any) -> str:
    text = json.dumps(without_nan(value), allow_nan=False, separators=(",", ":"))
    # without a time in it, the same page is the same bytes
    return base64.b64encode(gzip.compress(text.encode(), 6, mtime=0)).decode()


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
