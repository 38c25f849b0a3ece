"""What the faster forms of a step cost in quality: RowAdam's modes, the aux loss, how often columns are scored.

Every row is trained on the same tokens of real activations with three seeds of initial weights, calibrated to
L0 = k and evaluated on held-out text. One setting at a time differs from the first row. The SAEs of a seed take their
steps in turn, so that times compare: they are those of all steps, in units of the first row's.

    sampled-sae harvest runs/quality/activations --layer 15 --texts wiki-en --tokens 250000
    python benchmarks/quality.py runs/quality/activations runs/quality/runs --out benchmarks/results/quality.json
"""

from __future__ import annotations

import statistics
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.measure import machine, parser, table, write_result
from sampled_sae import SampledSAEConfig
from sampled_sae.lm import SpliceEvaluator, load_model
from sampled_sae.support.atomic_files import read_json, write_json
from sampled_sae.training.activation_store import ActivationStore
from sampled_sae.training.batches import Feed
from sampled_sae.training.sweep import Splice, evaluate
from sampled_sae.training.train_config import TrainConfig
from sampled_sae.training.training_run import TrainingRun, train_to_end

FEATURES, K, L = 16384, 32, 4.0
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Setting:
    """What differs from the first row in the SAE and in its training."""

    sae: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)


SETTINGS = {
    "dense, aux_pool=1024, pool_every=1": Setting(),
    "lazy": Setting(train={"adam": "lazy"}),
    "decayed": Setting(train={"adam": "decayed"}),
    "bfloat16 moments": Setting(train={"moments": "bfloat16"}),
    "aux off": Setting({"aux_coefficient": 0.0}),
    "aux_pool=None": Setting({"aux_pool": None}),
    "pool_every=4": Setting({"pool_every": 4}),
    "pool_every=16": Setting({"pool_every": 16}),
    "score_tokens=0.25": Setting({"score_tokens": 0.25}),
    "decayed, pool_every=4": Setting({"pool_every": 4}, {"adam": "decayed"}),
}
MEASURES = {
    "fvu": "FVU",
    "loss_recovered_zero": "loss recovered",
    "dead_share": "never active",
    "time": "time of the steps",
}


def train_seed(
    store: ActivationStore, folder: Path, train: TrainConfig, dead_after: int, seed: int, splice: Splice
) -> dict[str, dict[str, Any]]:
    """The results of one seed by setting; read from the folder where they are there already."""
    done = folder / "results.json"
    if done.exists():
        return read_json(done)
    base = SampledSAEConfig(d_in=store.d_in, d_sae=FEATURES, k=K, l=L, dead_after=dead_after, row_grads=True, seed=seed)
    feed = Feed(store, train.batch_size, train.seed)
    runs = {
        name: TrainingRun(replace(base, **setting.sae), replace(train, **setting.train), feed, folder / str(i))
        for i, (name, setting) in enumerate(SETTINGS.items())
    }
    train_to_end(runs, progress=False)
    held_out = store.holdout()[0]
    first = next(iter(runs.values())).seconds
    found = {}
    for name, run in runs.items():
        result = evaluate(run.sae, held_out, train.batch_size, splice) | {"time": run.seconds / first}
        found[name] = {measure: result[measure] for measure in (*MEASURES, "l0")}
        print(f"seed {seed}, {name}: {found[name]}", flush=True)
    write_json(done, found)
    return found


def markdown_table(result: dict[str, Any]) -> str:
    """Means over the seeds with the smallest and largest."""
    lines = []
    for row in result["rows"]:
        cells = [row["setting"]]
        for measure in MEASURES:
            mean, least, most = row[measure]
            digits = 2 if measure == "time" else 3
            cells.append(f"{mean:.{digits}f} ({least:.{digits}f}–{most:.{digits}f})")
        lines.append(cells)
    return table(["setting", *MEASURES.values()], lines)


def main() -> None:
    command = parser(__doc__)
    command.add_argument("activations", type=Path)
    command.add_argument("folder", type=Path, help="of the trained SAEs")
    command.add_argument("--steps", type=int, default=200)
    command.add_argument("--batch-size", type=int, default=1024)
    command.add_argument("--lr", type=float, default=3e-3)
    command.add_argument("--dead-after", type=int, default=50_000)
    command.add_argument("--model", default="smollm2-135m")
    command.add_argument("--splice-rows", type=int, default=16)
    args = command.parse_args()
    torch.set_num_threads(args.threads)
    store = ActivationStore.open(args.activations)
    model, _ = load_model(args.model, None)
    evaluator = SpliceEvaluator(
        model,
        store.holdout()[1][: args.splice_rows],
        store.manifest["layer"],
        scale=store.scale,
        max_norm=store.manifest["max_norm"],
    )
    train = TrainConfig(steps=args.steps, batch_size=args.batch_size, lr=args.lr)
    by_seed = [
        train_seed(store, args.folder / f"seed{seed}", train, args.dead_after, seed, evaluator.evaluate)
        for seed in SEEDS
    ]
    rows = []
    for name in SETTINGS:
        row: dict[str, Any] = {"setting": name}
        for measure in MEASURES:
            values = [found[name][measure] for found in by_seed]
            row[measure] = (statistics.mean(values), min(values), max(values))
        rows.append(row)
    result = {
        **machine(),
        "model": args.model,
        "layer": store.manifest["layer"],
        "features": FEATURES,
        "k": K,
        "l": L,
        "train": asdict(train),
        "splice_rows": args.splice_rows,
        "dead_after": args.dead_after,
        "seeds": SEEDS,
        "rows": rows,
    }
    write_result(args.out, result, markdown_table(result))
    print(markdown_table(result))


if __name__ == "__main__":
    main()
