"""The screen of bfloat16 weights and tokens: its bound is needed, whatever rounds as far as it may."""

import pytest
import torch
from screened import TORCH

from sampled_sae.impl.torch import plain_screen, screen


def planted(kind):
    """(x, W, b, the product with feature 5 as a CPU may compute it): in truth its activation is `true`."""
    x, W, b = torch.ones(1, 2), torch.zeros(64, 2), torch.zeros(64)
    if kind == "the product is cut off":
        W[5, 0], W[5, 1] = 1, 2.0**-7 - 2.0**-15
        return x, W, b, 1.0
    W[5, 0], W[5, 1], b[5] = 64, -64, 1
    return x, W, b, -screen.sums_of(2 + 4) * float(x.norm() * W[5].norm())


@pytest.mark.parametrize("few", [0, 256], ids=["by token", "by feature"])
@pytest.mark.parametrize(("share", "found"), [(1.0, True), (0.9, False)])
@pytest.mark.parametrize("kind", ["the product is cut off", "the sums are rounded"])
def test_the_bound_is_needed(kind, share, found, few, monkeypatch):
    """One that is 10% smaller loses an activation."""
    x, W, b, seen = planted(kind)
    true = W[5].sum() + b[5]

    def product(left, right, out):
        out.copy_(left.float() @ right.float())
        out[(5, 0) if len(left) == 64 else (0, 5)] = seen

    monkeypatch.setattr(torch, "mm", product)
    monkeypatch.setattr(plain_screen, "FEW_TOKENS", few)
    for name in ("MARGIN", "UNIT"):
        monkeypatch.setattr(plain_screen, name, share * getattr(plain_screen, name))
    encoder = TORCH.encoder(x, W.bfloat16(), b, screen="bf16")
    assert plain_screen.is_plain(encoder.operands)
    just_below = true.nextafter(torch.tensor(0.0))
    codes = TORCH.above_threshold(encoder, just_below)
    assert (codes.features.tolist() == [5]) == found
