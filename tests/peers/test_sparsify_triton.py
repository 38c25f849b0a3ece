"""The patched functions on Triton's kernels: in its interpreter, or on the GPU where there is one."""

import pytest
import torch
from sparsify import SparseCoder, sparse_coder, utils
from test_sparsify import (
    assert_right_gradients,
    dense_loss,
    eager_peer,  # noqa: F401
    gradients,
    problem,
    silent_problem,
    to_dense,
)

from sampled_sae.impl.interface import resolve_impl
from sampled_sae.integrations.sparsify import encode_decode, encoder_call, patch_sparsify

pytestmark = pytest.mark.gpu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def on_triton(monkeypatch):
    for module in (encoder_call, encode_decode):
        monkeypatch.setattr(module, "resolve_impl", lambda impl, device, dtype: resolve_impl("triton", device, dtype))
    monkeypatch.setattr(encoder_call, "DENSE", 1)
    # on a GPU sparsify puts its forward under autocast, where no gradient is right to more than two digits
    monkeypatch.setattr(SparseCoder, "forward", SparseCoder.forward.__wrapped__)


OPTIONS = [
    {},
    {"activation": "groupmax"},
    {"multi_topk": True},
    {"transcode": True, "skip_connection": True},
]


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradients_are_right(options):
    coder, x = problem((19, 13, 96, 4), **options)
    y = torch.randn_like(x).to(DEVICE) if options.get("transcode") else None
    assert_right_gradients(coder.to(DEVICE), x.to(DEVICE), y)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("share", [0.05, 0.5])
def test_gradients_of_auxk_are_right(share, form):
    coder, x = problem((19, 13, 96, 4))
    dead = torch.rand(96) < share
    assert_right_gradients(coder.to(DEVICE), x.to(DEVICE), dead=dead.to(DEVICE))


def test_tokens_with_few_positive_activations_are_filled_up():
    coder, x = silent_problem(())
    coder, x = coder.to(DEVICE), x.to(DEVICE)
    with patch_sparsify():
        acts, features, _ = coder.encode(x)
    torch.testing.assert_close(to_dense(acts, features, 40), to_dense(*torch.relu(x).topk(8), 40))
    assert all(len(set(row)) == 8 for row in features.tolist())
    assert_right_gradients(coder, x)


def test_nan_in_a_token_shows():
    coder, x = problem((6, 13, 96, 4), transcode=True)
    x[2, 5] = torch.nan
    with patch_sparsify(), torch.no_grad():
        out = coder.to(DEVICE)(x.to(DEVICE), y=torch.zeros_like(x).to(DEVICE))
    assert torch.isnan(out.sae_out).any(1).tolist() == [False, False, True, False, False, False]


def test_decode_of_any_table():
    torch.manual_seed(0)
    W = torch.randn(90, 20, device=DEVICE)
    acts, features = torch.randn(17, 6, device=DEVICE), torch.randint(90, (17, 6), device=DEVICE)
    with patch_sparsify():
        found = sparse_coder.decoder_impl(features, acts, W.mT)
    torch.testing.assert_close(found, to_dense(acts, features, 90) @ W, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "options", [{}, {"activation": "groupmax"}, {"transcode": True, "skip_connection": True}], ids=str
)
def test_autocast_is_no_worse_than_the_peer(options):
    coder, x = problem((64, 24, 256, 8), **options)
    coder, x = coder.to(DEVICE), x.to(DEVICE)
    y = torch.randn_like(x) if options.get("transcode") else x
    exact = SparseCoder(24, coder.cfg, device=DEVICE, dtype=torch.float64)
    exact.load_state_dict(coder.state_dict())
    loss = dense_loss(exact, x.double(), y.double())
    loss.backward()
    with torch.autocast(DEVICE, torch.bfloat16):
        theirs, expected = gradients(coder, x, y=y)
        with patch_sparsify():
            ours, found = gradients(coder, x, y=y)
    assert ours.sae_out.dtype == ours.latent_acts.dtype == torch.float32
    assert (ours.fvu - loss).abs() <= (theirs.fvu - loss).abs() + 4e-3 * loss
    for name, p in exact.named_parameters():
        ours_off, theirs_off = ((grads[name] - p.grad).norm() for grads in (found, expected))
        assert ours_off <= theirs_off + 1e-2 * p.grad.norm(), name


@pytest.mark.parametrize("dead", [False, True])
def test_autocast_does_not_round_the_decoder(dead, form):
    """As it does not round sparsify's, whose embedding_bag knows no autocast."""
    coder, x = problem((19, 13, 96, 4))
    coder, x = coder.to(DEVICE), x.to(DEVICE)
    weights = torch.randn_like(x)
    with torch.autocast(DEVICE, torch.bfloat16), patch_sparsify():
        acts, features, pre_acts = coder.encode(x)
        if dead:
            mask = torch.arange(96, device=DEVICE) < 40
            acts, features = torch.where(mask, pre_acts, -torch.inf).topk(6, sorted=False)
        found = sparse_coder.decoder_impl(features, acts, coder.W_dec.mT)
        expected = utils.eager_decode(features, acts, coder.W_dec.mT)
        any_table = sparse_coder.decoder_impl(features, acts.clone(), coder.W_dec.mT)
    assert found.dtype == torch.float32
    torch.testing.assert_close(any_table, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    grads = (
        torch.autograd.grad((out * weights).sum(), (acts, coder.W_dec), retain_graph=True) for out in (found, expected)
    )
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
