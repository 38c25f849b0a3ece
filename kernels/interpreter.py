"""Defects of Triton's interpreter (TRITON_INTERPRET=1, versions 3.6 to 3.9), worked around here.

- `tl.dot` of bf16 operands is silently wrong: `dot_operand` upcasts them to fp32, which is exact.
- fp32 to bf16 truncates: `rounded` rounds to nearest even first, as a GPU does.
- libdevice is missing: launchers turn FAST_LOG off.
- A `for` with a run-time bound fails with numpy >= 2.4 up to Triton 3.6: bounds are constexprs, or made by
  `loop_bound`, or it is a `while`.
- A constexpr plus or minus a tensor remains a constexpr in Triton 3.8, which functions refuse: the tensor comes first.
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dot_operand(b_t):
    if INTERPRETED and b_t.dtype == tl.bfloat16:
        return b_t.to(tl.float32)
    return b_t


@triton.jit
def rounded(b_t, dtype: tl.constexpr):
    """fp32 to `dtype`, a NaN aside."""
    if INTERPRETED and dtype == tl.bfloat16:
        b_u = b_t.to(tl.int32, bitcast=True)
        b_t = ((b_u + 0x7FFF + ((b_u >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    return b_t.to(dtype)


def loop_bound(n: int) -> int | tl.constexpr:
    """A number that a kernel takes as an argument and only counts up to."""
    return tl.constexpr(n) if INTERPRETED.value else n
