"""Options that several commands share, and numbers as options take them."""

from __future__ import annotations

import argparse
import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..formats.published import LAYOUTS
from ..support.argument_checks import LARGEST_INTEGER, check_device

if TYPE_CHECKING:
    from .parser import Parser

# (name, what to run, one line of help) to the command's parser
Command = Callable[[str, Callable[[argparse.Namespace], int | None], str], "Parser"]

DTYPES = ("float32", "bfloat16", "float16")
# far beyond any machine; with too many the system ends the process
MOST_THREADS = 1024


def whole_number(text: str) -> int:
    """A whole number of at most 64 bits."""
    try:
        value = int(text)
    except ValueError:
        raise refusal(text, "must be a whole number") from None
    if abs(value) > LARGEST_INTEGER:
        raise refusal(text, "must be a whole number below 2^63")
    return value


def number(text: str) -> float:
    """A number that is neither NaN nor infinite."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise refusal(text, "must be a finite number")
    return value


def pool_multiplier(text: str) -> float | None:
    """A number, or None for "none"."""
    if text.lower() == "none":
        return None
    try:
        return number(text)
    except argparse.ArgumentTypeError:
        raise refusal(text, "must be a finite number or none") from None


def seed(text: str) -> int:
    """A whole number from 0."""
    value = whole_number(text)
    if value < 0:
        raise refusal(text, "must be a whole number >= 0")
    return value


def threads(text: str) -> int:
    """As many as a process can have."""
    value = whole_number(text)
    if not 1 <= value <= MOST_THREADS:
        raise refusal(text, f"must be from 1 to {MOST_THREADS}")
    return value


def listed(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """Comma-separated values of a kind."""

    def parse(text: str) -> list[Any]:
        return [kind(part.strip()) for part in text.split(",")]

    return parse


def refusal(text: str, allowed: str) -> argparse.ArgumentTypeError:
    """The error for an option's value; of a very long one its beginning is shown."""
    shown = text if len(text) <= 40 else text[:37] + "..."
    return argparse.ArgumentTypeError(f"{shown!r}: {allowed}")


def added_since(p: argparse.ArgumentParser, before: list[argparse.Action]) -> dict[str, Any]:
    """Of the options added to those `before`: where a value is kept -> what argparse gives where it is absent."""
    return {action.dest: _absent(action) for action in p._actions if action not in before}


def _absent(action: argparse.Action) -> Any:
    """A default in words goes through its type."""
    found = action.default
    return action.type(found) if isinstance(found, str) and callable(action.type) else found


def check_not_given(args: argparse.Namespace, absent: dict[str, Any], why: str) -> None:
    """ValueError with the value and `why` it is of no use, where one of these options was given."""
    for name, default in absent.items():
        if (value := getattr(args, name)) != default:
            raise ValueError(f"{name}={str(value) if isinstance(value, Path) else repr(value)}: {why}")


def can_plot(what: str) -> bool:
    """Whether matplotlib is there; a line says that there is no such plot, or are no plots, where it is not."""
    if importlib.util.find_spec("matplotlib") is not None:
        return True
    print(f'No {what} without matplotlib: pip install "sampled-sae[plot]"', flush=True)
    return False


def model_arguments(p: argparse.ArgumentParser, default: str | None = "smollm2-135m", absent: str = "") -> None:
    """`absent` says in the help what is taken where there is no default."""
    p.add_argument(
        "--model",
        default=default,
        help=f"{absent}a Hugging Face causal model or encoder by name or folder, or one whose weights come in "
        "packages: smollm2-135m, gemma3-270m, all-mpnet-base-v2 (an encoder)",
    )
    p.add_argument("--cache", type=Path, default=None, help="folder for converted models")
    p.add_argument("--model-dtype", choices=DTYPES, default="float32", help="of the model's weights")
    p.add_argument(
        "--model-device",
        default=None,
        help="cpu, cuda or cuda:N, of several processes cuda gives each its own; auto, balanced, balanced_low_0 or "
        "sequential spread the model over the devices there are. When absent that of --device where the model feeds an "
        "SAE, else cpu",
    )


def loaded_model(name: str, args: argparse.Namespace, device: str = "cpu") -> Any:
    """The language model of these options.

    device: where none is given.
    """
    from ..lm import load_model
    from ..lm.models import SPREAD

    if args.model_device not in (None, *SPREAD):
        try:
            check_device(args.model_device)
        except ValueError as error:
            raise ValueError(f"model_{error}, or one of {', '.join(SPREAD)}") from None
    return load_model(name, args.cache, args.model_dtype, args.model_device or device)[0]


def published_arguments(p: argparse.ArgumentParser) -> None:
    """How an SAE in any layout is read."""
    p.add_argument("--at", default=None, help="folder or file inside it, as layer_12/width_16k/average_l0_82")
    p.add_argument("--layout", choices=tuple(LAYOUTS), default=None, help="of its files; found by them when absent")
    p.add_argument("--k", type=int, default=None, help="features a token, where no file says it")


def place_arguments(p: argparse.ArgumentParser, when: str = "") -> None:
    """`--mlp` and `--points`, two places of a language model; `when` begins their help."""
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


def places_in_words(layers: list[int], points: tuple[Any, Any] | None) -> str:
    if points is not None:
        return f"{points[0]} and {points[1]}"
    return f"layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))}"


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
