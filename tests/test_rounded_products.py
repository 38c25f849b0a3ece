"""The emulation of bfloat16 operands on a CPU is the rounding of the Triton form."""

from contextlib import nullcontext

import pytest
import torch
from makers import gradients, make_sae, tokens

from benchmarks.rounded_products import RoundedProducts

BF16 = torch.autocast("cpu", torch.bfloat16)


@pytest.mark.parametrize(("l", "form"), [(3.0, "block"), (None, "entries")], indirect=["form"])
def test_the_emulation_is_the_rounding_of_the_triton_form(l, form):
    """Loss and gradients of a step: what is left beside the rounding's own effect is the order of sums."""
    pytest.importorskip("triton")
    x, found = tokens(12, 12, dtype=torch.float32), []
    for impl, mode in (("torch", nullcontext()), ("torch", RoundedProducts()), ("triton", BF16)):
        sae = make_sae(torch.float32, impl=impl, l=l, screen="off", aux_coefficient=1.0, dead_after=1)
        sae.tokens_since_active[:20] = 1
        with mode:
            out = sae(x)
        # autocast is for the forward pass, whose operators remember it
        with nullcontext() if impl == "triton" else mode:
            out.loss.backward()
        found.append({"loss": out.loss.detach(), **gradients(sae)})
    exact, emulated, triton = found
    for name, value in emulated.items():
        if l is None and name == "b_dec":
            continue  # the Triton form takes its rows from the rounded W
        effect = (value - exact[name]).norm()
        assert effect > 0
        assert (value - triton[name]).norm() < 0.05 * effect, name
