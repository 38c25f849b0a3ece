"""The rules of inference by impl="triton", in the interpreter where there is no GPU."""

import pytest
import torch

pytest.importorskip("triton")

from inference_makers import make_whole

from sampled_sae.impl.triton import stream
from sampled_sae.inference.config import RULES

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


LISTED, WHOLE_ROWS = 1 / 16, 0.0
ROUTES = [(rule, share) for rule in RULES for share in (LISTED, WHOLE_ROWS) if rule != "topk" or share == LISTED]


@pytest.mark.one_in(2)
@pytest.mark.parametrize(("rule", "share"), ROUTES, ids=str)
def test_the_same_entries_bit_for_bit(rule, share, monkeypatch):
    monkeypatch.setattr(stream, "MOST_LISTED", share)
    monkeypatch.setattr(stream, "ABOVE_PER_TOKEN", 2)
    monkeypatch.setattr(stream, "ROW_ELEMENTS", 200)
    reference, x = make_whole(rule, DEVICE, impl="reference")
    ours, _ = make_whole(rule, DEVICE, impl="triton")
    wanted, found = reference.encode_sparse(x), ours.encode_sparse(x)
    for a, b in zip(found.entries(), wanted.entries()):
        assert torch.equal(a, b)
    assert torch.equal(ours.encode(x), wanted.to_dense())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, None], ids=str)
def test_weights_of_16_bits(dtype):
    """Multiplied in 16 bits by activations of 16 bits, raised for float32 ones."""
    reference, x = make_whole("jumprelu", DEVICE, dtype=dtype or torch.bfloat16, impl="reference")
    ours, _ = make_whole("jumprelu", DEVICE, dtype=dtype or torch.bfloat16, impl="triton")
    x = x if dtype is None else x.to(dtype)
    assert torch.equal(ours.encode_sparse(x).to_dense(), reference.encode_sparse(x).to_dense())
    assert torch.equal(ours(x).x_hat, reference(x).x_hat)


@pytest.mark.slow
def test_gradients_reach_activations():
    found = []
    for impl in ("reference", "triton"):
        sae, x = make_whole("gated", DEVICE, impl=impl)
        x.requires_grad_()
        out = sae(x)
        out.codes.values.sum().backward(retain_graph=True)
        sae.encode(x).square().sum().backward()
        out.x_hat.square().sum().backward()
        found.append(x.grad)
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.one_in(3)
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_the_same_entries_through_a_screen(rule, monkeypatch):
    """In lists with room for all of them, and for too few of what a bound leaves open."""
    monkeypatch.setattr(stream, "SLACK", 0)
    monkeypatch.setattr(stream, "MOST_LISTED", 0.5)
    monkeypatch.setattr(stream, "MOST_SCREENED", 1)
    reference, x = make_whole(rule, DEVICE, impl="reference")
    ours, _ = make_whole(rule, DEVICE, impl="triton", screen="bf16")
    wanted = reference.encode_sparse(x)
    for room in (2, 50):
        monkeypatch.setattr(stream, "ABOVE_PER_TOKEN", room)
        for a, b in zip(ours.encode_sparse(x).entries(), wanted.entries()):
            assert torch.equal(a, b)
        assert torch.equal(ours.encode(x), wanted.to_dense())
