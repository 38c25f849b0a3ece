"""Parameters, buffers and moments as DTensors: replicated over `data`, split by features over `feature`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from ..config import MEMBERS
from ..pretrained import SKIP
from ..support.tensor_file import Piece
from .mesh import Mesh

NAMES = ("W_enc", "b_enc", "W_dec", "b_dec")
# which dimension of a tensor counts features
FEATURES = {"W_enc": 1, "b_enc": 0, "W_dec": 0, "tokens_since_active": 0, MEMBERS: 0}


class Weights:
    """Which features are here, and how a tensor of theirs is told apart from a whole one.

    Attributes:
        n_features: F of all processes. first, n_local: the features here are first .. first + n_local - 1.
        most_local, least_local: how many any process has at most and at least. shapes: of whole tensors by name.
    """

    def __init__(self, d_in: int, n_features: int, d_out: int, mesh: Mesh) -> None:
        self.mesh = mesh
        self.n_features = n_features
        # as DTensor splits: so many each, the rest to the last
        self.most_local = -(-n_features // mesh.feature.size)
        if self.most_local * (mesh.feature.size - 1) >= n_features:
            raise ValueError(
                f"d_sae={n_features}: cannot be split over {mesh.feature.size} processes of the dimension 'feature' in "
                f"ranges of {self.most_local}; use fewer, or more features"
            )
        self.least_local = self._range(mesh.feature.size - 1)[1]
        self.first, self.n_local = self._range(mesh.feature.rank)
        self.shapes = {
            "W_enc": torch.Size((d_in, n_features)),
            "W_dec": torch.Size((n_features, d_out)),
            "b_dec": torch.Size((d_out,)),
            SKIP: torch.Size((d_in, d_out)),
            **dict.fromkeys(("b_enc", "tokens_since_active", MEMBERS), torch.Size((n_features,))),
        }

    def local(self, t: Tensor) -> Tensor:
        """What of a DTensor is here, on the same memory; another tensor as it is. Detached."""
        if not isinstance(t, DTensor):
            return t.detach()
        with torch.no_grad():
            return t.to_local()

    def wrap(self, name: str, rows: Tensor) -> Tensor:
        """A DTensor of the kind of `name` from its part here, features first (those of W_enc: [F, d])."""
        shape = self.shapes[name]
        in_memory = torch.empty(shape[::-1] if name == "W_enc" else shape, device="meta")
        stride = (in_memory.t() if name == "W_enc" else in_memory).stride()
        local = rows.t() if name == "W_enc" else rows
        at, mesh = FEATURES.get(name), self.mesh.device_mesh
        dimensions = mesh.mesh_dim_names or ()
        placements = [Shard(at) if at is not None and dim == "feature" else Replicate() for dim in dimensions]
        return DTensor.from_local(local, mesh, placements, run_check=False, shape=shape, stride=stride)

    def part_of(self, name: str, whole: Tensor) -> Tensor:
        """A copy of the part of a whole tensor that belongs here, features first; equal on all that hold it."""
        rows = whole.detach().t() if name == "W_enc" else whole.detach()
        part = rows[self.first : self.first + self.n_local] if name in FEATURES else rows
        part = part.clone(memory_format=torch.contiguous_format)
        self.mesh.data.from_(part)
        return part if name in FEATURES else self.mesh.feature.from_(part)

    def pieces(self, name: str, t: Tensor) -> Iterator[Piece]:
        """Of a whole parameter or buffer, from the process that has each; all of `feature` ask for them."""
        local = self.local(t)
        if name not in FEATURES or not isinstance(t, DTensor):
            yield Piece(name, local)
            return
        rows = local.t() if name == "W_enc" else local
        for rank in range(self.mesh.feature.size):
            first, n = self._range(rank)
            part = rows if rank == self.mesh.feature.rank else rows.new_empty(n, *rows.shape[1:])
            self.mesh.feature.from_(part, rank)
            yield Piece(name, part.t() if name == "W_enc" else part, FEATURES[name], first)

    def _range(self, rank: int) -> tuple[int, int]:
        """The first feature of a process of `feature`, and how many it has."""
        first = self.most_local * rank
        return first, min(self.most_local, self.n_features - first)
