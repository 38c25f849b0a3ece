"""The options that say what SAE is trained and how, of `train` and `sweep`; and the configs that they make."""

from __future__ import annotations

import argparse
from dataclasses import fields
from typing import Any

from ..config import SCREENS, SampledSAEConfig
from ..training.activation_stream import StreamedActivations
from ..training.activations import Activations
from ..training.train_config import TrainConfig
from .arguments import listed, whole_number
from .logs import add_log_options
from .processes import add_rank_options


def sae_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("--aux-coefficient", type=float, default=1 / 32, help="weight of the dead-feature loss")
    p.add_argument("--pool-every", type=int, default=1, help="steps for which a candidate pool is kept")
    p.add_argument("--score-tokens", type=float, default=1.0, help="share of the tokens that the scores look at")
    p.add_argument("--dead-after", type=int, default=10_000_000, help="tokens unselected that make a feature dead")
    p.add_argument(
        "--groups",
        type=listed(whole_number),
        default=None,
        help="a Matryoshka SAE: numbers of features, ascending, comma-separated, that each reconstruct on their own; "
        "all of them come last",
    )
    p.add_argument("--skip", action="store_true", help="a transcoder adds a linear function of what it reads")
    p.add_argument("--screen", choices=SCREENS, default="auto", help="look through bfloat16 products; same results")
    p.add_argument("--impl", default="auto", help="auto, triton, torch or reference")


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
    add_log_options(p)
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
        aux_coefficient=args.aux_coefficient,
        pool_every=args.pool_every,
        score_tokens=args.score_tokens,
        dead_after=args.dead_after,
        screen=args.screen,
        impl=args.impl,
        **rule,
    )


def train_config(args: argparse.Namespace) -> TrainConfig:
    values: dict[str, Any] = {f.name: getattr(args, f.name, f.default) for f in fields(TrainConfig)}
    return TrainConfig(**values)
