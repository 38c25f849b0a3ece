"""`sampled-sae encode`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..formats.published import Published, read_inference
from ..inference.codes_files import DTYPES
from ..inference.encode_corpus import TokenSource, encode_corpus
from ..support.argument_checks import check_device, check_integer
from ..support.output_folder import check_output_folder
from ..training.activation_store import ActivationStore, StoredActivations
from .arguments import (
    Command,
    added_since,
    check_not_given,
    loaded_model,
    model_arguments,
    published_arguments,
)
from .identity import block, check_same_origin
from .texts import Texts, text_arguments


def add(command: Command) -> None:
    p = command("encode", encode, "Write the sparse codes of stored activations, or of a model over texts, to shards.")
    p.add_argument(
        "activations", nargs="?", help="folder of activations, or a URL of one; absent, --texts are read"
    )  # fmt: skip
    p.add_argument("out", type=Path, help="folder to write to; an interrupted encode there is resumed")
    p.add_argument("--sae", required=True, help="folder of an SAE in any layout, or owner/name on the Hugging Face hub")
    published_arguments(p)
    p.add_argument("--sae-dtype", choices=tuple(DTYPES), default=None, help="of the weights; as stored when absent")
    p.add_argument("--dtype", choices=tuple(DTYPES), default="float32", help="of the codes on disk")
    p.add_argument("--batch-size", type=int, default=4096, help="tokens at a time")
    p.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    p.add_argument("--insist", action="store_true", help="take another model or layer than the SAE's files name")
    before = list(p._actions)
    model_arguments(p, None, "the one that the SAE's files name when absent: ")
    p.add_argument("--layer", type=int, default=None, help="block whose output is read; that of the SAE when absent")
    text_arguments(p, None)
    p.set_defaults(with_texts=added_since(p, before))


def encode(args: argparse.Namespace) -> None:
    for name, least in {"batch_size": 1, "k": 1, "layer": 0, "context": 2, "tokens": 1}.items():
        if getattr(args, name) is not None:
            check_integer(name, getattr(args, name), least)
    check_output_folder(args.out)
    device = check_device(args.device)
    if args.activations is None and args.texts is None:
        raise ValueError("either a folder of activations or --texts must be given")
    if args.activations is not None:
        check_not_given(args, args.with_texts, f"not beside {args.activations}, which holds activations")
    dtype = None if args.sae_dtype is None else DTYPES[args.sae_dtype]
    found = read_inference(args.sae, args.at, layout=args.layout, k=args.k, device=device, dtype=dtype)
    source: TokenSource
    if args.activations is not None:
        store = ActivationStore.open(args.activations)
        check_same_origin(args.sae, found, store.manifest, args.insist)
        source = StoredActivations(store)
        if not store.has_places:
            print(f"{args.activations} does not say where in texts its tokens stand: contexts will be token numbers")
    else:
        source = _model_rows(found, args)
    name = args.sae if args.at is None else f"{args.sae}/{args.at}"
    options = {"sae_name": name, "batch_size": args.batch_size, "dtype": args.dtype}
    done = encode_corpus(found.sae, source, args.out, **options, progress=not args.quiet)
    tokens, entries = (sum(shard[count] for shard in done.manifest["shards"]) for count in ("tokens", "entries"))
    print(f"{tokens} tokens, L0 {entries / max(1, tokens):.4g}, in {args.out}", end="")
    if done.tokens:
        rates = f"{done.tokens / done.seconds:.4g} tokens/s, {done.tokens / done.sae_seconds:.4g} in the SAE alone"
        print(f"; {done.tokens} of them now, {rates}")
    else:
        print(": nothing was left to do")


def _model_rows(found: Published, args: argparse.Namespace) -> Any:
    from ..lm import ModelRows

    model_name = args.model or found.origin.model_name
    if not model_name:
        raise ValueError(f"{args.sae}: does not name its language model; give --model")
    layer = block(found) if args.layer is None else check_integer("layer", args.layer, 0)
    if not isinstance(layer, int):
        what = "names no layer" if layer is None else f"reads {layer}, which is not a block's output"
        raise ValueError(f"{args.sae}: {what}; give --layer")
    check_same_origin(args.sae, found, {"model": model_name, "layer": layer}, args.insist)
    texts = Texts(args, model_name, layer)
    print(f"Encodes layer {layer} of {model_name} over {args.texts} into {args.out}{texts.without()}", flush=True)
    rows = texts.rows()
    model = loaded_model(model_name, args, args.device)
    return ModelRows(model, rows, layer, model_name=model_name, source=args.texts, drop_tokens=texts.dropped)
