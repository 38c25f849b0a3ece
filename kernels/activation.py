"""What the kernels share of a = relu(x @ W.T + b) * scale: tiles of the product, and the activation.

FLOPs: 2d an entry. Bytes, at the least: the rows of x and of W that a tile multiplies. Features lie on M and
tokens on N, so that a sum over tokens stays inside a thread up to a last shuffle. Kernels that must agree to
the bit take their tiles from here in one configuration.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from sampled_sae.kernels.interpreter import INTERPRETED, dot_operand

FAST_LOG = torch.version.hip is None and not INTERPRETED.value


@triton.jit
def tile_of_block(pid, n_features, n_tokens, GROUP: tl.constexpr):
    """Take GROUP feature tiles through all token tiles before the next group, whose weights stay in L2."""
    first = pid // (GROUP * n_tokens) * GROUP
    size = tl.minimum(n_features - first, GROUP)
    at = pid % (GROUP * n_tokens)
    return first + at % size, at // size


@triton.jit
def product_tile(
    x, W, b_t, b_f, stride_x, stride_W, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr
):
    """Rows b_f of W times rows b_t of x, [BM, BN]; all of them must exist."""
    o_d = tl.arange(0, BD)  # [BD]
    p_W = W + b_f.to(tl.int64)[:, None] * stride_W + o_d[None, :]  # [BM, BD]
    p_x = x + b_t.to(tl.int64)[None, :] * stride_x + o_d[:, None]  # [BD, BN]
    b_z = tl.zeros([BM, BN], dtype=tl.float32)  # [BM, BN]
    for i in range(0, D, BD):
        if D % BD == 0:
            b_W = tl.load(p_W)  # [BM, BD]
            b_x = tl.load(p_x)  # [BD, BN]
        else:
            b_W = tl.load(p_W, mask=o_d[None, :] < D - i, other=0.0)  # [BM, BD]
            b_x = tl.load(p_x, mask=o_d[:, None] < D - i, other=0.0)  # [BD, BN]
        b_z = tl.dot(dot_operand(b_W), dot_operand(b_x), b_z, input_precision="ieee")  # [BM, BN]
        p_W += BD
        p_x += BD
    return b_z


@triton.jit
def activation(b_z, b, scale, o_f, m_f, HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr):
    """relu(z + b) * scale for the features o_f, in a shape that broadcasts to z's; b and scale are 0 outside m_f."""
    if HAS_BIAS:
        b_z += tl.load(b + o_f, mask=m_f, other=0.0).to(tl.float32)  # as z
    b_a = tl.maximum(b_z, 0.0, propagate_nan=tl.PropagateNan.ALL)  # as z
    if HAS_SCALE:
        b_a *= tl.load(scale + o_f, mask=m_f, other=0.0).to(tl.float32)  # as z
    return b_a


@triton.jit
def before_relu(b_z, b, scale, o_f, m_f, HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr):
    """(z + b) * scale, as `activation` without its relu."""
    if HAS_BIAS:
        b_z += tl.load(b + o_f, mask=m_f, other=0.0).to(tl.float32)  # as z
    if HAS_SCALE:
        b_z *= tl.load(scale + o_f, mask=m_f, other=0.0).to(tl.float32)  # as z
    return b_z


@triton.jit
def spread_of(norms, errors, of_norms, of_errors, of_bias, o_t, m_t, o_f, m_f):
    """How far what is seen of z + b may be from it: for tokens o_t and features o_f, in shapes that broadcast."""
    b_s = tl.load(norms + o_t, mask=m_t, other=0.0) * tl.load(of_norms + o_f, mask=m_f, other=0.0)
    b_s += tl.load(errors + o_t, mask=m_t, other=0.0) * tl.load(of_errors + o_f, mask=m_f, other=0.0)
    return b_s + tl.load(of_bias + o_f, mask=m_f, other=0.0)


@triton.jit
def times_log2(b_a, FAST_LOG: tl.constexpr):
    """a * log2(a), 0 at 0: the clamp is the smallest normal number, below it the fast log gives -inf."""
    b_z = tl.maximum(b_a, 1.1754943508222875e-38)
    if FAST_LOG:
        return b_a * libdevice.fast_log2f(b_z)
    else:
        return b_a * tl.log2(b_z)
