"""What faster settings cost in quality: RowAdam's modes, the aux loss, how often columns are scored; rounded operands.

Every row is trained on the same tokens of real activations with three seeds of initial weights, calibrated to
L0 = k and evaluated on held-out text. One setting at a time differs from the first row. The SAEs of a seed take their
steps in turn, so that times compare: they are those of all steps, in units of the first row's. `--what precision`: with
bfloat16 operands, the default on a GPU, and without, by two rules. On a CPU the rounding is emulated
(`rounded_products.py`).

    sampled-sae harvest runs/quality/activations --layer 15 --texts wiki-en --tokens 250000
    python -m benchmarks.quality runs/quality/activations runs/quality/runs --out benchmarks/results/quality.json
    python -m benchmarks.quality runs/quality/activations runs/quality/precision --what precision --features 4096 \\
        --steps 120 --batch-size 512 --dead-after 25000 --model none --out benchmarks/results/precision.json
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.measure import over_seeds
from benchmarks.record import OF_SEEDS, Record, Result, markdown, parser
from benchmarks.rounded_products import RoundedProducts
from sampled_sae import SampledSAEConfig
from sampled_sae.lm import SpliceEvaluator, load_model
from sampled_sae.support.atomic_files import read_json, write_json
from sampled_sae.training.activation_store import ActivationStore
from sampled_sae.training.feed import Feed, TrainingBatch
from sampled_sae.training.sweep import Splice, evaluate, merged
from sampled_sae.training.train_config import TrainConfig
from sampled_sae.training.training_loop import train_to_end
from sampled_sae.training.training_run import TrainingRun

K, L = 32, 4.0
SEEDS = (0, 1, 2)


class RoundedRun(TrainingRun):
    """A run whose products take their operands as bfloat16 ones."""

    def train_on(self, batch: TrainingBatch) -> dict[str, float] | None:
        with RoundedProducts():
            return super().train_on(batch)


# what differs from the first row in the SAE, and in its training
Settings = dict[str, tuple[dict[str, Any], dict[str, Any]]]
FASTER: Settings = {
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
# a screen multiplies in bfloat16 by itself
RULES = {"l=4": {"l": L, "screen": "off"}, "l=None (BatchTopK)": {"l": None, "screen": "off"}}
PRECISION: Settings = {f"{name}, {how}": (rule, {}) for name, rule in RULES.items() for how in ("fp32", "bf16")}
WHAT = {"faster": FASTER, "precision": PRECISION}
COLUMNS = {
    "faster": {
        "setting": "{setting}",
        "FVU": OF_SEEDS.format("fvu", ".3f"),
        "loss recovered": OF_SEEDS.format("loss_recovered_zero", ".3f"),
        "never active": OF_SEEDS.format("dead_share", ".3f"),
        "time of the steps": OF_SEEDS.format("time", ".2f"),
    },
    "precision": {
        "rule, operands": "{setting}",
        "FVU": OF_SEEDS.format("fvu", ".4f"),
        "FVU beside fp32's, seed by seed": "{beside[0]:+.2%} ({beside[1]:+.2%} to {beside[2]:+.2%})",
        "never active": OF_SEEDS.format("dead_share", ".3f"),
    },
}
MEASURES = ("fvu", "loss_recovered_zero", "dead_share", "time")


def markdown_table(result: Result) -> str:
    return markdown(COLUMNS[result["what"]], result["rows"])


def splice_of(name: str, store: ActivationStore, rows: int) -> Splice:
    """Loss recovered on so many rows of the store's held-out text, by the model of this name."""
    held_out = store.holdout_rows()[:rows]
    return SpliceEvaluator.of_harvest(load_model(name)[0], held_out, store.manifest).evaluate


def train_seed(
    store: ActivationStore, args: Namespace, train: TrainConfig, seed: int, splice: Splice | None
) -> dict[str, dict[str, Any]]:
    """The results of one seed by setting; read from the folder where they are there already."""
    folder = args.folder / f"seed{seed}"
    done = folder / "results.json"
    if done.exists():
        return read_json(done)
    how = {"k": K, "l": L, "dead_after": args.dead_after, "row_grads": True, "seed": seed}
    base = SampledSAEConfig(d_in=store.d_in, d_sae=args.features, **how)
    feed = Feed(store, train.batch_size, train.seed)
    runs = {}
    for i, (name, (in_sae, in_train)) in enumerate(WHAT[args.what].items()):
        kind = RoundedRun if name.endswith("bf16") else TrainingRun
        runs[name] = kind(replace(base, **in_sae), replace(train, **in_train), feed, folder / str(i))
    train_to_end(runs, progress=False)
    held_out = store.holdout()[0]
    first = next(iter(runs.values())).seconds
    found = {}
    for name, run in runs.items():
        result = merged(evaluate(run.sae, held_out, train.batch_size, splice), {"time": run.seconds / first})
        found[name] = {measure: result.get(measure) for measure in (*MEASURES, "l0")}
        print(f"seed {seed}, {name}: {found[name]}", flush=True)
    write_json(done, found)
    return found


def main() -> None:
    small = {"steps": 200, "batch_size": 1024, "lr": 3e-3, "dead_after": 50_000, "splice_rows": 16}
    command = parser(__doc__, "--out", model="smollm2-135m", features=16384, **small)
    command.add_argument("activations", type=Path)
    command.add_argument("folder", type=Path, help="of the trained SAEs")
    command.add_argument("--what", choices=list(WHAT), default="faster", help="settings that are compared")
    args = command.parse_args()
    store = ActivationStore.open(args.activations)
    splice = None if args.model == "none" else splice_of(args.model, store, args.splice_rows)
    train = TrainConfig(steps=args.steps, batch_size=args.batch_size, lr=args.lr)
    about = {"what": args.what, "model": args.model, "layer": store.manifest.get("layer"), "features": args.features}
    setup = {"k": K, "l": L, "splice_rows": args.splice_rows, "dead_after": args.dead_after, "seeds": SEEDS}
    record = Record(args, markdown_table, **about, **setup, train=asdict(train))
    by_seed = [train_seed(store, args, train, seed, splice) for seed in SEEDS]
    for name in WHAT[args.what]:
        row = {"setting": name, **{m: over_seeds(found[name][m] for found in by_seed) for m in MEASURES}}
        exact = name.replace("bf16", "fp32")
        row["beside"] = over_seeds(found[name]["fvu"] / found[exact]["fvu"] - 1 for found in by_seed)
        record.add(row)


if __name__ == "__main__":
    main()
