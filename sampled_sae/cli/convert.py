"""`sampled-sae export` and `import`."""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace
from pathlib import Path

from .. import formats
from ..formats import circuit_tracer
from ..formats.published.ours import origin as recorded
from ..pretrained import FORMAT, ORIGIN, RUN
from ..sae import SampledSAE
from ..support.argument_checks import check_integer
from ..support.atomic_files import write_json
from ..training.activation_store import ActivationStore
from ..training.checkpoint import CHECKPOINT
from ..training.sharded_checkpoint import RECORD
from .arguments import Command


def add(command: Command) -> None:
    p = command(
        "export",
        export,
        "Write a trained SAE in the files of SAELens, dictionary_learning, sparsify or circuit-tracer.",
    )
    p.add_argument("sae", type=Path, help="folder of a trained SAE")
    p.add_argument(
        "out",
        type=Path,
        help="folder to write to; sparsify names it after the hook, as layers.5; of "
        "circuit-tracer that of a set, a transcoder a layer",
    )
    p.add_argument("--to", choices=(*formats.FORMATS, circuit_tracer.NAME), required=True, help="whose files")
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
        "--scale",
        type=float,
        default=None,
        help="what the SAE's activations are multiplied by: fold it in; its own input_scale when absent, 1 for none",
    )
    scale.add_argument(
        "--activations",
        default=None,
        help="folder of the activations, or a URL of one, whose scale is folded in",
    )
    p.add_argument("--model-name", default=None, help="recorded; that of the training when absent")
    p.add_argument("--layer", type=int, default=None, help="recorded; that of the training when absent")
    p.add_argument("--hook-name", default=None, help="recorded; blocks.LAYER.hook_resid_post when absent")

    p = command("import", import_, "Write an SAE of another library as one of ours.")
    p.add_argument("folder", type=Path, help="folder with the other library's files")
    p.add_argument("out", type=Path, help="folder for config.json and sae.safetensors")
    p.add_argument(
        "--from",
        dest="format",
        choices=(*formats.FORMATS, circuit_tracer.NAME),
        default=None,
        help="whose files; found by them when absent",
    )
    p.add_argument("--layer", type=int, default=None, help="of circuit-tracer's files: which transcoder, from 0")
    p.add_argument("--k", type=float, default=None, help="mean active features a token, where the files lack it")
    p.add_argument(
        "--scale",
        type=float,
        default=None,
        help="the SAE shall multiply activations by this; when absent, what export folded in is undone",
    )
    p.add_argument("--rescale-features", action="store_true", help="turn a threshold for each feature into one for all")


def export(args: argparse.Namespace) -> None:
    sae = SampledSAE.from_pretrained(args.sae)
    origin = recorded(args.sae)
    scale = args.scale if args.activations is None else ActivationStore.open(args.activations).layer_scale
    if args.layer is not None:
        origin = replace(origin, layer=check_integer("layer", args.layer, 0), hook_name=None)
    given = formats.Origin(model_name=args.model_name, hook_name=args.hook_name)
    origin = given.filled_by(origin)
    if args.to == circuit_tracer.NAME:
        written = _export_transcoder(args, sae, origin)
    else:
        how = {"inference": args.inference, "k": args.k, "scale": scale, "origin": origin}
        written = formats.export(sae, args.out, to=args.to, say=print, **how)
    for path in written:
        print(path)


def _export_transcoder(args: argparse.Namespace, sae: SampledSAE, origin: formats.Origin) -> list[Path]:
    """One layer of circuit-tracer's files."""
    for name in ("k", "scale", "activations", "hook_name"):
        if getattr(args, name) is not None:
            raise ValueError(f"{name}={getattr(args, name)!r}: circuit-tracer's files have no place for it")
    if origin.layer is None or origin.model_name is None:
        raise ValueError(f"layer={origin.layer}, model_name={origin.model_name!r}: must be given for circuit-tracer")
    rule = None if args.inference == "auto" else args.inference
    return circuit_tracer.export_transcoder(
        sae, args.out, origin.layer, model_name=origin.model_name, rule=rule, say=print
    )


def import_(args: argparse.Namespace) -> None:
    found = formats.detect(args.out)
    if found not in (None, FORMAT):
        raise ValueError(f"{args.out}: holds an SAE in the format {found!r}; import to another folder")
    for left in (RUN, CHECKPOINT, RECORD):
        if (args.out / left).exists():
            raise ValueError(f"{args.out}: holds {left} of an SAE that was trained there; import to another folder")
    sae, origin = _imported(args)
    sae.save_pretrained(args.out)
    write_json(args.out / ORIGIN, asdict(origin))
    print(f"{sae}, threshold {float(sae.threshold):.6g}, in {args.out}")


def _imported(args: argparse.Namespace) -> tuple[SampledSAE, formats.Origin]:
    how = {"k": args.k, "rescale_features": args.rescale_features, "say": print}
    of_set = (args.folder / circuit_tracer.CONFIG).is_file() and args.format is None
    if args.format != circuit_tracer.NAME and not of_set:
        if args.layer is not None:
            raise ValueError(f"layer={args.layer}: is of circuit-tracer's files")
        loaded = formats.read(args.folder, args.format, scale=args.scale, **how)
        return loaded.sae, loaded.origin
    there = circuit_tracer.layers_in(args.folder)
    if args.layer not in there:
        raise ValueError(f"layer={args.layer}: {args.folder} has the layers {there}; name one with --layer")
    if args.scale is not None:
        raise ValueError(f"scale={args.scale!r}: is of an SAE; a transcoder has input_scale and output_scale")
    path = args.folder / circuit_tracer.file_of(args.layer)
    return circuit_tracer.load_transcoder(args.folder, args.layer, **how), circuit_tracer.origin_of(path)
