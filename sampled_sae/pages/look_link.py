"""`LookLink`: the page of an SAE, as another page links to it and says its features' tokens."""

from __future__ import annotations

import base64
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import torch
from torch import Tensor

from .html import is_page, packed

DATA = re.compile(r'<script type="application/json" id="data">(.*?)</script>', re.DOTALL)


@dataclass(frozen=True)
class LookLink:
    """A page that `look` wrote of an SAE.

    Attributes:
        href: its address, relative to the page that links to it.
        d_sae: features of its SAE.
        words: texts of tokens.
        keys: int32 [F, n], the words on which each feature is most active, -1 where there are no more; None where the
            page has no texts.
    """

    href: str
    d_sae: int
    words: tuple[str, ...]
    keys: Tensor | None

    @classmethod
    def read(cls, path: Path, folder: Path) -> LookLink:
        """Of a page, for one that will stand in `folder`.

        Raises:
            ValueError: no page of an SAE.
            OSError: a file that cannot be read.
        """
        found = DATA.search(path.read_text(encoding="utf-8", errors="replace")) if is_page(path) else None
        try:
            data = json.loads(found[1]) if found else {}
            columns = data["columns"]
            d_sae = len(_numbers(columns["counts"]))
            words = list(map(str, data["words"]))
            own = None if columns["keys"] is None else _numbers(columns["keys"]).reshape(d_sae, data["keys"])
            if own is not None and own.size and not -1 <= own.min() <= own.max() < len(words):
                raise ValueError("a word that is not there")
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: is no page of an SAE that look wrote") from error
        if own is None:
            return cls(_href(path, folder), d_sae, (), None)
        used, places = np.unique(own, return_inverse=True)
        # -1 comes first where it is there at all
        none = int(bool(len(used)) and used[0] < 0)
        renumbered = torch.from_numpy(places.reshape(own.shape) - none).int()
        return cls(_href(path, folder), d_sae, tuple(words[i] for i in used[none:]), renumbered)

    def of_page(self) -> dict[str, Any]:
        """As the scripts of a page read it."""
        keys, width = (None, 0) if self.keys is None else (packed(self.keys), self.keys.shape[1])
        return {"href": self.href, "words": list(self.words), "keys": keys, "width": width}


def _href(path: Path, folder: Path) -> str:
    """A relative address, so that both pages may move together."""
    try:
        relative = os.path.relpath(path.resolve(), folder.resolve())
    except ValueError:  # another drive of Windows
        return path.resolve().as_uri()
    return "./" + quote(relative.replace(os.sep, "/"))


def _numbers(text: str) -> np.ndarray[Any, np.dtype[np.int32]]:
    return np.frombuffer(base64.b64decode(text, validate=True), "<i4")
