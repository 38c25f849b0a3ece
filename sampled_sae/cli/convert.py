"""`sampled-sae export` and `import`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .. import formats
from ..data import ActivationStore
from ..files import read_json
from ..pretrained import FORMAT
from ..sae import SampledSAE
from .arguments import Command


def add(command: Command) -> None:
    p = command("export", export, "Write a trained SAE in the files of SAELens, dictionary_learning or sparsify.")
    p.add_argument("sae", type=Path, help="folder of a trained SAE")
    p.add_argument("out", type=Path, help="folder to write to; sparsify names it after the hook, as layers.5")
    p.add_argument("--to", choices=formats.FORMATS, required=True, help="whose files")
    p.add_argument(
        "--inference",
        choices=formats.INFERENCE,
        default="auto",
        help="what the other library's encode does: activations above the threshold, or the k largest of each token; "
        "auto is topk for a TopK SAE and threshold for all others",
    )
    p.add_argument("--k", type=int, default=None, help="in place of the SAE's k, where that is a fraction")
    scale = p.add_mutually_exclusive_group()
    scale.add_argument(
        "--scale", type=float, default=1.0, help="the SAE was trained on activations times this: fold it in"
    )
    scale.add_argument(
        "--activations", type=Path, default=None, help="folder written by harvest, whose scale is folded in"
    )
    p.add_argument("--model-name", default=None, help="recorded; that of the training when absent")
    p.add_argument("--layer", type=int, default=None, help="recorded; that of the training when absent")
    p.add_argument("--hook-name", default=None, help="recorded; blocks.LAYER.hook_resid_post when absent")

    p = command("import", import_, "Write an SAE of SAELens, dictionary_learning or sparsify as one of ours.")
    p.add_argument("folder", type=Path, help="folder with the other library's files")
    p.add_argument("out", type=Path, help="folder for config.json and sae.safetensors")
    p.add_argument(
        "--from", dest="format", choices=formats.FORMATS, default=None, help="whose files; found by them when absent"
    )
    p.add_argument("--k", type=float, default=None, help="mean active features a token, where the files lack it")
    p.add_argument(
        "--scale",
        type=float,
        default=None,
        help="the SAE shall be fed activations times this; when absent, what export folded in is undone",
    )
    p.add_argument("--rescale-features", action="store_true", help="turn a threshold for each feature into one for all")


def export(args: argparse.Namespace) -> None:
    sae = SampledSAE.from_pretrained(args.sae)
    run = args.sae / "run.json"
    trained: dict[str, Any] = read_json(run)["activations"] if run.is_file() else {}
    scale = args.scale
    if args.activations is not None:
        scale = ActivationStore.open(args.activations).scale
    if scale == 1 and trained.get("scale", 1) != 1:
        print(f"the SAE was trained on activations times {trained['scale']!r} and expects them so; --scale folds it in")
    origin = formats.Origin(
        model_name=trained.get("model") if args.model_name is None else args.model_name,
        layer=trained.get("layer") if args.layer is None else args.layer,
        hook_name=args.hook_name,
        context_size=trained.get("context"),
    )
    written = formats.export(
        sae, args.out, to=args.to, inference=args.inference, k=args.k, scale=scale, origin=origin, say=print
    )
    for path in written:
        print(path)


def import_(args: argparse.Namespace) -> None:
    found = formats.detect(args.out)
    if found not in (None, FORMAT):
        raise ValueError(f"{args.out}: holds an SAE in the format {found!r}; import to another folder")
    sae = formats.load(
        args.folder, args.format, k=args.k, scale=args.scale, rescale_features=args.rescale_features, say=print
    )
    sae.save_pretrained(args.out)
    print(f"{sae}, threshold {float(sae.threshold):.6g}, in {args.out}")
