"""`sampled-sae look`."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..formats.published import Published, read_inference
from ..inference.codes_files import MANIFEST as CODES_MANIFEST
from ..inference.codes_files import is_codes
from ..inference.codes_store import CodesStore
from ..inference.encode_corpus import encode_corpus, sae_crc32
from ..pages.choice import FeatureChoice
from ..pages.feature_page import LanguageModel, PageSettings, feature_page, shards_of
from ..pages.html import PAGE, is_page
from ..pages.run_overview import run_overview
from ..pages.runs_page import best, is_member, is_runs, read_runs, runs_page
from ..support.argument_checks import check_integer
from ..support.atomic_files import write_text
from ..support.output_folder import check_output_folder
from ..support.remote_files import place
from ..training.activation_store import ActivationStore, StoredActivations
from ..training.same_settings import identity
from .arguments import Command, loaded_model, model_arguments, published_arguments, refusal, seed
from .identity import check_model, check_same_origin


def add(command: Command) -> None:
    p = command("look", look, "Write a page that shows what an SAE has learned, or how the runs of a sweep compare.")
    p.add_argument(
        "sae",
        help="folder of an SAE in any layout, or owner/name on the Hugging Face hub; a sweep's folder, for a page of "
        "its runs and one of its best SAE; a CSV file of runs with the columns name, l and seed",
    )
    p.add_argument(
        "activations",
        nargs="?",
        help="folder or URL of activations, or folder of codes that encode wrote with this SAE; not needed for runs",
    )
    p.add_argument("--out", type=Path, default=None, help=f"file to write; {PAGE} in the folder of the SAE when absent")
    p.add_argument(
        "--features",
        dest="choice",
        type=features,
        default="top",
        help="in full: top or top:N by what they carry of the loss, random or random:N, all, A:B, or numbers as 3,17; "
        "top and random are 1000",
    )
    p.add_argument("--seed", type=seed, default=0, help="of --features random")
    p.add_argument("--tokens", type=int, default=1_000_000, help="look at about so many, from the first shard on")
    p.add_argument("--contexts", type=int, default=16, help="top contexts a feature, and a quarter as many a quartile")
    p.add_argument("--batch-size", type=int, default=4096, help="tokens at a time")
    published_arguments(p)
    model_arguments(p, None, "for tokens and logit lens; the one that was harvested when absent: ")
    p.add_argument("--no-model", action="store_true", help="without a model: token ids as numbers, no logit lens")
    p.add_argument("--insist", action="store_true", help="take another model or layer than the SAE's files name")


def features(text: str) -> FeatureChoice:
    """As `FeatureChoice.parse`, for the parser."""
    try:
        return FeatureChoice.parse(text)
    except ValueError as error:
        raise refusal(text, str(error).partition(": ")[2]) from None


def look(args: argparse.Namespace) -> None:
    for name in ("tokens", "contexts", "batch_size"):
        check_integer(name, getattr(args, name), 1)
    runs = Path(args.sae)
    if is_runs(runs):
        return _look_at_runs(args, runs)
    if args.activations is None:
        raise ValueError(
            f"{args.sae}: is no sweep and no CSV file of runs; an SAE is looked at on activations, name some"
        )
    _look_at_sae(args, _output(args))


def _look_at_runs(args: argparse.Namespace, runs: Path) -> None:
    """The page of the best SAE where there are activations, then that of all runs, which links to it."""
    found, folder = read_runs(runs), runs if runs.is_dir() else runs.parent
    out = args.out or (folder / PAGE if runs.is_dir() else runs.with_suffix(".html"))
    _check_file(out)
    if args.activations is not None:
        if not runs.is_dir():
            raise ValueError(f"{args.activations}: {runs} holds no SAEs to look at on activations; leave them out")
        row = best(found.rows)
        if not is_member(folder, row):
            raise ValueError(f"{folder}: has no folder of its best run {row['name']!r}")
        args.sae = str(folder / row["name"])
        page_of_best = Path(args.sae) / PAGE
        _check_file(page_of_best)
        _look_at_sae(args, page_of_best)
    write_text(out, runs_page(runs.resolve().name if runs.is_dir() else runs.stem, found, out.parent))
    print(out)


def _look_at_sae(args: argparse.Namespace, out: Path) -> None:
    settings = PageSettings(args.choice, args.seed, args.tokens, args.contexts)
    found = read_inference(args.sae, args.at, layout=args.layout, k=args.k)
    args.choice.check(found.sae.cfg.d_sae)
    codes, store = _opened(args.activations)
    corpus = (store or codes).manifest  # type: ignore[union-attr]
    check_same_origin(args.sae, found, corpus, args.insist)
    model = None if args.no_model else _model(args, found, corpus)
    overview = run_overview(args.sae, args.at, found, corpus)
    print(f"Looks at {args.sae} on {args.activations}, writes {out}", flush=True)
    with _codes(args, found, codes, store) as of_sae:
        html = feature_page(found.sae, of_sae, store, model, settings, overview, not args.quiet)
    write_text(out, html)
    print(out)


def _output(args: argparse.Namespace) -> Path:
    out = args.out
    if out is None:
        if not Path(args.sae).is_dir():
            raise ValueError(f"{args.sae}: no folder to write the page to; name a file with --out")
        out = Path(args.sae) / PAGE
    _check_file(out)
    return Path(out)


def _check_file(out: Path) -> None:
    if out.is_dir():
        raise ValueError(f"{out}: is a folder; name a file with --out")
    if out.exists() and not is_page(out):
        raise ValueError(f"{out}: is no page of this package and would be replaced; name another file with --out")
    check_output_folder(out.parent)


def _opened(name: str) -> tuple[CodesStore | None, ActivationStore | None]:
    """Codes or activations, whichever the folder holds; at a URL, activations."""
    folder = place(name)
    if isinstance(folder, Path) and (folder / CODES_MANIFEST).is_file() and is_codes(folder):
        return CodesStore.open(folder), None
    return None, ActivationStore.open(name)


@contextmanager
def _codes(
    args: argparse.Namespace, found: Published, codes: CodesStore | None, store: ActivationStore | None
) -> Iterator[CodesStore]:
    """Those that are there, or made for this page alone and removed at its end."""
    if codes is not None:
        if codes.d_sae != found.sae.cfg.d_sae:
            raise ValueError(f"{args.activations}: codes of {codes.d_sae} features, not of {found.sae.cfg.d_sae}")
        if not args.insist and codes.manifest["settings"].get("sae_crc32") != sae_crc32(found.sae):
            raise ValueError(
                f"{args.activations}: codes of other weights than {args.sae} has; encode again, or --insist"
            )
        yield codes
        return
    assert store is not None
    with tempfile.TemporaryDirectory(prefix="sampled-sae-look-") as folder:
        source = StoredActivations(store, shards_of(store.tokens, args.tokens))
        encode_corpus(found.sae, source, folder, batch_size=args.batch_size, progress=not args.quiet)
        yield CodesStore.open(folder)


def _model(args: argparse.Namespace, found: Published, corpus: dict[str, Any]) -> LanguageModel | None:
    """The language model of the activations; None where nothing names one, which is said."""
    name = args.model or corpus.get("model")
    if not name:
        print(f"{args.activations} names no language model: no tokens and no logit lens; --model gives one", flush=True)
        return None
    from ..lm import weights_digest
    from ..lm.logit_lens import logit_lens, token_texts
    from ..lm.models import load_tokenizer, predicts_next_token
    from ..residual_stream.blocks import text_config

    model, tokenizer = loaded_model(name, args), load_tokenizer(name, args.cache)
    if not args.insist:
        check_model({"model": name, "weights_sha256": weights_digest(model)}, identity(corpus), str(args.activations))
    width, d_out = getattr(text_config(model), "hidden_size", None), found.sae.cfg.width_out
    reads = predicts_next_token(model) and width == d_out
    if not reads:
        why = f"its residual stream has {width}, the SAE {d_out}" if width != d_out else "it predicts no next token"
        print(f"No logit lens through {name}: {why}", flush=True)
    return LanguageModel(
        lambda ids: token_texts(tokenizer, ids), (lambda rows: logit_lens(model, rows)) if reads else None
    )
