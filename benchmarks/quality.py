"""What the faster forms of a step cost in quality: RowAdam's modes, the aux loss, how often columns are scored.

Every row is trained on the same tokens of real activations with three seeds of initial weights, calibrated to
L0 = k and evaluated on held-out text. One setting at a time differs from the first row. The SAEs of a seed take their
steps in turn, so that times compare: they are those of all steps, in units of the first row's.

    sampled-sae harvest runs/quality/activations --layer 15 --texts wiki-en --tokens 250000
    python benchmarks/quality.py runs/quality/activations runs/quality/runs --out benchmarks/results/quality.json
"""

from __future__ import annotations

import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measure import over_seeds
from benchmarks.record import Record, parser, table_of
from sampled_sae import SampledSAEConfig
from sampled_sae.lm import SpliceEvaluator, load_model
from sampled_sae.support.atomic_files import read_json, write_json
from sampled_sae.training.activation_store import ActivationStore
from sampled_sae.training.feed import Feed
from sampled_sae.training.sweep import Splice, evaluate, merged
from sampled_sae.training.train_config import TrainConfig
from sampled_sae.training.training_loop import train_to_end
from sampled_sae.training.training_run import TrainingRun

FEATURES, K, L = 16384, 32, 4.0
SEEDS = (0, 1, 2)


# what differs from the first row in the SAE, and in its training
SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dense, aux_pool=1024, pool_every=1": ({}, {}),
    "lazy": ({}, {"adam": "lazy"}),
    "decayed": ({}, {"adam": "decayed"}),
    "bfloat16 moments": ({}, {"moments": "bfloat16"}),
    "aux off": ({"aux_coefficient": 0.0}, {}),
    "aux_pool=None": ({"aux_pool": None}, {}),
    "pool_every=4": ({"pool_every": 4}, {}),
    "pool_every=16": ({"pool_every": 16}, {}),
    "score_tokens=0.25": ({"score_tokens": 0.25}, {}),
    "decayed, pool_every=4": ({"pool_every": 4}, {"adam": "decayed"}),
}
COLUMNS = {
    "setting": "{setting}",
    "FVU": "{fvu[0]:.3f} ({fvu[1]:.3f}–{fvu[2]:.3f})",
    "loss recovered": "{loss_recovered_zero[0]:.3f} ({loss_recovered_zero[1]:.3f}–{loss_recovered_zero[2]:.3f})",
    "never active": "{dead_share[0]:.3f} ({dead_share[1]:.3f}–{dead_share[2]:.3f})",
    "time of the steps": "{time[0]:.2f} ({time[1]:.2f}–{time[2]:.2f})",
}
markdown_table = table_of(COLUMNS)
MEASURES = ("fvu", "loss_recovered_zero", "dead_share", "time")


def splice_of(name: str, store: ActivationStore, rows: int) -> Splice:
    """Loss recovered on so many rows of the store's held-out text, by the model of this name."""
    held_out = store.holdout_rows()[:rows]
    return SpliceEvaluator.of_harvest(load_model(name)[0], held_out, store.manifest).evaluate


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
        name: TrainingRun(replace(base, **in_sae), replace(train, **in_train), feed, folder / str(i))
        for i, (name, (in_sae, in_train)) in enumerate(SETTINGS.items())
    }
    train_to_end(runs, progress=False)
    held_out = store.holdout()[0]
    first = next(iter(runs.values())).seconds
    found = {}
    for name, run in runs.items():
        result = merged(evaluate(run.sae, held_out, train.batch_size, splice), {"time": run.seconds / first})
        found[name] = {measure: result[measure] for measure in (*MEASURES, "l0")}
        print(f"seed {seed}, {name}: {found[name]}", flush=True)
    write_json(done, found)
    return found


def main() -> None:
    small = {"steps": 200, "batch_size": 1024, "lr": 3e-3, "dead_after": 50_000, "splice_rows": 16}
    command = parser(__doc__, "--out", model="smollm2-135m", **small)
    command.add_argument("activations", type=Path)
    command.add_argument("folder", type=Path, help="of the trained SAEs")
    args = command.parse_args()
    store = ActivationStore.open(args.activations)
    splice = splice_of(args.model, store, args.splice_rows)
    train = TrainConfig(steps=args.steps, batch_size=args.batch_size, lr=args.lr)
    by_seed = [train_seed(store, args.folder / f"seed{s}", train, args.dead_after, s, splice) for s in SEEDS]
    rows = [
        {"setting": name, **{m: over_seeds(found[name][m] for found in by_seed) for m in MEASURES}} for name in SETTINGS
    ]
    about = {"model": args.model, "layer": store.manifest["layer"], "features": FEATURES, "k": K, "l": L}
    setup = {"train": asdict(train), "splice_rows": args.splice_rows, "dead_after": args.dead_after, "seeds": SEEDS}
    Record(args, markdown_table, **about, **setup).add(*rows)


if __name__ == "__main__":
    main()
