"""Defects of Triton's interpreter (TRITON_INTERPRET=1, versions 3.6 to 3.9), worked around here.

- `tl.dot` of bf16 operands is silently wrong: `dot_operand` upcasts them to fp32, which is exact.
- libdevice is missing: launchers turn FAST_LOG off.
- A loop with a run-time bound fails with numpy >= 2.4 up to Triton 3.6: bounds of loops are constexprs.
- Autotuning over several configurations asks for a GPU: `configs.AUTOTUNE` is off.
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dot_operand(b_t):
    if INTERPRETED and b_t.dtype == tl.bfloat16:
        return b_t.to(tl.float32)
    return b_t
