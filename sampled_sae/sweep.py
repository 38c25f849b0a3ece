"""Trains over pool multipliers, scores and seeds at equal k, evaluates at equal L0, writes the comparison."""

from __future__ import annotations

import csv
import io
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .config import SampledSAEConfig
from .data import ActivationStore
from .evaluate import evaluate_activations, reconstruct_with
from .files import read_json, write_json, write_text
from .sae import SampledSAE
from .train import CHECKPOINT, METRICS, TrainConfig, Trainer

Splice = Callable[[Callable[[Tensor], Tensor]], dict[str, float]]
EVALUATION = "evaluation.json"
COLUMNS = {
    "name": "SAE",
    "l": "l",
    "score": "score",
    "seed": "seed",
    "l0": "L0",
    "batch_l0": "L0 (batch)",
    "fvu": "FVU",
    "explained_variance": "expl. var.",
    "cosine": "cosine",
    "loss_recovered_zero": "loss recovered",
    "ce_spliced": "CE spliced",
    "dead_share": "never active",
    "features_for_90": "features for 90%",
    "jaccard": "Jaccard",
    "seconds": "train s",
}


def variants(
    base: SampledSAEConfig,
    ls: Sequence[float | None],
    scores: Sequence[str],
    seeds: Sequence[int],
    topk: bool,
) -> dict[str, SampledSAEConfig]:
    """name -> config. l=None needs no score, so it is trained once a seed; `topk` adds the TopK SAE."""
    found: dict[str, SampledSAEConfig] = {}
    for seed in seeds:
        suffix = f"_seed{seed}" if len(seeds) > 1 else ""
        for l in ls:
            if l is None:
                found[f"batchtopk{suffix}"] = replace(base, l=None, select="batch", seed=seed)
                continue
            for score in scores:
                found[f"l{l:g}_{score}{suffix}"] = replace(base, l=l, score=score, select="batch", seed=seed)
        if topk:
            found[f"topk{suffix}"] = replace(base, l=None, select="token", seed=seed)
    return found


def run_sweep(
    configs: dict[str, SampledSAEConfig],
    train: TrainConfig,
    store: ActivationStore,
    folder: Path,
    splice: Splice | None = None,
    progress: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """Trains and evaluates each config in `folder`/name, then writes the table; what is done is not redone.

    Writes `results.csv`, `results.md`, `sweep.json`; and in each run's folder the trainer's files and
    `evaluation.json`, which is complete when it exists. A run's checkpoint is removed once it is evaluated.
    """
    held_out, _ = store.holdout()
    rows = []
    for i, (name, config) in enumerate(configs.items()):
        run_folder = folder / name
        settings = {
            "sae": config.to_dict(),
            "train": {**asdict(train), "seed": config.seed},
            "spliced": splice is not None,
            "data": store.manifest["shards"],
        }
        done = run_folder / EVALUATION
        if done.exists():
            result = read_json(done)
            if result.get("settings") != settings:
                raise ValueError(f"{done}: made with other settings; use another folder")
            say(f"[{i + 1}/{len(configs)}] {name}: already evaluated")
        else:
            say(f"[{i + 1}/{len(configs)}] {name}: training in {run_folder}")
            start = time.perf_counter()
            sae = Trainer(config, replace(train, seed=config.seed), store, run_folder).run(progress)
            seconds = time.perf_counter() - start
            result = evaluate(sae, held_out, train.batch_size, splice)
            result |= {"settings": settings, "seconds": round(seconds, 1)}
            write_json(done, result)
            (run_folder / CHECKPOINT).unlink(missing_ok=True)
        rows.append({"name": name, "l": config.l, "score": config.score, "seed": config.seed, **result})
        rows[-1].pop("settings")
        if config.l is None:
            rows[-1]["score"] = None
    write_table(rows, folder)
    write_json(folder / "sweep.json", {"rows": rows, "train": asdict(train)})
    return rows


def evaluate(sae: SampledSAE, held_out: Tensor, batch_size: int, splice: Splice | None) -> dict[str, Any]:
    """Activation metrics and, with a language model at hand, spliced ones."""
    result = evaluate_activations(sae, held_out, batch_size)
    if splice is not None:
        with torch.no_grad():
            result |= splice(reconstruct_with(sae))
    return result


def write_table(rows: list[dict[str, Any]], folder: Path) -> None:
    """results.csv (every scalar) and results.md (the columns a reader compares)."""
    scalars = [k for k in rows[0] if not isinstance(rows[0][k], (list, dict))]
    text = io.StringIO()
    writer = csv.DictWriter(text, scalars, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    write_text(folder / "results.csv", text.getvalue())
    write_text(folder / "results.md", markdown_table(rows))


def markdown_table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table of `COLUMNS`, those that at least one row has."""
    columns = [c for c in COLUMNS if any(row.get(c) is not None for row in rows)]
    if len({row["seed"] for row in rows}) == 1:
        columns.remove("seed")
    lines = [" | ".join(COLUMNS[c] for c in columns), "|".join("---" for _ in columns)]
    lines += [" | ".join(_cell(c, row.get(c)) for c in columns) for row in rows]
    return "".join(f"| {line} |\n" for line in lines)


def _cell(column: str, value: Any) -> str:
    if value is None:
        return "–"
    if column == "dead_share":
        return f"{value:.1%}"
    if column in ("l0", "batch_l0"):
        return f"{value:.1f}"
    if isinstance(value, float) and column not in ("l", "seconds"):
        return f"{value:.3f}"
    return f"{value:g}" if isinstance(value, (int, float)) else str(value)


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / METRICS).read_text(encoding="utf-8").splitlines()]
