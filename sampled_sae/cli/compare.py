"""`sampled-sae compare`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from ..comparison import METHODS, compare
from ..comparison.compare import SAME
from ..comparison.report import MATCHES, PLOT, SUMMARY, TABLE, plot, table, write_report
from ..formats.published import Published, read_inference
from ..pages.comparison_page import COMPARISON_PAGE, comparison_page
from ..pages.html import PAGE
from ..pages.look_link import LookLink
from ..pages.run_overview import full_name, shown_name
from ..support.argument_checks import check_device, check_integer, check_number
from ..support.atomic_files import read_json, write_text
from ..support.output_folder import check_output_folder
from ..support.remote_files import place
from ..training.activation_store import ActivationStore
from ..training.feed import CALIBRATION_TOKENS
from .arguments import Command, can_plot
from .identity import block, check_same_origin


def add(command: Command) -> None:
    p = command("compare", run_compare, "Match the features of two SAEs: what they share, what each has alone.")
    where = "folder of an SAE in any layout, or owner/name on the Hugging Face hub"
    p.add_argument("a", help=where)
    p.add_argument("b", help=where)
    for side in ("a", "b"):
        p.add_argument(f"--{side}-at", default=None, help=f"folder or file inside {side}, as layer_12/width_16k")
        p.add_argument(f"--{side}-look", type=Path, default=None, help=f"page of {side} that look wrote, which the "
                       f"comparison's page links to; {PAGE} in the folder of {side} when absent")  # fmt: skip
    p.add_argument(
        "--activations", default=None, help="folder of activations, or a URL of one, on which codes are compared"
    )
    p.add_argument("--out", type=Path, default=Path("comparison"), help="folder for table, pairs, plot and page")
    p.add_argument(
        "--matching",
        dest="method",
        choices=METHODS,
        default="auto",
        help="of cosines of decoder rows; auto is hungarian, and greedy for very many features or without scipy",
    )
    p.add_argument("--same", type=float, default=SAME, help="cosine from which a pair counts as the same feature")
    p.add_argument("--batch-size", type=int, default=2048, help="tokens at a time")
    p.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    p.add_argument("--insist", action="store_true", help="compare SAEs of different models or layers")


def run_compare(args: argparse.Namespace) -> None:
    check_number("same", args.same, -1, 1)
    check_integer("batch_size", args.batch_size, 1)
    check_output_folder(args.out)
    device = check_device(args.device)
    names = (full_name(args.a, args.a_at), full_name(args.b, args.b_at))
    about = {"a": names[0], "b": names[1], "activations": args.activations and str(place(args.activations))}
    _check_own(args.out, about)
    saes = [read_inference(name, at, device=device) for name, at in ((args.a, args.a_at), (args.b, args.b_at))]
    _check_together(saes, args)
    looks = (_look(args.a_look, names[0], saes[0], args.out), _look(args.b_look, names[1], saes[1], args.out))
    x = None if args.activations is None else _activations(saes, args).to(device)
    options = {"method": args.method, "same": args.same, "batch_size": args.batch_size}
    found = compare(saes[0].sae, saes[1].sae, x, **options)
    written = write_report(found, names, about, args.out)
    if can_plot("plot"):
        written.append(plot(found, names, args.out))
    written.append(args.out / COMPARISON_PAGE)
    shown = (shown_name(names[0]), shown_name(names[1]))
    where = args.activations and shown_name(str(args.activations))
    write_text(written[-1], comparison_page(found, shown, where, looks))
    print(table(found.summary(), names))
    for path in written:
        print(path)


def _look(given: Path | None, name: str, found: Published, out: Path) -> LookLink | None:
    """The page of an SAE, given or in its folder; one there that is of something else is left out, which is said."""
    path = given or Path(name) / PAGE
    if given is None and not path.is_file():
        return None
    try:
        look = LookLink.read(path, out)
        if look.d_sae != found.sae.cfg.d_sae:
            raise ValueError(
                f"{path}: is the page of an SAE of {look.d_sae} features, {name} has {found.sae.cfg.d_sae}"
            )
    except ValueError as error:
        if given is not None:
            raise
        print(f"{error}: no links to it", flush=True)
        return None
    return look


def _check_own(folder: Path, about: dict[str, Any]) -> None:
    """ValueError where the comparison of two other SAEs, or files of something else, would be replaced."""
    if (folder / SUMMARY).is_file():
        then = read_json(folder / SUMMARY)
        if any(then.get(name) != value for name, value in about.items()):
            on = f" on {then['activations']}" if then.get("activations") else ""
            raise ValueError(f"{folder}: holds the comparison of {then.get('a')} and {then.get('b')}{on}; name another")
        return
    for name in (TABLE, MATCHES, PLOT, COMPARISON_PAGE):
        if (folder / name).exists():
            raise ValueError(f"{folder / name}: is of no comparison and would be replaced; name another folder")


def _check_together(saes: list[Published], args: argparse.Namespace) -> None:
    a, b = saes
    if a.sae.cfg.width_out != b.sae.cfg.width_out:
        raise ValueError(f"{args.b}: its decoder rows are {b.sae.cfg.width_out} wide, those of {args.a} "
                         f"{a.sae.cfg.width_out}")  # fmt: skip
    check_same_origin(args.b, b, {"model": a.origin.model_name, "layer": block(a)}, args.insist, f"{args.a} reads")


def _activations(saes: list[Published], args: argparse.Namespace) -> torch.Tensor:
    """Those held out; of a store without them the first ones of training."""
    store = ActivationStore.open(args.activations)
    for source, found in zip((args.a, args.b), saes):
        if found.sae.cfg.is_transcoder:
            raise ValueError(f"{source}: is a transcoder, whose reconstructions are of other activations; leave out "
                             "--activations")  # fmt: skip
    given = {"model": store.manifest.get("model"), "layer": store.manifest.get("layer")}
    for source, found in zip((args.a, args.b), saes):
        if found.sae.cfg.d_in != store.d_in:
            raise ValueError(f"{source}: d_in={found.sae.cfg.d_in}, but the activations in {store.folder} have "
                             f"{store.d_in}")  # fmt: skip
        check_same_origin(source, found, given, args.insist)
    if store.manifest.get("holdout"):
        return store.holdout()[0]
    print(f"{args.activations} has no held-out part: codes are compared on activations of the training")
    return store.first(CALIBRATION_TOKENS)
