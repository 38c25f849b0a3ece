"""`parallelize`: spreads a layer over a mesh; `accounted`: its processes fail together."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from ..sae import SampledSAE
from ..support.all_ranks import DIMENSIONS, ranks_of
from .layout import MeshLayout
from .mesh import Mesh
from .weights import FEATURES, Weights


def parallelize(sae: SampledSAE, mesh: DeviceMesh) -> SampledSAE:
    """Spreads an SAE over the processes of a mesh, in place, and returns it.

    R processes that call it with their own tokens x_0 .. x_(R-1), [B_r, d_in], some of them empty, then compute what
    one would on `torch.cat([x_0, ..., x_(R-1)])`: pool, kept entries with their ties, loss, gradients, threshold and
    counts of dead features. Losses are those of all tokens, `x_hat` and `codes` those of the tokens here.

    - Parameters, `tokens_since_active` and the moments of `RowAdam` become DTensors: replicated over the dimension
      `data`, where tokens are split, and split by features over `feature`, where all processes are given the same
      tokens. Their values are those of the first process that holds them. Make optimizers afterwards.
    - After `backward()` gradients are those of all tokens: rows with `cfg.row_grads`, else dense, for any optimizer.
    - All processes screen a batch, or none; `cfg.screen="auto"` goes by the mean of their tokens.
    - All processes have to make the same calls in the same order.

    Args:
        sae: on the device of this process, not wrapped in DistributedDataParallel or FSDP.
        mesh: a DeviceMesh with the dimensions "data" and "feature", or one of them. Of a single process it leaves the
            SAE as it is.

    Equivalent on one process to `sae`.

    Raises:
        TypeError, ValueError: naming the argument; `cfg.impl="reference"`, which is for one process.
    """
    if not isinstance(sae, SampledSAE):
        raise TypeError(f"sae={type(sae).__name__}: must be a SampledSAE (of a wrapped one, the module inside)")
    check_mesh(mesh)
    if sae.layout.size > 1:
        raise ValueError(f"sae: is spread over {sae.layout.size} processes already")
    if mesh.device_type != sae.W_enc.device.type:
        raise ValueError(f"mesh.device_type={mesh.device_type!r}: the SAE is on {sae.W_enc.device}")
    if sae.impl_in_use == "reference":
        raise ValueError("impl='reference': is for one process; use 'torch' or 'triton'")
    if mesh.size() == 1:
        return sae
    own = Mesh(mesh)
    weights = Weights(sae.cfg.width_in, sae.cfg.d_sae, sae.cfg.width_out, own)
    with torch.no_grad():
        for name, parameter in list(sae.named_parameters()):
            part = weights.wrap(name, weights.part_of(name, parameter))
            setattr(sae, name, nn.Parameter(part, requires_grad=parameter.requires_grad))
        for name, buffer in list(sae.named_buffers()):
            part = weights.part_of(name, buffer)
            setattr(sae, name, weights.wrap(name, part) if name in FEATURES else part)
    state = sae.generator.get_state().to(sae.W_enc.device)
    for ranks in (own.data, own.feature):
        ranks.from_(state)
    sae.generator.set_state(state.cpu())
    sae.row_grads = []
    sae.memory.forget()
    sae.layout = MeshLayout(own, weights)
    return sae


def check_mesh(mesh: DeviceMesh) -> None:
    """TypeError or ValueError, naming what is wrong."""
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f"mesh={type(mesh).__name__}: must be a torch.distributed.device_mesh.DeviceMesh")
    names = mesh.mesh_dim_names or ()
    if not names or not set(names) <= set(DIMENSIONS):
        raise ValueError(f"mesh.mesh_dim_names={mesh.mesh_dim_names!r}: must be among {DIMENSIONS!r}")


def accounted(mesh: DeviceMesh) -> AbstractContextManager[None]:
    """Around a loop of your own over the processes of a mesh: where one of them fails, the others say of what.

    The process that fails first raises its own error. Another, whose next exchange with it breaks (over NCCL: is given
    up), raises one that begins with that rank and has its reason, or says that it is no longer there. Then the
    processes end: there is one such account in the life of a process group. `Trainer`, `SAEGroup`, `harvest` and the
    commands do so by themselves.

    Args:
        mesh: a DeviceMesh with the dimensions "data" and "feature" or one of them, of all processes there are; each of
            them calls this.

    Raises:
        TypeError, ValueError: another mesh.
        RuntimeError: inside, that.
    """
    check_mesh(mesh)
    return ranks_of(mesh).accounted()
