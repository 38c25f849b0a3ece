"""FVU and loss recovered against training time: ours and the peers, each with the same seconds of training steps.

Every candidate trains in a process of its own, in slices of a few seconds that go round, on the same real activations
in the same order from the same weights. Only the time inside its steps counts. All train with Adam at the same
learning rate after the same short warm-up, but for sparsify's own optimizer, which has its own; dead features are
those not used for --dead-after tokens, where a library has an aux loss. At each mark the weights go into one
SampledSAE, are calibrated to L0 = k by a threshold, and are evaluated on held-out text: the same for all.

    sampled-sae harvest runs/quality/activations --layer 15 --texts wiki-en --tokens 250000
    python benchmarks/equal_time.py runs/quality/activations --out benchmarks/results/equal_time.json
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from safetensors.torch import load_file

from benchmarks.family import CALIBRATION_TOKENS, judged, trained
from benchmarks.measure import Row
from benchmarks.peers import Setup
from benchmarks.quality import splice_of
from benchmarks.record import Record, Result, markdown, parser
from benchmarks.training_kinds import SAES, Task, plain_sae
from sampled_sae.training.activation_store import ActivationStore
from sampled_sae.training.feed import Feed

LEFT_OUT = ("ours, l=1", "ours, l=16", "eager PyTorch BatchTopK")  # unless asked for


def markdown_table(result: Result) -> str:
    """FVU and loss recovered at each mark, a line a candidate, with its steps at the last."""
    lines: dict[str, Row] = {}
    marks = result["marks"]
    for row in result["rows"]:
        at = marks.index(row["seconds"]) if "seconds" in row else "none"
        named = {f"{name} {at}": value for name, value in row.items() if name != "reason"}
        lines[row["candidate"]] = {**lines.get(row["candidate"], {}), **row, **named}
    columns = {"candidate": "{candidate}", "steps": f"{{steps {len(marks) - 1}}}"}
    for name, heading in (("fvu", "FVU"), ("loss_recovered", "loss recovered")):
        columns |= {f"{heading}, {mark:g} s": f"{{{name} {i}:.3f}}" for i, mark in enumerate(marks)}
    return markdown(columns, lines.values())


def main() -> None:
    small = {"features": 16384, "k": 32, "batch_size": 1024, "lr": 3e-3, "warm_up": 10, "dead_after": 50_000}
    command = parser(__doc__, "--out", "--device", model="smollm2-135m", splice_rows=16, **small)
    command.set_defaults(device="cpu")
    command.add_argument("activations", type=Path, help="folder that `sampled-sae harvest` wrote")
    command.add_argument("--marks", type=float, nargs="+", default=[15, 30, 60, 90], help="seconds of training steps")
    command.add_argument("--candidates", nargs="+", choices=list(SAES))
    args = command.parse_args()
    store = ActivationStore.open(args.activations)
    about = {"lr": args.lr, "warm_up": args.warm_up, "dead_after": args.dead_after, "device": args.device}
    about["dtype"] = "float32" if args.device == "cpu" else "bfloat16"
    setup = Setup(args.batch_size, store.d_in, args.features, args.k, **about)
    marks = sorted(args.marks)
    names = args.candidates or [name for name in SAES if name not in LEFT_OUT]
    # made first: what is missing is better known before half an hour of training
    splice = None if args.model == "none" else splice_of(args.model, store, args.splice_rows)
    source = {name: store.manifest.get(name) for name in ("model", "layer", "source")}
    record = Record(args, markdown_table, activations=source, setup=asdict(setup), marks=marks)
    calibration = Feed(store, args.batch_size, seed=0).calibration()[:CALIBRATION_TOKENS]
    mark_of = {f"{mark:g} s": mark for mark in marks}
    with tempfile.TemporaryDirectory() as folder:
        task = Task("sae", args.activations, setup, 0, tuple(marks), Path(folder), args.threads, tuple(names))
        for row in trained(task):
            if "weights" in row:
                sae = plain_sae(load_file(task.folder / row["weights"]), setup, store)
                row = judged(row, sae, calibration, store.holdout()[0], splice) | {"seconds": mark_of[row["at"]]}
            record.add(row)


if __name__ == "__main__":
    main()
