"""Two places of a language model, by the options that `harvest` and `train --model` share."""

from __future__ import annotations

import argparse
from typing import Any


def place_arguments(p: argparse.ArgumentParser, when: str = "") -> None:
    """`--mlp` and `--points`; `when` begins their help."""
    p.add_argument(
        "--mlp",
        action="store_true",
        help=f"{when}what the MLP of --layer reads and what it writes, for a transcoder: activations with targets",
    )
    p.add_argument(
        "--points",
        nargs=2,
        metavar=("READ", "TARGET"),
        default=None,
        help=f"{when}the same of any two places, without --layer: MODULE:in or MODULE:out, as model.layers.3.mlp:in",
    )


def pair_of(args: argparse.Namespace, skeleton: Any, layers: list[int]) -> tuple[Any, Any] | None:
    """The two places, as HookPoints; None where neither option is given.

    Raises:
        ValueError: a place that the model, of which `skeleton` has no weights, has not.
    """
    from ..residual_stream.hook_points import HookPoint, mlp_points

    if args.mlp:
        return mlp_points(skeleton, layers[0])
    if args.points is None:
        return None
    read, target = map(HookPoint.parse, args.points)
    for point in (read, target):
        point.of(skeleton)
    return read, target
