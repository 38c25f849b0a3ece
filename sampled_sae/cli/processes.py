"""A command run by several processes at once, as torchrun or SLURM starts them."""

from __future__ import annotations

import argparse
import io
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from typing import NoReturn

import torch

from ..support.all_ranks import ALONE, AllRanks
from ..support.argument_checks import check_integer, check_number
from ..support.launch import Launch
from ..support.meeting import TIMEOUT, start

# the commands that many processes do together
SPREAD = ("harvest", "train", "evaluate", "sweep")


class Nowhere(io.TextIOBase):
    """A stream that drops what is written, and is never closed: loggers keep it."""

    def write(self, text: str) -> int:
        return len(text)


def add_rank_options(p: argparse.ArgumentParser, shards: bool = True) -> None:
    """`shards`: for a command that has a dictionary to divide."""
    if shards:
        p.add_argument(
            "--feature-shards", type=int, default=1, help="processes of torchrun that share the features; the rest "
            "of them share the tokens"
        )  # fmt: skip
    p.add_argument(
        "--rank-timeout", type=float, default=TIMEOUT, help="seconds until a process of torchrun that does not answer "
        "is given up"
    )  # fmt: skip


@contextmanager
def unheard(launch: Launch | None) -> Iterator[None]:
    """Of several processes the first one speaks; what goes wrong with another alone is said by `main`."""
    if launch is None or launch.rank == 0:
        yield
        return
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(redirect_stdout(Nowhere()))
        stack.enter_context(redirect_stderr(Nowhere()))
        yield


def join(args: argparse.Namespace, launch: Launch | None) -> AllRanks:
    """The processes that run this command; says how they share the work.

    Raises:
        ValueError: a command for one process, feature shards without processes, more processes than GPUs.
    """
    shards = check_integer("feature_shards", getattr(args, "feature_shards", 1), 1)
    timeout = check_number("rank_timeout", getattr(args, "rank_timeout", TIMEOUT), 1, None)
    if launch is None:
        if shards > 1:
            raise ValueError(f"feature_shards={shards}: needs as many processes: torchrun --nproc-per-node {shards}")
        return ALONE
    if args.command not in SPREAD:
        raise ValueError(f"{args.command} is for one process; start it without torchrun or srun")
    # of the SAE: what --model-device places, language models, exchange no tensors
    cuda = getattr(args, "device", "cpu") == "cuda"
    for name in ("device", "model_device"):
        if getattr(args, name, None) == "cuda":
            index = gpu_of(launch, torch.cuda.device_count(), name)
            torch.cuda.set_device(index)
            setattr(args, name, f"cuda:{index}")
    ranks = start(launch, cuda, shards, timeout)
    print(f"{ranks.size} processes over {'NCCL' if cuda else 'gloo'}: {_sharing(args.command, ranks)}", flush=True)
    return ranks


def gpu_of(launch: Launch, n_visible: int, argument: str = "device") -> int:
    """Which of the GPUs that this process sees is its own; ValueError, which names the argument, where it has none."""
    if launch.local_size <= n_visible:
        return launch.local_rank
    # SLURM's --gpus-per-task shows each process its own alone
    if n_visible == 1 and "CUDA_VISIBLE_DEVICES" in os.environ:
        return 0
    raise ValueError(f"{argument}='cuda': {n_visible} GPUs for {launch.local_size} processes here")


def _sharing(command: str, ranks: AllRanks) -> str:
    """How the processes share the work."""
    if command == "harvest":
        return "each harvests other rows"
    data, shards = ranks.data[1], ranks.feature[1]
    tokens = "all see the same tokens" if data == 1 else f"the tokens of a batch in {data} parts"
    return f"{tokens}, " + ("each has all features" if shards == 1 else f"the features in {shards} shards")


def leave(status: int) -> NoReturn:
    """Ends one of several processes after an error: exchanges that are still open would be waited for."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
