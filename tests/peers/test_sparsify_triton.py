"""The patched functions on Triton's kernels: in its interpreter, or on the GPU where there is one."""

import pytest
import torch
from sparsify import sparse_coder
from test_sparsify import assert_right_gradients, eager_peer, problem, silent_problem, to_dense  # noqa: F401

from sampled_sae.implementations import resolve_impl
from sampled_sae.integrations.sparsify import encoder, functions, patch_sparsify

pytestmark = pytest.mark.gpu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def on_triton(monkeypatch):
    for module in (encoder, functions):
        monkeypatch.setattr(module, "resolve_impl", lambda impl, device, dtype: resolve_impl("triton", device, dtype))
    monkeypatch.setattr(encoder, "DENSE", 1)


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
