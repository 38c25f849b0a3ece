"""Many processes, one SAE: what a step sends, how its time scales here, and what a training by two of them gives.

    sampled-sae harvest runs/scale/activations --layer 15 --texts wiki-en --tokens 50000 --context 128
    python -m benchmarks.scale --activations runs/scale/activations --out benchmarks/results/scale.json

Bytes and collectives are counted on processes of this machine, over gloo; those of a dense gradient are counted in
DistributedDataParallel's own buckets. Times are ratios of samples that stand side by side. What holds for many GPUs
is a model (`benchmarks/scale_model.py`) and no measurement; `--only model` computes it again from what is counted.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks import scale_model
from benchmarks.measure import Row, over_seeds, spread_columns
from benchmarks.quality import splice_of
from benchmarks.record import OF_SEEDS, Record, Result, markdown, parser
from sampled_sae import ActivationStore, RowAdam, SampledSAE, SampledSAEConfig, TrainConfig, Trainer
from sampled_sae.distributed import parallelize
from sampled_sae.support.all_ranks import DIMENSIONS
from sampled_sae.training.sweep import evaluate

LAYOUTS = ((2, 1), (4, 1), (1, 2), (1, 4), (2, 2))
# layout, and whether each process has as many tokens as the one alone
SCALINGS = (((2, 1), True), ((2, 1), False), ((1, 2), False))
COUNTED = {
    "F": "{F}",
    "d": "{d}",
    "data x feature": "{layout}",
    "screen": "{screen}",
    "collectives": "{calls}",
    "bytes": "{bytes}",
    "of them column statistics": "{statistics}",
    "rows of gradients": "{gradients}",
    "dense gradients by DDP": "{dense}",
    "parameters, gradients, moments of a rank": "{share:.3f}",
}
TIMED = {
    "processes": "{processes}",
    "layout": "{layout}",
    "scaling": "{scaling}",
    "screen": "{screen}",
    "(B, d, F, k)": "({B}, {d}, {F}, {k})",
    "time of one / time of these": "{speed:.2f}",
    "p20–p80": "{speed_p20:.2f}–{speed_p80:.2f}",
}
TRAINED = {
    "processes": "{processes}",
    "layout": "{layout}",
    "FVU": OF_SEEDS.format("fvu", ".4f"),
    "loss recovered": OF_SEEDS.format("loss_recovered_zero", ".4f"),
    "largest difference of FVU at one seed": "{difference:.1e}",
}
MODEL = {
    "F": "{F}",
    "d": "{d}",
    "GPUs": "{gpus}",
    "data x feature": "{data} x {shards}",
    "ms a step": "{ms:.2f}",
    "share that travels": "{travel:.0%}",
    "ms by DDP with dense gradients": "{dense_ms:.2f}",
    "GB a GPU": "{gigabytes:.1f}",
}
PARTS = {"counted": COUNTED, "timed": TIMED, "trained": TRAINED, "model": MODEL}
# of the trainings, each by one process, and by two that spread tokens or features
TWO = {"data": (2, 1), "feature": (1, 2)}
FEATURES, K, SEEDS, SPLICE_ROWS = 4096, 32, (0, 1, 2), 8
TRAIN = TrainConfig(steps=300, batch_size=256, lr=3e-3)


def on_processes(size: int, work: Callable[..., Any], *args: Any) -> Any:
    """What `work(*args)` returns on the first of `size` processes, each of one thread and all in one gloo group."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.scale"])
    answers = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        task = (size, f"file://{folder}/store", answers, work, args)
        torch.multiprocessing.start_processes(_join, task, size, start_method="forkserver")
    return answers.get()


def _join(rank: int, size: int, place: str, answers: Any, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=place, rank=rank, world_size=size)
    found = work(*args)
    if rank == 0:
        answers.put(found)
    dist.barrier()
    dist.destroy_process_group()


def make(
    shape: tuple[int, int] | None, F: int, d: int, k: int, screen: str
) -> tuple[SampledSAE, RowAdam, Callable[[Tensor], None]]:
    """An SAE, over a mesh or of this process alone, its optimizer, and a training step."""
    sae = SampledSAE(SampledSAEConfig(d, F, k, l=4, aux_coefficient=0.0, row_grads=True, screen=screen))
    if shape is not None:
        parallelize(sae, dist.init_device_mesh("cpu", shape, mesh_dim_names=DIMENSIONS))
    optimizer = RowAdam(sae, mode="decayed", moments=torch.bfloat16)

    def step(x: Tensor) -> None:
        sae(x).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return sae, optimizer, step


def count(shape: tuple[int, int], F: int, d: int, k: int, B: int, screen: str) -> Row:
    """Collectives and bytes of a step, and the share of all features that a rank holds in weights and moments."""
    sae, optimizer, step = make(shape, F, d, k, screen)
    for _ in range(2):  # the first one finds thresholds that the next starts from
        traffic = sae.layout.mesh.traffic  # type: ignore[attr-defined]
        traffic.clear()
        step(torch.randn(B // shape[0], d))
    moments = [state["exp_avg"] for state in optimizer.state.values()]
    held = sum(sae.layout.local(t).numel() for t in (*sae.parameters(), *moments))
    by_purpose = {purpose: entry.size for (_, purpose), entry in traffic.sent.items()}
    return {
        "part": "counted",
        **{"F": F, "d": d, "k": k, "B": B, "layout": f"{shape[0]} x {shape[1]}", "screen": screen},
        **{"calls": traffic.calls(), "bytes": traffic.size(), "share": held / (2 * (2 * F * d + F + d))},
        "statistics": by_purpose.get("column statistics", 0),
        "gradients": by_purpose.get("gradients", 0),
    }


def count_dense(F: int, d: int, B: int) -> int:
    """Bytes that DistributedDataParallel reduces in a step with dense gradients of W_enc, b_enc, W_dec and b_dec."""
    model = nn.Sequential(nn.Linear(d, F), nn.ReLU(), nn.Linear(F, d))
    wrapped = nn.parallel.DistributedDataParallel(model)
    reduced: list[int] = []

    def hook(state, bucket):  # type: ignore[no-untyped-def]  # torch compares annotations with classes, not names
        reduced.append(bucket.buffer().numel() * bucket.buffer().element_size())
        return dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda done: done.value()[0])

    wrapped.register_comm_hook(None, hook)
    wrapped(torch.randn(B, d)).square().mean().backward()
    return sum(reduced)


def race(shape: tuple[int, int], F: int, d: int, k: int, B: int, weak: bool, screen: str, rounds: int) -> list[float]:
    """Seconds of a step of one process over those of all, side by side.

    weak: each process has B tokens, not a part. screen: of the one process and of the mesh.
    """
    size, data = shape[0] * shape[1], shape[0]
    _, _, together = make(shape, F, d, k, screen)
    _, _, alone = make(None, F, d, k, screen)
    x = torch.randn(B, d)
    part = x if weak and data > 1 else x[: B // data]
    ratios = []
    for i in range(rounds + 2):
        if dist.get_rank() == 0:
            start = time.perf_counter()
            alone(x)
            one = time.perf_counter() - start
        dist.barrier()
        start = time.perf_counter()
        together(part)
        dist.barrier()
        if dist.get_rank() == 0 and i >= 2:
            ratios.append(one / (time.perf_counter() - start) * (size if weak and data > 1 else 1))
    return ratios


def train(activations: Path, folder: str) -> list[Row] | None:
    """FVU and loss recovered over the seeds: one process, two with other tokens, two with other features."""
    store, first = ActivationStore.open(activations), dist.get_rank() == 0
    meshes = {name: dist.init_device_mesh("cpu", shape, mesh_dim_names=DIMENSIONS) for name, shape in TWO.items()}
    for seed in SEEDS:
        config = SampledSAEConfig(store.d_in, FEATURES, K, l=4, dead_after=50_000, seed=seed)
        settings = config, replace(TRAIN, seed=seed), store
        for name, mesh in meshes.items():
            Trainer(*settings, f"{folder}/{name}{seed}", mesh=mesh).run(progress=False)
        if first:  # on the batches of two
            Trainer(*settings, f"{folder}/alone{seed}", lanes=2).run(progress=False)
    if not first:
        return None
    splice, held_out = splice_of(store.manifest["model"], store, SPLICE_ROWS), store.holdout()[0]
    found, alone = [], []
    for layout in ("alone", *TWO):
        saes = [SampledSAE.from_pretrained(f"{folder}/{layout}{seed}") for seed in SEEDS]
        results = [evaluate(sae, held_out, TRAIN.batch_size, splice) for sae in saes]
        alone = alone or results
        difference = max(abs(one["fvu"] - other["fvu"]) for one, other in zip(results, alone))
        row: Row = {"part": "trained", "processes": 1 if layout == "alone" else 2, "layout": layout}
        row |= {name: over_seeds(result[name] for result in results) for name in ("fvu", "loss_recovered_zero")}
        found.append({**row, "difference": difference})
    return found


def markdown_table(result: Result) -> str:
    """A table a part, under its heading."""
    headings = {
        "counted": "Bytes and collectives of a step on a process, counted (of a gather what all send):",
        "timed": "Step time of one process over that of several, each of one thread (weak: equal tokens a process):",
        "trained": "Trainings on {on}: {features} features, k={k}, {steps} steps of {batch_size} tokens; mean "
        "(least–largest) over seeds {seeds}, loss recovered on {splice_rows} rows:",
        "model": "A model, no measurement: the fastest layout for {batch} tokens a step, k={k}, l={l}, on GPUs of "
        "{flops:.0e} flop/s in machines of {gpus_a_machine}, {nvlink:.0e} B/s and {nvlink_latency:.0e} s inside, "
        "{network:.0e} B/s and {network_latency:.0e} s between; with the collectives counted above, one of each "
        "dimension in a ring of hosts at {host_latency:.0e} s:",
    }
    tables = []
    for part, columns in PARTS.items():
        if rows := [row for row in result["rows"] if row["part"] == part]:
            about = headings[part].format(**(result["setup"] if part == "trained" else result["model"]))
            tables.append(f"{about}\n\n{markdown(columns, rows)}")
    return "\n".join(tables)


def main() -> None:
    command = parser(__doc__, "--out", "--rehearse", threads=1, rounds=15)
    command.add_argument("--activations", type=Path, help="of a harvest, for the trainings; none when absent")
    command.add_argument("--only", nargs="*", choices=PARTS, default=list(PARTS), help="other parts stay as they are")
    args = command.parse_args()
    before = json.loads(args.out.read_text()) if args.out.exists() else {"rows": []}
    kept = [row for row in before["rows"] if row["part"] not in args.only]
    hardware = scale_model.Hardware()
    setup = before.get("setup", {})
    if "trained" in args.only and args.activations is not None:
        store = ActivationStore.open(args.activations)
        on = f"layer {store.manifest['layer']} of {store.manifest['model']}, {sum(store.tokens)} tokens"
        about = {"on": on, "features": FEATURES, "k": K, "splice_rows": SPLICE_ROWS, "seeds": SEEDS}
        setup = {**about, **asdict(TRAIN)}
    record = Record(args, markdown_table, model=scale_model.assumptions(hardware), setup=setup)
    if args.only == ["model"]:  # the head says on what, and when, all else was measured
        record.result |= {name: value for name, value in before.items() if name not in ("rows", "model")}
    record.add(*kept)
    if "counted" in args.only:
        # at a width that a small machine has room for, F grows alone
        sizes = [(1024, 16)] if args.rehearse else [(65_536, 768), (65_536, 16), (1_048_576, 16)]
        layouts = LAYOUTS[::2] if args.rehearse else LAYOUTS
        for F, d in sizes:
            dense = on_processes(2, count_dense, F, d, 16)
            screens = ["off", "bf16"] if (F, d) == sizes[0] else ["off"]
            for shape, screen in itertools.product(layouts if (F, d) == sizes[0] else LAYOUTS[:1], screens):
                found = on_processes(shape[0] * shape[1], count, shape, F, d, 32, 64, screen)
                record.add({**found, "dense": dense})
    if "timed" in args.only:
        F, d, k, B = (512, 16, 4, 64) if args.rehearse else (16_384, 256, 32, 1024)
        races = [(*scaling, screen) for scaling in SCALINGS for screen in ("off", "auto")][:: 5 if args.rehearse else 1]
        for shape, weak, screen in races:
            speed = on_processes(2, race, shape, F, d, k, B, weak, screen, 3 if args.rehearse else args.rounds)
            about = {"layout": f"{shape[0]} x {shape[1]}", "scaling": "weak" if weak else "strong", "screen": screen}
            size = {"processes": 2, "B": B, "d": d, "F": F, "k": k}
            record.add({"part": "timed", **about, **size, **spread_columns(speed, "speed")})
    if "trained" in args.only and args.activations is not None:
        with tempfile.TemporaryDirectory() as folder:
            record.add(*on_processes(2, train, args.activations, folder))
    if "model" in args.only:
        record.add(*scale_model.rows(scale_model.Calls.counted(record.rows), hardware))


if __name__ == "__main__":
    main()
