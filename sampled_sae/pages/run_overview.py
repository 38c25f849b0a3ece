"""What a page says of an SAE before its features: where it is from, its settings, how it trained, its metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..formats.published import Published
from ..pretrained import CONFIG, EVALUATION, RUN
from ..support.atomic_files import field, read_json
from ..training.sweep import RESULT
from ..training.sweep_table import read_metrics, read_result
from ..training.training_run import METRICS

# points of a curve; a chart is no wider
POINTS = 400
CURVES = ("loss", "fvu", "l0", "dead_share")


def run_overview(source: str, at: str | None, found: Published, corpus: dict[str, Any]) -> dict[str, Any]:
    """What the files of a run say, those that are there.

    Args:
        source, at: as the SAE was asked for; of a folder the page has the last two names, not where a user keeps it.
        found: the SAE as it was read.
        corpus: the manifest of the activations, or the codes, that are looked at.

    Raises:
        ValueError: a damaged file, naming it.
    """
    name = full_name(source, at)
    folder = Path(name)
    run = read_json(folder / RUN) if (folder / RUN).is_file() else {}
    own = read_json(folder / CONFIG).get("sae") if found.layout == "sampled-sae" else None
    return {
        "name": shown_name(name),
        "line": found.line.removeprefix(f"{name}: "),
        "corpus": {key: corpus[key] for key in ("model", "layer", "source", "context") if corpus.get(key) is not None},
        "settings": {
            "SAE": own or found.sae.cfg.to_dict(),
            "training": field(folder / RUN, run, "train", dict) if run else {},
        },
        "evaluation": evaluation(folder),
        "curves": curves(folder),
    }


def full_name(source: str, at: str | None) -> str:
    """Of an SAE, as it was asked for."""
    return source if at is None else f"{source.rstrip('/')}/{at}"


def shown_name(name: str) -> str:
    """On a page: of a folder its last two names, not where a user keeps it."""
    return "/".join(Path(name).resolve().parts[-2:]) if Path(name).exists() else name


def evaluation(folder: Path) -> dict[str, Any]:
    """The scalars that `evaluate` or a sweep measured on held-out activations; empty where none did."""
    for path in (folder / EVALUATION, folder / RESULT):
        if path.is_file():
            return {key: value for key, value in read_result(path).items() if isinstance(value, (int, float))}
    return {}


def curves(folder: Path) -> dict[str, list[float | None]]:
    """Tokens and metrics of a training, at most `POINTS` of them at even distances, the last one among them."""
    lines = read_metrics(folder) if (folder / METRICS).is_file() else []
    step = -(-len(lines) // POINTS) or 1
    kept = lines[::-1][::step][::-1]
    return {name: [line.get(name) for line in kept] for name in ("tokens", *CURVES)} if kept else {}
