"""A sweep: SAEs over pool multipliers, scores and seeds, trained at equal k, evaluated at equal L0, compared."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from torch import Tensor

from ..config import SampledSAEConfig
from ..sae import SampledSAE
from ..support.argument_checks import check_integer
from ..support.atomic_files import field, read_json, write_json, write_text
from .activation_store import ActivationStore
from .evaluation import evaluate_activations, reconstruct_with
from .sae_group import SAEGroup
from .train_config import TrainConfig
from .training_run import CHECKPOINT, METRICS

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
    """name -> config, all combinations. BatchTopK (l=None) uses no score: one a seed; `topk` adds the TopK SAE."""
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
    together: int = 4,
    device: torch.device | str = "cpu",
) -> list[dict[str, Any]]:
    """Trains and evaluates each config in `folder`/name, then writes the table. What is evaluated is not redone.

    Trains `together` configs at a time as one SAEGroup, on `device`; the results do not depend on how many. All
    see the tokens in the order of `train.seed`; a config's own seed is that of its initial weights alone.

    Writes `results.csv`, `results.md` and `sweep.json`, and in each run's folder the trainer's files and
    `evaluation.json`. A run's checkpoint is removed once the run is evaluated.

    Args:
        configs: name -> config.
        store: with a held-out part.
        splice: measures a reconstruction in the language model, such as `SpliceEvaluator.evaluate`.
        progress, say: whether to show a progress bar; what to call with each line of news.

    Returns:
        A dict for each config, in their order.

    Raises:
        ValueError: a store without held-out part, results of other settings in `folder`, and what SAEGroup raises.
    """
    check_integer("together", together, 1)
    held_out, _ = store.holdout()
    common = {"train": asdict(train), "spliced": splice is not None, "data": store.manifest["shards"]}
    settings = {name: {"sae": config.to_dict(), **common} for name, config in configs.items()}
    place = {name: f"[{i}/{len(configs)}] {name}" for i, name in enumerate(configs, 1)}
    results: dict[str, dict[str, Any]] = {}
    for name in configs:
        done = folder / name / EVALUATION
        if done.exists():
            results[name] = read_result(done)
            if results[name].get("settings") != settings[name]:
                raise ValueError(f"{done}: made with other settings; use another folder")
            say(f"{place[name]}: already evaluated")

    def train_and_evaluate(names: list[str]) -> None:
        """One group; its memory is free when this returns, before the next is made."""
        for name in names:
            say(f"{place[name]}: training in {folder / name}")
        group = SAEGroup({name: configs[name] for name in names}, train, store, folder, device)
        for name, sae in group.run(progress).items():
            results[name] = evaluate(sae, held_out, train.batch_size, splice)
            results[name] |= {"settings": settings[name], "seconds": round(group.members[name].seconds, 1)}
            write_json(folder / name / EVALUATION, results[name])
            (folder / name / CHECKPOINT).unlink(missing_ok=True)

    waiting = [name for name in configs if name not in results]
    for start in range(0, len(waiting), together):
        train_and_evaluate(waiting[start : start + together])
    rows = [_row(name, config, results[name]) for name, config in configs.items()]
    write_table(rows, folder)
    write_json(folder / "sweep.json", {"rows": rows, "train": asdict(train)})
    return rows


def read_result(path: Path) -> dict[str, Any]:
    """An `evaluation.json`, with the types that tables and plots take."""
    result = read_json(path)
    for column in COLUMNS:
        if column in result:
            field(path, result, column, (float, NoneType))
    for count in field(path, result, "frequency_histogram", list):
        field(path, {"frequency_histogram": count}, "frequency_histogram", int, 0)
    return result


def _row(name: str, config: SampledSAEConfig, result: dict[str, Any]) -> dict[str, Any]:
    score = None if config.l is None else config.score
    measured = {key: value for key, value in result.items() if key != "settings"}
    return {"name": name, "l": config.l, "score": score, "seed": config.seed, **measured}


def evaluate(sae: SampledSAE, held_out: Tensor, batch_size: int, splice: Splice | None) -> dict[str, Any]:
    """The metrics of `evaluate_activations` and, where there is `splice`, those in the language model.

    `tokens` counts the held-out activations, `predicted_tokens` those that the language model predicts.
    """
    result = evaluate_activations(sae, held_out, batch_size)
    if splice is not None:
        with torch.no_grad():
            spliced = splice(reconstruct_with(sae))
        result |= {"predicted_tokens" if name == "tokens" else name: value for name, value in spliced.items()}
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
    """A Markdown table of those `COLUMNS` that at least one row has."""
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
