"""What bfloat16 operands, the default on a GPU, cost in quality: the same trainings with their rounding and without.

On a CPU the rounding is emulated (`rounded_products.py`). Every row is trained on the same tokens of real activations
with three seeds of initial weights, calibrated to L0 = k in float32 and evaluated on held-out activations.

    sampled-sae harvest runs/precision/activations --layer 15 --texts wiki-en --tokens 60000
    python benchmarks/precision.py runs/precision/activations --out benchmarks/results/precision.json
"""

from __future__ import annotations

import sys
import tempfile
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measure import Row, over_seeds
from benchmarks.record import Record, parser, table_of
from benchmarks.rounded_products import RoundedProducts
from sampled_sae import SampledSAEConfig
from sampled_sae.training.activation_store import ActivationStore
from sampled_sae.training.evaluation import evaluate_activations
from sampled_sae.training.feed import Feed
from sampled_sae.training.train_config import TrainConfig
from sampled_sae.training.training_run import TrainingRun

SEEDS = (0, 1, 2)
RULES: dict[str, dict[str, Any]] = {"l=4": {"l": 4.0}, "l=None (BatchTopK)": {"l": None}}
COLUMNS = {
    "rule": "{rule}",
    "operands": "{precision}",
    "FVU": "{fvu[0]:.4f} ({fvu[1]:.4f}–{fvu[2]:.4f})",
    "FVU beside fp32's, seed by seed": "{beside[0]:+.2%} ({beside[1]:+.2%} to {beside[2]:+.2%})",
    "never active": "{dead_share[0]:.3f} ({dead_share[1]:.3f}–{dead_share[2]:.3f})",
}
markdown_table = table_of(COLUMNS)


def trained(config: SampledSAEConfig, train: TrainConfig, store: ActivationStore, precision: str) -> dict[str, float]:
    """FVU and share of features that never fire, of one SAE on held-out activations."""
    feed = Feed(store, train.batch_size, train.seed)
    with tempfile.TemporaryDirectory() as folder:
        run = TrainingRun(config, train, feed, folder)
        run.sae.train()
        with RoundedProducts() if precision == "bf16" else nullcontext():
            for t in range(train.steps):
                run.train_on(feed.batch(t))
        run.finish(feed.calibration())
    found = evaluate_activations(run.sae, store.holdout()[0], train.batch_size)
    return {name: found[name] for name in ("fvu", "dead_share")}


def main() -> None:
    small = {"steps": 120, "batch_size": 512, "features": 4096, "k": 32, "lr": 3e-3, "dead_after": 25_000}
    command = parser(__doc__, "--out", **{**small, "threads": 1})
    command.add_argument("activations", type=Path)
    args = command.parse_args()
    store = ActivationStore.open(args.activations)
    train = TrainConfig(steps=args.steps, batch_size=args.batch_size, lr=args.lr, precision="fp32")
    about = {"model": store.manifest["model"], "layer": store.manifest["layer"], "train": asdict(train), "seeds": SEEDS}
    setup = {name: getattr(args, name) for name in ("features", "k", "dead_after")}
    record = Record(args, markdown_table, **about, **setup)
    # a screen multiplies in bfloat16 by itself
    base = SampledSAEConfig(store.d_in, args.features, args.k, dead_after=args.dead_after, screen="off")
    for rule, options in RULES.items():
        exact: list[float] = []
        for precision in ("fp32", "bf16"):
            found = [trained(replace(base, seed=seed, **options), train, store, precision) for seed in SEEDS]
            fvu = [each["fvu"] for each in found]
            exact = exact or fvu
            row: Row = {"rule": rule, "precision": precision, "fvu": over_seeds(fvu)}
            row["beside"] = over_seeds(own / other - 1 for own, other in zip(fvu, exact))
            record.add(row | {"dead_share": over_seeds(each["dead_share"] for each in found)})


if __name__ == "__main__":
    main()
