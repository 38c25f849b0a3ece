"""SAEs as the field publishes them, from a folder or the Hugging Face hub, read as an `InferenceSAE`.

    sae = load_inference("google/gemma-scope-2b-pt-res", at="layer_12/width_16k/average_l0_82")
    codes = sae.encode_sparse(x)

Layouts: SAELens, Gemma Scope and Gemma Scope 2, sparsify, dictionary_learning, Qwen-Scope, and this package's own.
None of these libraries need be installed.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from ... import pretrained
from ...inference.inference_sae import InferenceSAE
from ...support import hub
from ...support.argument_checks import FLOATS, check_choice, check_device, check_integer
from ..origin import Origin
from ..portable import Say
from . import dictionary_learning, gemma_scope, ours, qwen_scope, saelens, sparsify
from .reading import Place, Reading, in_one_line

__all__ = ["LAYOUTS", "WRITTEN", "Published", "Reading", "detect", "load_inference", "read_inference", "save_inference"]


class Reader(NamedTuple):
    """files: names that a folder of this layout has."""

    files: tuple[str, ...]
    read: Callable[[Place, Say], Reading]


LAYOUTS = MappingProxyType(
    {
        saelens.NAME: Reader(saelens.FILES, saelens.read),
        dictionary_learning.NAME: Reader(dictionary_learning.FILES, dictionary_learning.read),
        sparsify.NAME: Reader(sparsify.FILES, sparsify.read),
        gemma_scope.NAME: Reader(gemma_scope.FILES, gemma_scope.read),
        gemma_scope.SECOND: Reader(gemma_scope.FILES_OF_SECOND, gemma_scope.read_second),
        ours.NAME: Reader((pretrained.CONFIG, pretrained.WEIGHTS), ours.read),
        qwen_scope.NAME: Reader((), qwen_scope.read),
    }
)
WRITTEN = (saelens.NAME, sparsify.NAME, gemma_scope.NAME)
# folders that an error lists, and those that it looks through for them
SHOWN, LOOKED_THROUGH = 5, 1000
# fetched from a hub where they are there
FETCHED = sorted({name for layout in LAYOUTS.values() for name in layout.files} | {pretrained.RUN, pretrained.ORIGIN})


class Published(NamedTuple):
    """What was read.

    Attributes:
        sae: as `load_inference` gives it.
        origin: model, layer and hook of the activations, as far as they are known.
        layout: one of `LAYOUTS`. architecture: in the layout's own word.
        line: architecture, sizes, model, layer and scale in one line.
    """

    sae: InferenceSAE
    origin: Origin
    layout: str
    architecture: str
    line: str


def load_inference(
    source: str | os.PathLike[str],
    at: str | os.PathLike[str] | None = None,
    *,
    layout: str | None = None,
    k: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    impl: str = "auto",
    screen: str = "auto",
    revision: str | None = None,
    say: Say = print,
) -> InferenceSAE:
    """An SAE or a transcoder that somebody has published, for use.

    Args:
        source: a folder, a file of Qwen-Scope's, or a repository `owner/name` of the Hugging Face hub (extra "hub").
        at: folder or file inside it, as "layer_12/width_16k/average_l0_82".
        layout: one of `LAYOUTS`; found by the files when absent.
        k: features a token, for a layout that does not say it: Qwen-Scope's, outside a repository of its name.
        device, dtype: of the weights; where they are, and as they are stored, by default.
        impl, screen: as in `InferenceConfig`.
        revision: branch, tag or commit of the repository.
        say: called with one line that says what was read, and with one for each convention that was changed.

    Raises:
        ValueError: nothing there, a foreign, truncated or damaged file, an architecture that has no place here; each
            names the file and what is wrong with it. Nothing is ever unpickled but tensors.
        ImportError: a repository without huggingface_hub.
    """
    options: dict[str, Any] = {"layout": layout, "k": k, "device": device, "dtype": dtype, "impl": impl}
    return read_inference(source, at, **options, screen=screen, revision=revision, say=say).sae


def read_inference(
    source: str | os.PathLike[str],
    at: str | os.PathLike[str] | None = None,
    *,
    layout: str | None = None,
    k: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    impl: str = "auto",
    screen: str = "auto",
    revision: str | None = None,
    say: Say = print,
) -> Published:
    """`load_inference`, with what else the files say."""
    k = None if k is None else check_integer("k", k, 1)
    if dtype is not None and dtype not in FLOATS:
        raise TypeError(f"dtype={dtype!r}: must be one of {', '.join(map(str, FLOATS))}")
    device = None if device is None else check_device(device)
    place = _place(_as_text("source", source), None if at is None else _as_text("at", at).strip("/"), k, revision)
    if layout is None:
        layout = detect(place.path)
        if layout is None:
            raise ValueError(f"{place.path}: {_none_there(place.path)}")
    check_choice("layout", layout, tuple(LAYOUTS))
    if k is not None and layout != qwen_scope.NAME:
        raise ValueError(f"k={k}: is for {qwen_scope.NAME} alone; files in the layout {layout!r} have the rule in them")
    reading = LAYOUTS[layout].read(place, say).in_one_dtype(dtype, say)
    config = replace(reading.config, impl=impl, screen=screen)
    tensors = {name: t.to(device) for name, t in reading.tensors.items()} if device is not None else reading.tensors
    try:
        sae = InferenceSAE(config, tensors)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{place.path}: {error}") from None
    line = in_one_line(layout, reading, place)
    say(line)
    return Published(sae, reading.origin, layout, reading.architecture, line)


def save_inference(
    sae: InferenceSAE, folder: str | os.PathLike[str], *, to: str, origin: Origin | None = None
) -> list[Path]:
    """Writes an SAE in a layout that can hold it; returns the files.

    Args:
        sae: its weights are not changed.
        folder: made if need be; files of the same layout are replaced.
        to: "saelens", "sparsify" or "gemma_scope".
        origin: model, layer and hook, recorded where the layout has a place for them.

    Raises:
        ValueError: what that layout has no place for, by name; a folder that holds an SAE of another. Nothing is
            written then.
    """
    check_choice("to", to, WRITTEN)
    path = Path(folder)
    held = detect(path)
    if held not in (None, to):
        raise ValueError(f"{path}: holds an SAE in the layout {held!r}; save to another folder")
    tensors = {name: t.detach().cpu() for name, t in sae.named_buffers()}
    reading = Reading("", sae.cfg, tensors, origin or Origin())
    if to == gemma_scope.NAME:
        gemma_scope.write(path, gemma_scope.pack(reading))
    else:
        peer = {saelens.NAME: saelens, sparsify.NAME: sparsify}[to]
        peer.write(path, *peer.pack(reading))
    return [path / name for name in LAYOUTS[to].files]


def detect(path: Path) -> str | None:
    """The layout of the files at a path: one of `LAYOUTS`, or None for no SAE.

    Raises:
        ValueError: files of several layouts.
    """
    found = [
        name
        for name, layout in LAYOUTS.items()
        if layout.files and all((path / file).is_file() for file in layout.files)
    ]
    if ours.NAME in found and not pretrained.is_ours(path):
        found.remove(ours.NAME)  # other libraries have files of the same names
    if qwen_scope.find(path):
        found.append(qwen_scope.NAME)
    if len(found) > 1:
        raise ValueError(f"{path}: holds files of several layouts: {', '.join(found)}; name one with layout=")
    return found[0] if found else None


def _place(source: str, at: str | None, k: int | None, revision: str | None) -> Place:
    name = source if at is None else f"{source.rstrip('/')}/{at}"
    here = Path(source)
    if not here.exists():
        if not hub.is_identifier(source):
            raise ValueError(f"{source}: no such folder, and no repository of the form owner/name")
        here = hub.download(source, at, FETCHED, revision)
    path = here if at is None else here / at
    if not path.exists():
        raise ValueError(f"{name}: no such folder or file")
    return Place(path, name, k)


def _as_text(name: str, path: Any) -> str:
    try:
        text = os.fspath(path)
    except TypeError:
        text = None
    if not isinstance(text, str):
        raise TypeError(f"{name}={path!r}: must be a str or a path")
    if not text:
        raise ValueError(f"{name}={path!r}: must name something")
    return text


def _none_there(path: Path) -> str:
    """Why a path holds no SAE that can be read: what is below it, or what would have to be there."""
    if path.is_file():
        return f"is a file; name the folder that holds it, but for layer<n>.sae.pt ({qwen_scope.NAME})"
    below = _folders_below(path)
    if below:
        more = ", ..." if len(below) > SHOWN else ""
        return f"holds SAEs in {', '.join(below[:SHOWN])}{more}: name one with at="
    files = "; ".join(f"{' and '.join(layout.files)} ({name})" for name, layout in LAYOUTS.items() if layout.files)
    wanted = f"must hold {files}; or layer<n>.sae.pt ({qwen_scope.NAME})"
    return f"no SAE in a known layout; {wanted}. In a folder of many SAEs name one with at="


def _folders_below(path: Path) -> list[str]:
    """The folders below that hold SAEs, as `at` names them, as far as they are soon found."""
    found = []
    for folder, folders, _ in islice(os.walk(path), LOOKED_THROUGH):
        folders.sort()
        try:
            held = detect(Path(folder)) is not None
        except ValueError:  # of several layouts, or damaged
            held = True
        if held:
            found.append(Path(folder).relative_to(path).as_posix())
    return found
