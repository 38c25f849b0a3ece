"""`sampled-sae bench`."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import torch

from .arguments import Command, pool_multiplier


def add(command: Command) -> None:
    from ..bench_steps import DTYPES
    from ..config import SCREENS, SELECTS
    from ..optim import MODES
    from ..support.argument_checks import SCORES

    p = command("bench", bench, "Time a training step, its parts, its floor and eager PyTorch at sizes of your own.")
    p.add_argument("--d", type=int, default=768, help="width of the activations")
    p.add_argument("--features", type=int, default=65536, help="features of the dictionary")
    p.add_argument("--batch", type=int, default=8192, help="tokens in a batch")
    p.add_argument("--k", type=float, default=64, help="active features a token")
    p.add_argument(
        "--l", type=pool_multiplier, default=None, help="pool multiplier; the whole dictionary when absent or none"
    )
    p.add_argument("--score", choices=SCORES, default="l2", help="what ranks the features of a batch")
    p.add_argument("--select", choices=SELECTS, default="batch", help="budget for the batch or for each token")
    p.add_argument(
        "--screen", choices=SCREENS, default="auto", help="whether scores and searches look in bfloat16 first"
    )
    p.add_argument("--adam", choices=MODES, default="dense", help="mode of RowAdam")
    p.add_argument("--device", default=None, help="cpu or cuda; a GPU where there is one")
    p.add_argument("--dtype", choices=DTYPES, default=None, help="of the products; bfloat16 on a GPU, else float32")
    p.add_argument("--rounds", type=int, default=9, help="samples of each, fewer where the time runs out")
    p.add_argument("--seconds", type=float, default=100, help="about what all of it may take")
    p.add_argument("--json", type=Path, default=None, help="also write the figures here")


def bench(args: argparse.Namespace) -> int:
    from ..bench import HEADING, Settings, check_fits, line, run
    from ..support.argument_checks import check_device
    from ..support.atomic_files import write_json

    device = check_device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    names = {field.name for field in dataclasses.fields(Settings)}
    given = {name: value for name, value in vars(args).items() if name in names}
    given["device"] = str(device)
    given["dtype"] = args.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    settings = Settings(**given)
    check_fits(settings)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    rule = f"k={args.k:g}, l={args.l}, {args.score}, {args.select}"
    size = f"B={args.batch}, d={args.d}, F={args.features}"
    print(f"{where}; torch {torch.__version__}; {settings.dtype}; {size}, {rule}, Adam {args.adam}", flush=True)
    print(HEADING, flush=True)
    rows = []
    for row in run(settings):
        rows.append(row)
        print(line(row), flush=True)
    if args.json is not None:
        listed = [dataclasses.asdict(row) for row in rows]
        machine = {"device": where, "torch": torch.__version__}
        write_json(args.json, {**machine, **dataclasses.asdict(settings), "rows": listed})
    return 0
