"""`train --model` and `sweep --layer`: a language model over texts in the place of stored activations."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..support.argument_checks import check_device, check_integer
from ..support.output_folder import check_output_folder
from ..training.activation_stream import BUFFER_TOKENS, ActivationStream, StreamedActivations
from .arguments import (
    added_since,
    check_not_given,
    listed,
    loaded_model,
    model_arguments,
    pair_of,
    place_arguments,
    places_in_words,
    whole_number,
)
from .harvest import HOLDOUT_ROWS
from .parser import Parser
from .texts import Texts, source_arguments


def stream_arguments(p: Parser) -> None:
    """`--model` and what goes with it, which takes the place of the argument `activations`."""
    p.replaces("--model", "activations")
    before = list(p._actions)
    model_arguments(p, None, "runs over --texts in the place of stored activations, none of which are kept: ")
    _texts_and_places(p, 0, "; several, comma-separated, give an SAE each, in OUT/layer_N, from one pass of the model")
    p.set_defaults(with_model=added_since(p, before))


def sweep_stream_arguments(p: Parser) -> None:
    """The same of a command whose `--model` may also be the one that was harvested: the place in it, or the texts,
    take that of the argument `activations`."""
    for option in ("--layer", "--points", "--mlp", "--texts"):
        p.replaces(option, "activations")
    before = list(p._actions)
    _texts_and_places(p, HOLDOUT_ROWS, ", in the place of stored activations")
    p.set_defaults(with_model=added_since(p, before))


def _texts_and_places(p: Parser, holdout_rows: int, layers: str) -> None:
    """layers: what else the help says of --layer."""
    p.add_argument(
        "--layer", type=listed(whole_number), default=None, help="with --model, the block, from 0, whose output is "
        f"trained on{layers}"
    )  # fmt: skip
    place_arguments(p, "with --model, ")
    source_arguments(p, "wiki-en")
    p.add_argument(
        "--holdout-rows", type=int, default=holdout_rows, help="with --model, the first rows, never trained on"
    )
    p.add_argument("--model-batch-size", type=int, default=8, help="with --model, rows a forward pass")
    p.add_argument(
        "--buffer-tokens", type=int, default=BUFFER_TOKENS, help="with --model, activations of so many tokens are held "
        "and shuffled together; as many more are made meanwhile"
    )  # fmt: skip
    p.add_argument(
        "--buffer-on-disk", type=Path, default=None, metavar="FOLDER", help="with --model, where these activations lie "
        "meanwhile, in files without names; in memory when absent"
    )  # fmt: skip


def check_no_model(args: argparse.Namespace) -> None:
    """ValueError where an option goes with `--model`, which is not given."""
    check_not_given(args, args.with_model, "goes with --model, without stored activations")


def open_stream(args: argparse.Namespace) -> dict[str, StreamedActivations]:
    """What each SAE reads, by the name of its folder; "" for the only one.

    Everything that needs no weights comes first: folder, texts, layers, context.
    """
    from ..lm import ModelSource

    if args.model is None:
        raise ValueError("model=None: must be given with --layer, --points or --texts: whose activations are read")
    if args.holdout is not None:
        raise ValueError(f"holdout={args.holdout}: is for a file of activations; --holdout-rows is for texts")
    if args.targets is not None:
        raise ValueError(f"targets={args.targets}: are for stored activations, which --model does without")
    if args.skip and not args.mlp and args.points is None:
        raise ValueError("skip=True: is of a transcoder; give --mlp, or two places with --points")
    if args.layer is None and args.points is None:
        raise ValueError("layer=None: must be given with --model: the block, from 0, whose output is trained on")
    if args.points is not None and (args.layer is not None or args.mlp):
        raise ValueError(f"points={' '.join(args.points)}: name both places, without --layer and --mlp")
    if args.mlp and len(args.layer) > 1:
        raise ValueError(f"layer={args.layer}: --mlp is of one block; train the transcoders one by one")
    check_integer("holdout_rows", args.holdout_rows, 0)
    if not 0 <= (args.splice_rows or 0) <= args.holdout_rows:
        raise ValueError(f"splice_rows={args.splice_rows}: must be from 0 to {args.holdout_rows}, the --holdout-rows")
    if args.beside is not None and (args.points is not None or args.mlp or len(args.layer) > 1):
        raise ValueError(f"--beside {' '.join(args.beside)}: stands beside one --layer, without --points and --mlp")
    layers = [check_integer("layer", layer, 0) for layer in (*(args.layer or ()), *_beside(args))]
    if len(set(layers)) < len(layers):
        raise ValueError(f"layer={layers}: none twice")
    for name in ("init_from", "lanes"):
        if len(layers) > 1 and args.beside is None and getattr(args, name) is not None:
            raise ValueError(f"{name}={getattr(args, name)}: is for one SAE; train the layers one by one")
    for name in ("model_batch_size", "buffer_tokens"):
        check_integer(name, getattr(args, name), 1)
    check_device(args.device)
    check_output_folder(args.out)
    texts = Texts(args, args.model, *layers)
    points = pair_of(args, texts.skeleton, layers)
    where = places_in_words(layers, points)
    print(f"Reads {where} of {args.model} over {args.texts}, stores nothing{texts.without()}", flush=True)
    source = ModelSource(
        loaded_model(args.model, args, args.device),
        texts.reader(order_seed=args.seed),
        layers if points is None else points,
        model_name=args.model,
        source=args.texts,
        batch_size=args.model_batch_size,
        holdout_rows=args.holdout_rows,
        drop_tokens=texts.dropped,
    )
    stream = ActivationStream(source, args.buffer_tokens, args.buffer_on_disk)
    if points is not None:
        return {"": stream.pair()}
    if args.beside is not None:
        return {"": stream.beside()}
    parts = stream.parts
    return {"" if len(layers) == 1 else f"layer_{layer}": part for layer, part in zip(layers, parts)}


def open_swept_stream(args: argparse.Namespace) -> StreamedActivations:
    """What all SAEs of a sweep read.

    Raises:
        ValueError: as `open_stream`; several layers that are not beside each other, nothing held out.
    """
    if len(args.layer or ()) > 1:
        raise ValueError(f"layer={args.layer}: a sweep is of one, or of a crosscoder's with --beside; sweep each alone")
    if args.insist:
        raise ValueError("insist=True: is of stored activations; --model is the one whose activations are read here")
    if check_integer("holdout_rows", args.holdout_rows, 0) == 0:
        raise ValueError("holdout_rows=0: a sweep is evaluated on the rows that are held out; must be at least 1")
    (part,) = open_stream(args).values()
    return part


def _beside(args: argparse.Namespace) -> list[int]:
    """The blocks that `--beside` names."""
    if not all(text.isdecimal() for text in args.beside or ()):
        raise ValueError(f"--beside {' '.join(args.beside)}: with --model must be blocks, whole numbers from 0")
    return [int(text) for text in args.beside or ()]
