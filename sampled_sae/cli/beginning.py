"""Where a training begins: its activations, and the SAE that `--init-from` names."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .. import formats
from ..config import INFERENCES, POOLS, SELECTS
from ..formats import circuit_tracer
from ..pretrained import FORMAT
from ..sae import SampledSAE
from ..support.argument_checks import SCORES
from ..training.activations import Activations
from ..training.joined_activations import PairedActivations, StackedActivations
from ..training.opening import as_activations
from ..training.sae_group import Opened
from .arguments import pool_multiplier

# the rule of an SAE that begins with drawn weights
RULE: dict[str, Any] = {"features": 8192, "k": 32.0, "l": None, "score": "l2", "pool": "top", "select": "batch"}
RULE |= {"inference": "threshold", "inference_pool": None}
# options that do nothing without a pool, and what leaves it as it is
OF_POOL: dict[str, Any] = {"score": "l2", "pool": "top", "pool_every": 1, "score_tokens": 1.0}


def activations_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "activations",
        help="folder written by harvest, of one place, or of two for a transcoder, or by ActivationStore.write; or a "
        ".npy, .safetensors[:NAME] or .pt[:NAME] file "
        "of a tensor [n, d]; or a URL of either that fsspec knows",
    )
    p.add_argument(
        "--holdout",
        type=int,
        default=None,
        help="of a file: tokens, the last ones, kept for evaluation; none when absent",
    )
    p.add_argument(
        "--targets",
        default=None,
        help="what a transcoder reconstructs, of the same tokens, as `activations`, which it reads; makes a transcoder",
    )
    p.add_argument(
        "--beside",
        nargs="+",
        metavar="ACTIVATIONS",
        default=None,
        help="other layers, or other models, of the same tokens, as `activations`; makes a crosscoder, which reads all",
    )


def open_activations(args: argparse.Namespace) -> Activations:
    """What the argument `activations` names, with that of `--targets` or those of `--beside` beside it.

    Raises:
        ValueError: both options.
    """
    if args.beside is not None and args.targets is not None:
        raise ValueError(f"--beside {' '.join(args.beside)}: is of a crosscoder, --targets of a transcoder; give one")
    if args.beside is not None:
        return StackedActivations([args.activations, *args.beside], args.holdout)
    if args.targets is not None:
        return PairedActivations(args.activations, args.targets, args.holdout)
    return as_activations(args.activations, args.holdout)


def rule_arguments(p: argparse.ArgumentParser) -> None:
    """The options of `RULE`, absent from what is parsed unless they are given, and `--init-from`."""
    p.add_argument(
        "--init-from",
        type=Path,
        default=None,
        help="folder of an SAE whose weights the training begins with: ours, or of SAELens, dictionary_learning or "
        "sparsify; its rule is taken where no option says another",
    )
    kinds: dict[str, dict[str, Any]] = {
        "features": {"type": int, "help": "d_sae"},
        "k": {"type": float, "help": "average active features a token"},
        "l": {"type": pool_multiplier, "help": "pool multiplier, or none for BatchTopK / TopK"},
        "score": {"choices": SCORES, "help": "what ranks the features of a batch"},
        "pool": {"choices": POOLS, "help": "highest scores, or a draw in proportion to them"},
        "select": {"choices": SELECTS, "help": "budget for the batch or for each token"},
        "inference": {"choices": INFERENCES, "help": "how evaluation mode selects features"},
        "inference_pool": {
            "type": int,
            "help": "features in the set of --inference pool, a batch's when None",
        },
    }
    for name, how in kinds.items():
        absent = f"{how.pop('help')}; that of --init-from when absent, or {RULE[name]}"
        p.add_argument(f"--{name.replace('_', '-')}", default=argparse.SUPPRESS, help=absent, **how)


def initial_sae(args: argparse.Namespace) -> SampledSAE | None:
    """The SAE that `--init-from` names.

    Raises:
        ValueError: no SAE in that folder, or one that is not to be trained.
    """
    if args.init_from is None:
        return None
    found = formats.detect(args.init_from)
    if found is None:
        known = ", ".join(formats.FORMATS)
        of_set = "; `sampled-sae import` takes one out of circuit-tracer's files"
        known += of_set if (args.init_from / circuit_tracer.CONFIG).is_file() else ""
        raise ValueError(f"init_from={args.init_from}: holds no SAE of this package, nor one of {known}")
    if found == FORMAT:
        return SampledSAE.from_pretrained(args.init_from)
    return formats.load(args.init_from, k=getattr(args, "k", None), rescale_features=True)


def check_same_kind(args: argparse.Namespace, initial: SampledSAE | None, store: Opened) -> None:
    """ValueError where the SAE to begin with reads or reconstructs something else than the activations have."""
    kinds = (("d_in", ""), ("d_out", "; --targets makes a transcoder"), ("layers", "; --beside makes a crosscoder"))
    for name, makes in kinds:
        if initial is not None and getattr(initial.cfg, name) != getattr(store, name):
            have, found = getattr(initial.cfg, name), getattr(store, name)
            raise ValueError(f"init_from={args.init_from}: has {name}={have}, and {store.where} {found}{makes}")


def rule_of(args: argparse.Namespace, initial: SampledSAE | None) -> dict[str, Any]:
    """The fields of a config that `RULE` names: as given, else those of the SAE to begin with, else the defaults.

    Raises:
        ValueError: options of a pool for an SAE that has none.
    """
    given = {name: getattr(args, name) for name in RULE if hasattr(args, name)}
    if initial is None:
        found, more = RULE, dict[str, Any]()
    else:
        about = initial.cfg
        found = {name: getattr(about, "d_sae" if name == "features" else name) for name in RULE}
        more = {"apply_b_dec_to_input": about.apply_b_dec_to_input, "skip": about.skip}
        if given.get("features", about.d_sae) == about.d_sae:  # of another size they are no groups
            more["groups"] = about.groups
    rule = {**found, **given, **more}
    if rule["l"] is None:
        of_pool = {name: getattr(args, name, plain) for name, plain in OF_POOL.items()}
        for name, value in of_pool.items():
            if value != OF_POOL[name] or name in given:
                raise ValueError(f"{name}={value!r}: is of a pool, and without l there is none; give --l a number too")
    return {"d_sae": rule.pop("features"), **rule}
