"""A DeviceMesh as the layer sees it: the processes that hold other tokens, and those that hold other features."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ..support.all_ranks import DIMENSIONS
from .ranks import Ranks, Traffic


class Mesh:
    """The collectives of one layer.

    Attributes:
        device_mesh: as the caller gave it. data, feature: its dimensions; one that it lacks has a single process.
        traffic: what was sent.
    """

    def __init__(self, device_mesh: DeviceMesh) -> None:
        self.device_mesh = device_mesh
        self.traffic = Traffic()
        self.data, self.feature = (self._ranks(name) for name in DIMENSIONS)
        # numbers that the host needs travel between hosts, so that no GPU is waited for
        self._feature_hosts, self._data_hosts = (ranks.between_hosts() for ranks in (self.feature, self.data))

    @property
    def size(self) -> int:
        """Number of processes."""
        return self.data.size * self.feature.size

    @property
    def rank(self) -> int:
        """The global rank of this process."""
        return dist.get_rank()

    def sum_(self, t: Tensor, purpose: str) -> Tensor:
        """t becomes the sum over all processes."""
        return self.data.sum_(self.feature.sum_(t, purpose), purpose)

    def exchange(self, number: int, over_data: bool = True) -> list[list[int]]:
        """The numbers of all processes: a list for each rank of the data dimension, one for each of `feature`.

        over_data: else a single list, of those that share the tokens here.
        """
        numbers = self._feature_hosts.gather(torch.tensor([number], device="cpu"), "batch sizes")
        numbers = self._data_hosts.gather(numbers, "batch sizes") if over_data else numbers[None]
        return [[int(n) for n in of_rank] for of_rank in numbers.flatten(1).tolist()]

    def name_of(self, data: int, feature: int) -> str:
        """How messages name a process."""
        position = {"data": data, "feature": feature}
        names = self.device_mesh.mesh_dim_names or ()
        rank = self.device_mesh.mesh[tuple(position[name] for name in names)]
        return f"rank {int(rank)}"

    def _ranks(self, name: str) -> Ranks:
        mesh = self.device_mesh
        if name not in (mesh.mesh_dim_names or ()):
            return Ranks(name, 1, 0, None, self.traffic)
        group = mesh.get_group(name)
        return Ranks(name, group.size(), group.rank(), group, self.traffic)

    def __deepcopy__(self, memo: dict[int, object]) -> Mesh:
        return self
