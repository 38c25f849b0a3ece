"""The patched functions on NaN, on nothing and on bad input, and what they never make."""

import math

import pytest
import torch
from sparsify import fused_encoder
from test_sparsify import eager_peer, gradients, problem  # noqa: F401
from torch.utils._python_dispatch import TorchDispatchMode

from sampled_sae.integrations.sparsify import patch_sparsify


def test_nan_in_a_token_shows_as_it_does_in_the_peer():
    coder, x = problem((6, 16, 256, 8), transcode=True)
    x[2, 5], x[4, 0] = math.nan, math.inf
    with patch_sparsify(), torch.no_grad():
        out = coder(x, y=torch.zeros_like(x))
    bad = torch.isnan(out.sae_out).any(1)
    assert bad.tolist() == [False, False, True, False, True, False]


def test_empty_batch():
    coder, x = problem((4, 16, 256, 8))
    with patch_sparsify():
        for activation in ("topk", "groupmax"):
            coder.cfg.activation = activation
            encoded = coder.encode(x[:0])
            assert encoded.top_acts.shape == (0, 8)
            assert encoded.pre_acts.shape == (0, 256)
            assert coder.decode(encoded.top_acts, encoded.top_indices).shape == (0, 16)


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation makes."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor) and t.layout == torch.strided:
                self.elements = max(self.elements, t.untyped_storage().nbytes() // t.element_size())
        return out


@pytest.mark.parametrize("options", [{}, {"multi_topk": True}, {"activation": "groupmax"}], ids=str)
def test_no_step_makes_all_activations(options):
    coder, x = problem((2048, 8, 4096, 16), **options)
    dead = torch.rand(4096) < 0.5
    with patch_sparsify(), LargestTensor() as largest:
        gradients(coder, x, dead_mask=dead)
    assert largest.elements <= 2048 * 4096 // 4
    with LargestTensor() as largest:
        gradients(coder, x, dead_mask=dead)
    assert largest.elements >= 2048 * 4096


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda c, x: fused_encoder.fused_encoder(x[:, :5], c.encoder.weight, None, 8, "topk"), "input=tensor"),
        (lambda c, x: fused_encoder.fused_encoder(x, c.encoder.weight, c.encoder.bias, 0, "topk"), "k=0"),
        (lambda c, x: fused_encoder.fused_encoder(x, c.encoder.weight, c.encoder.bias, 257, "topk"), "k=257"),
        (lambda c, x: fused_encoder.fused_encoder(x, c.encoder.weight, c.encoder.bias, 7, "groupmax"), "k=7"),
        (lambda c, x: fused_encoder.fused_encoder(x, c.encoder.weight, c.encoder.bias, 8, "relu"), "activation='relu'"),
        (lambda c, x: c.decode(torch.ones(3, 2), torch.ones(3, 3, dtype=torch.int64)), "top_indices=tensor"),
    ],
)
def test_bad_input_is_named(bad, message):
    coder, x = problem((6, 16, 256, 8))
    with patch_sparsify(), pytest.raises(ValueError, match=message):
        bad(coder, x)
