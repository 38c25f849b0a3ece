"""Operands of a product by tensor descriptors (TMA), on GPUs that have them: tiles, and which matrices fit.

The copy engine fetches whole tiles and fills what lies outside with zeros, so no thread computes an address. Programs
are as many as there are multiprocessors and walk over the tiles: in one flattened loop the next tile's operands are
under way while the sums of this one are made.
"""

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from sampled_sae.kernels.configs import tile

# (architecture, operand bits) -> tiles as in configs.py. Of 128 x 128 shared memory feeds the matrix units of an H100
# with 80% of what they take, of 128 x 256 with all (benchmarks/costs.py counts it).
DESCRIBED = {
    ("sm_90", 16): tile(128, 256, 64, 8, 4),
    ("sm_100", 16): tile(128, 256, 64, 8, 4),
    ("interpreter", 16): tile(16, 32, 16, 4, 1),
}
# where a d of one tile, whose loop is not nested, needs more registers than there are
MORE_THAN_A_TILE = ("sm_100",)
# what a row and the first element have to be a multiple of, in bytes
ALIGNED = 16


def described_config(arch: str, x: torch.Tensor, W: torch.Tensor) -> triton.Config | None:
    """For x and W of one dtype, or None where their operands come through pointers."""
    config = DESCRIBED.get((arch, 8 * x.dtype.itemsize))
    if config is not None and arch in MORE_THAN_A_TILE and x.shape[1] <= config.kwargs["BD"]:
        return None
    return config if is_describable(x) and is_describable(W) else None


def is_describable(matrix: torch.Tensor) -> bool:
    """Whether rows begin at multiples of 16 bytes, do not overlap and hold something, each contiguous."""
    row = matrix.stride(0) * matrix.itemsize
    own = matrix.stride(0) >= matrix.shape[1] > 0 and matrix.shape[0] > 0 and matrix.stride(1) == 1
    return own and row % ALIGNED == 0 and matrix.data_ptr() % ALIGNED == 0


def described(matrix: torch.Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Its tiles of so many rows and columns."""
    return TensorDescriptor.from_tensor(matrix, [rows, columns])
