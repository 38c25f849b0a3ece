"""`sampled-sae harvest`."""

from __future__ import annotations

import argparse

from ..support.argument_checks import check_integer
from ..support.output_folder import check_output_place
from ..support.remote_files import output_place
from .arguments import Command, loaded_model, model_arguments, pair_of, place_arguments, places_in_words
from .processes import add_rank_options
from .texts import Texts, text_arguments

HOLDOUT_ROWS = 32


def add(command: Command) -> None:
    p = command("harvest", harvest, "Run a language model over texts and store a layer's activations in shards.")
    p.add_argument("out", help="folder, or a URL that fsspec knows; an interrupted harvest there is resumed")
    model_arguments(p)
    p.add_argument("--layer", type=int, default=None, help="block whose output is stored, from 0")
    place_arguments(p)
    p.add_argument(
        "--beside",
        nargs="+",
        type=int,
        metavar="LAYER",
        default=None,
        help="other blocks, whose output is stored beside that of --layer: activations for a crosscoder",
    )
    text_arguments(p, "wiki-en")
    p.add_argument("--holdout-rows", type=int, default=HOLDOUT_ROWS, help="rows kept for evaluation, never trained on")
    p.add_argument("--batch-size", type=int, default=8, help="rows a forward pass")
    p.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="of the shards")
    add_rank_options(p, shards=False)


def harvest(args: argparse.Namespace) -> None:
    """Everything that needs no weights comes first: folder, texts, layer, context, rows."""
    from ..lm import harvest as harvest_layer
    from ..lm import harvest_beside, harvest_pair
    from ..lm.harvest_places import check_holdout, check_resumes

    _check_place(args)
    for layer in args.beside or ():
        check_integer("beside", layer, 0)
    check_integer("holdout_rows", args.holdout_rows, 0)
    check_integer("batch_size", args.batch_size, 1)
    args.out = output_place(args.out)
    check_output_place(args.out)
    layers = [] if args.layer is None else [args.layer, *(args.beside or ())]
    texts = Texts(args, args.model, *layers)
    points = pair_of(args, texts.skeleton, layers)
    where = places_in_words(layers, points)
    print(f"Harvests {where} of {args.model} over {args.texts} into {args.out}{texts.without()}", flush=True)
    known = {name: getattr(args, name) for name in ("model", "context", "batch_size", "dtype", "holdout_rows")}
    check_resumes(args.out, points or layers, {"source": args.texts, **known})
    rows = texts.rows()
    check_holdout(args.holdout_rows, len(rows))
    model = loaded_model(args.model, args)
    how = {
        "model_name": args.model,
        "source": args.texts,
        "batch_size": args.batch_size,
        "dtype": args.dtype,
        "drop_tokens": texts.dropped,
        "holdout_rows": args.holdout_rows,
        "progress": not args.quiet,
        "mesh": args.ranks.mesh,
    }
    if args.beside is not None:
        how["model_names"] = [how.pop("model_name")]
        manifest = harvest_beside(model, rows, layers, args.out, **how).parts[0].manifest
    elif points is None:
        manifest = harvest_layer(model, rows, args.layer, args.out, **how)
    else:
        manifest = harvest_pair(model, rows, *points, args.out, **how).x.manifest
    tokens = sum(shard["tokens"] for shard in manifest["shards"])
    held_out = manifest["holdout"]["tokens"] if manifest["holdout"] else 0
    counts = ", ".join(f"{reason} {count}" for reason, count in manifest.get("dropped", {}).items())
    print(f"{tokens} training tokens, {held_out} held out, in {args.out}" + (f"; left out: {counts}" if counts else ""))


def _check_place(args: argparse.Namespace) -> None:
    """ValueError unless the options name one place, or two."""
    if args.points is not None and (args.layer is not None or args.mlp):
        raise ValueError(f"--points {' '.join(args.points)}: name both places, without --layer and --mlp")
    if args.points is None and args.layer is None:
        raise ValueError("layer=None: give --layer, the block, from 0, whose output is stored, or --points")
    if args.beside is not None and (args.points is not None or args.mlp):
        raise ValueError(f"--beside {' '.join(map(str, args.beside))}: is of blocks, without --points and --mlp")
