"""Products in fp32, and the encoder's chunk by chunk of features.

A chunk [B, C] is written once and read once, in one buffer for all chunks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ...kernels.interpreter import INTERPRETED
from ..encoder import Operands

CHUNK_ELEMENTS = 1 << 25
# features a chunk, at least and at most
NARROWEST, WIDEST = (64, 64) if INTERPRETED.value else (1024, 8192)


class ProductChunk(NamedTuple):
    """The product z [B, C] for the candidates `at`, and what belongs to them.

    features: int64 [C], or the first of C in a row. The next chunk overwrites z.
    """

    at: slice
    features: Tensor | int
    z: Tensor
    b: Tensor
    scale: Tensor | None


def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a b, [M, N], accumulated and returned in fp32 whatever the inputs; equivalent to `a.float() @ b.float()`."""
    with torch.autocast(a.device.type, enabled=False):
        if a.is_cuda and a.dtype != torch.float32:
            if out is None:
                return torch.mm(a, b, out_dtype=torch.float32)
            return torch.mm(a, b, out_dtype=torch.float32, out=out)
        return torch.mm(a.float(), b.float(), out=out)


class Rounded(NamedTuple):
    """A tensor of one version in 16 bits."""

    copy: Tensor
    version: int


def note_rounded(tensor: Tensor, copy: Tensor) -> None:
    """For `lowered`: the same in 16 bits."""
    if type(tensor) is Tensor:  # and not a compiler's
        tensor.rounded = Rounded(copy, tensor._version)  # type: ignore[attr-defined]


def lowered(grad: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """A gradient as factor of a 16-bit product, and what the product is to be multiplied by; None for 1.

    What `note_rounded` knows of it is not rounded again. float16 would lose the gradient of a mean over many tokens:
    its largest entry goes to between 2^7 and 2^8.
    """
    known = getattr(grad, "rounded", None)
    if known is not None and known.version == grad._version and known.copy.dtype == dtype:
        return known.copy, None
    if dtype != torch.float16 or grad.numel() == 0:
        return grad.to(dtype), None
    exponent = 8 - torch.frexp(grad.abs().amax()).exponent.clamp(-100, 100)
    one = torch.ones((), dtype=torch.float32, device=grad.device)
    return (grad * torch.ldexp(one, exponent)).to(dtype), torch.ldexp(one, -exponent)


def raised(product: Tensor, factor: Tensor | None) -> Tensor:
    """The product of what `lowered` gave, times the factor that it gave; in place."""
    return product if factor is None else product.mul_(factor)


def chunk_width(n_tokens: int) -> int:
    """Features a chunk: a multiple of 256 (on a GPU) that keeps [B, C] near 2^25 elements."""
    return min(max(CHUNK_ELEMENTS // max(n_tokens, 1) // 256 * 256, NARROWEST), WIDEST)


def encoder_chunks(operands: Operands) -> Iterator[ProductChunk]:
    """The product of x with the rows of W chunk by chunk; with those of the candidates, where there are some."""
    for chunk in unwritten_chunks(operands):
        at, W = chunk.features, operands.W
        rows = W[chunk.at] if isinstance(at, int) else W.index_select(0, at)
        product(operands.x, rows.t(), out=chunk.z)
        yield chunk


def unwritten_chunks(operands: Operands) -> Iterator[ProductChunk]:
    """The same with a z that is not yet the product."""
    x, _, b, scale, members, *_ = operands
    n_tokens, size = operands.n_tokens, operands.n_candidates
    width = min(chunk_width(n_tokens), size)
    buffer = torch.empty(n_tokens * width, dtype=torch.float32, device=x.device)
    for start in range(0, size, max(width, 1)):
        at = slice(start, min(start + width, size))
        z = buffer[: n_tokens * (at.stop - start)].view(n_tokens, at.stop - start)
        features: Tensor | int = start if members is None else members[at]
        here = at if members is None else features
        yield ProductChunk(at, features, z, b[here], None if scale is None else scale[here])
