"""`SAEGroup`: several SAEs trained side by side on the same activations."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Union

import torch

from ..config import SampledSAEConfig
from ..sae import SampledSAE
from ..support.all_ranks import ranks_of
from .activation_stream import StreamedActivations
from .activations import Activations
from .feed import Feed
from .fitting import check_width
from .opening import Readable, as_readable
from .sharded_checkpoint import lanes_of
from .train_config import TrainConfig
from .training_loop import train_to_end
from .training_run import TrainingRun

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Opened = Union[Activations, StreamedActivations]  # noqa: UP007  (evaluated at import)
_FOLDER_NAME = re.compile(r'[^<>:"/\\|?*\x00-\x1f]*[^<>:"/\\|?*\x00-\x1f. ]')
_DEVICES = ("CON", "PRN", "AUX", "NUL", *(f"{port}{i}" for port in ("COM", "LPT") for i in range(1, 10)))


class SAEGroup:
    """Trains a SampledSAE for each of several configs in one process.

    The members share each batch (read, shuffled and moved to the device once), its variance, the geometric median
    that b_dec starts from, and the tokens that calibrate the thresholds. They do not share the encoder product.
    Each writes to `folder`/name the files that `Trainer` writes, equal bit for bit to those of a `Trainer` with the
    same config, TrainConfig and store. The weights and optimizer states of all members are in memory at once.

    Started again after a kill, a group goes on from the checkpoints; members that are ahead wait for the others.

    Args:
        configs: name -> config; all fields may differ, d_in where each member has a store of its own width.
        train: how all of them are trained. Its seed sets the order of the tokens, a config's seed the first weights.
        stores: activations for all members, as `Trainer` takes them, or name -> activations, such as one store for
            each layer.
        folder: where the members' folders are.
        device: where they are trained.
        mesh: as in Trainer; every member is trained by all its processes.

    Attributes:
        members: name -> TrainingRun.

    Raises:
        ValueError: no configs, a name that cannot be a folder's, stores for other names than the configs have;
            with the member's name, what Trainer raises.
    """

    def __init__(
        self,
        configs: dict[str, SampledSAEConfig],
        train: TrainConfig,
        stores: Readable | dict[str, Readable],
        folder: str | Path,
        device: torch.device | str = "cpu",
        mesh: DeviceMesh | None = None,
    ) -> None:
        ranks = ranks_of(mesh)
        self.config = train
        self.folder = Path(folder)
        self.members: dict[str, TrainingRun] = {}
        with ranks.accounted():
            with ranks.together():
                opened = _opened_stores(stores, configs)
                check_configs(configs, opened)
            feeds: dict[Hashable, Feed] = {}
            lanes = lanes_of([self.folder / name for name in configs], ranks, None)
            for name, config in configs.items():
                store = opened[name]
                try:
                    if store.place not in feeds:
                        feeds[store.place] = Feed(
                            store, train.batch_size, train.seed, device, ranks, lanes, train.steps
                        )
                    self.members[name] = TrainingRun(config, train, feeds[store.place], self.folder / name)
                except ValueError as error:
                    raise ValueError(f"configs[{name!r}]: {error}") from error

    @property
    def step(self) -> int:
        """Steps that every member has done."""
        return min(member.step for member in self.members.values())

    def run(self, progress: bool = True) -> dict[str, SampledSAE]:
        """Trains all to the end, calibrates, saves; returns name -> SAE, in evaluation mode.

        Raises:
            FloatingPointError: a member's loss is NaN or inf; names member and step. All checkpoints stay.
        """
        train_to_end(self.members, progress)
        return {name: member.sae for name, member in self.members.items()}


def _opened_stores(stores: Readable | dict[str, Readable], names: Iterable[str]) -> dict[str, Opened]:
    """By name what a training reads; what several names share is opened once."""
    if not isinstance(stores, dict):
        return dict.fromkeys(names, as_readable(stores))
    found = {id(store): as_readable(store) for store in stores.values()}
    return {name: found[id(store)] for name, store in stores.items()}


def check_configs(configs: dict[str, SampledSAEConfig], stores: dict[str, Opened]) -> None:
    """ValueError unless the names can be those of folders on any system, and each config fits its store."""
    if not configs:
        raise ValueError(f"configs={configs!r}: must name at least one SampledSAEConfig")
    for name in configs:
        if not _FOLDER_NAME.fullmatch(name) or name.split(".")[0].upper() in _DEVICES:
            raise ValueError(
                f'configs[{name!r}]: the name must be that of a folder: without separators, any of < > : " | ? *, a '
                "point or space at its end, and none that Windows keeps for devices"
            )
    if len({name.casefold() for name in configs}) < len(configs):
        raise ValueError(f"configs={sorted(configs)}: names must differ by more than case, which some systems ignore")
    if set(stores) != set(configs):
        missing, unknown = sorted(set(configs) - set(stores)), sorted(set(stores) - set(configs))
        raise ValueError(
            f"stores={sorted(stores)}: must name the members {sorted(configs)}; missing {missing}, unknown {unknown}"
        )
    for name, config in configs.items():
        try:
            check_width(config, stores[name])
        except ValueError as error:
            raise ValueError(f"configs[{name!r}]: {error}") from error
