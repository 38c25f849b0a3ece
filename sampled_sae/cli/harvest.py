"""`sampled-sae harvest`."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..support.argument_checks import check_integer
from ..support.output_folder import check_output_folder
from .arguments import Command, loaded_model, model_arguments
from .processes import add_rank_options
from .texts import Texts, text_arguments


def add(command: Command) -> None:
    p = command("harvest", harvest, "Run a language model over texts and store a layer's activations in shards.")
    p.add_argument("out", type=Path, help="folder to write to; an interrupted harvest there is resumed")
    model_arguments(p)
    p.add_argument("--layer", type=int, required=True, help="block whose output is stored, from 0")
    text_arguments(p, "wiki-en")
    p.add_argument("--holdout-rows", type=int, default=32, help="rows kept for evaluation, never trained on")
    p.add_argument("--batch-size", type=int, default=8, help="rows a forward pass")
    p.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="of the shards")
    add_rank_options(p, shards=False)


def harvest(args: argparse.Namespace) -> None:
    """Everything that needs no weights comes first: folder, texts, layer, context, rows."""
    from ..lm import harvest as harvest_rows
    from ..lm.harvest import check_holdout, check_resumes

    check_integer("holdout_rows", args.holdout_rows, 0)
    check_integer("batch_size", args.batch_size, 1)
    check_output_folder(args.out)
    texts = Texts.open(args, args.model, args.layer)
    print(
        f"Harvests layer {args.layer} of {args.model} over {args.texts} into {args.out}{texts.without()}",
        flush=True,
    )
    known = ("model", "layer", "context", "batch_size", "dtype", "holdout_rows")
    check_resumes(args.out, {"source": args.texts, **{name: getattr(args, name) for name in known}})
    rows = texts.rows()
    check_holdout(args.holdout_rows, len(rows))
    model = loaded_model(args.model, args)
    manifest = harvest_rows(
        model,
        rows,
        args.layer,
        args.out,
        model_name=args.model,
        source=args.texts,
        batch_size=args.batch_size,
        dtype=args.dtype,
        drop_tokens=texts.dropped,
        holdout_rows=args.holdout_rows,
        progress=not args.quiet,
        mesh=args.ranks.mesh,
    )
    tokens = sum(shard["tokens"] for shard in manifest["shards"])
    held_out = manifest["holdout"]["tokens"] if manifest["holdout"] else 0
    counts = ", ".join(f"{reason} {count}" for reason, count in manifest.get("dropped", {}).items())
    print(f"{tokens} training tokens, {held_out} held out, in {args.out}" + (f"; left out: {counts}" if counts else ""))
