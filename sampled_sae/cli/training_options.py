"""The options that say what SAE is trained, how and where it shows, of `train` and `sweep`; what they make."""

from __future__ import annotations

import argparse
from dataclasses import fields
from typing import Any

from ..config import SCREENS, SampledSAEConfig
from ..run_logs import KINDS, PROJECT, LogPlace
from ..training.activation_stream import StreamedActivations
from ..training.activations import Activations
from ..training.train_config import TrainConfig
from .arguments import listed, whole_number
from .processes import add_rank_options

# fields of a config that are options of their own
OF_SAE = {
    "aux_coefficient": "weight of the dead-feature loss",
    "pool_every": "steps for which a candidate pool is kept",
    "score_tokens": "share of the tokens that the scores look at",
    "dead_after": "tokens unselected that make a feature dead",
    "screen": "look through bfloat16 products; same results",
    "impl": "auto, triton, torch or reference",
}


def sae_arguments(p: argparse.ArgumentParser) -> None:
    for field in fields(SampledSAEConfig):
        if field.name in OF_SAE:
            how = {"choices": SCREENS} if field.name == "screen" else {"type": type(field.default)}
            name = "--" + field.name.replace("_", "-")
            p.add_argument(name, default=field.default, help=OF_SAE[field.name], **how)
    p.add_argument(
        "--groups",
        type=listed(whole_number),
        default=None,
        help="a Matryoshka SAE: numbers of features, ascending, comma-separated, that each reconstruct on their own; "
        "all of them come last",
    )
    p.add_argument("--skip", action="store_true", help="a transcoder adds a linear function of what it reads")


def train_arguments(p: argparse.ArgumentParser) -> None:
    text = {
        "steps": "batches to train on",
        "batch_size": "tokens a batch",
        "lr": "peak learning rate",
        "warmup": "share of the steps over which lr rises",
        "decay": "share of the steps over which lr falls at the end",
        "clip": "largest gradient norm",
        "adam": "rows without gradient: dense (they move on, as in torch), lazy or decayed (they stand still)",
        "moments": "dtype of Adam's moments, float32 or bfloat16",
        "precision": "of the operands of products: bf16, tf32, fp32, or auto: bf16 on a GPU, fp32 without one",
        "seed": "of weights and token order",
        "decoder_start": "what decoder rows begin as: random directions, or those of tokens",
        "checkpoint_every": "steps between checkpoints",
        "log_every": "steps between lines of metrics.jsonl",
        "k_start": "k of the first step, which goes linearly to --k; --k itself when absent",
        "l_start": "l of the first step, which goes linearly to --l; --l itself when absent",
        "schedule_steps": "steps until k and l are those of the SAE, with --k-start or --l-start",
    }
    for field in fields(TrainConfig):
        if field.name == "seed" and p.prog.endswith("sweep"):
            continue
        name = "--" + field.name.replace("_", "-")
        kind = type(field.default) if field.default is not None else int if field.name == "schedule_steps" else float
        p.add_argument(name, type=kind, default=field.default, help=text[field.name])
    _log_arguments(p)
    p.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N; of several processes, cuda gives each its own")
    add_rank_options(p)


def sae_config(args: argparse.Namespace, store: Activations | StreamedActivations, **rule: Any) -> SampledSAEConfig:
    if args.groups is not None:
        everything = rule["d_sae"]
        rule["groups"] = args.groups if everything in args.groups[-1:] else [*args.groups, everything]
    return SampledSAEConfig(
        d_in=store.d_in,
        d_out=store.d_out,
        layers=store.layers,
        skip=rule.pop("skip", False) or args.skip,
        **{name: getattr(args, name) for name in OF_SAE},
        **rule,
    )


def train_config(args: argparse.Namespace) -> TrainConfig:
    values: dict[str, Any] = {f.name: getattr(args, f.name, f.default) for f in fields(TrainConfig)}
    return TrainConfig(**values)


def _log_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("--log", choices=KINDS, default=None, help="where else metrics go as the training runs")
    p.add_argument("--log-project", default=None, help=f"that the run stands under there; {PROJECT} when absent")
    p.add_argument("--log-name", default=None, help="of the run there; its folder's name when absent")
    p.add_argument("--log-tags", default=None, help="of the run there, comma-separated")


def log_place(args: argparse.Namespace) -> LogPlace | None:
    """None where the run is shown nowhere.

    Raises:
        ValueError, ImportError: as LogPlace.
    """
    if args.log is None:
        for name in ("log_project", "log_name", "log_tags"):
            if (value := getattr(args, name)) is not None:
                raise ValueError(f"{name}={value!r}: goes with --log")
        return None
    tags = [] if args.log_tags is None else args.log_tags.split(",")
    return LogPlace(args.log, args.log_project or PROJECT, args.log_name, tuple(tag.strip() for tag in tags))
