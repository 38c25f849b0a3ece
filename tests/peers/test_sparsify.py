"""sparsify's SparseCoder on our functions, against its own and against dense float64 autograd."""

import math

import pytest
import torch
from sparsify import SparseCoder, SparseCoderConfig, sparse_coder, utils

from sampled_sae.integrations.sparsify import patch_sparsify

SHAPES = [(40, 24, 256, 8), (1, 16, 300, 1), (7, 48, 640, 5), (513, 20, 2048, 32), (30, 16, 40, 12)]


@pytest.fixture(autouse=True)
def eager_peer(monkeypatch):
    """The peer's functions for a machine without a GPU."""
    for module in (sparse_coder, utils):
        monkeypatch.setattr(module, "decoder_impl", utils.eager_decode)


def problem(shape, dtype=torch.float32, seed=0, **options):
    """(SparseCoder with biases, activations [N, d])"""
    n, d, n_features, k = shape
    torch.manual_seed(seed)
    coder = SparseCoder(d, SparseCoderConfig(num_latents=n_features, k=k, **options), dtype=dtype)
    with torch.no_grad():
        coder.encoder.bias.normal_(0, 0.1)
        coder.b_dec.normal_(0, 0.3)
        coder.W_dec.add_(0.1 * torch.randn_like(coder.W_dec))
        if coder.W_skip is not None:
            coder.W_skip.normal_(0, 0.1)
    return coder, torch.randn(n, d, dtype=dtype)


def total(out):
    return out.fvu + out.auxk_loss / 32 + out.multi_topk_fvu / 8


def gradients(coder, x, **kwargs):
    coder.zero_grad()
    out = coder(x, **kwargs)
    total(out).backward()
    return out, {name: p.grad.clone() for name, p in coder.named_parameters() if p.grad is not None}


def to_dense(acts, features, n_features):
    dense = acts.new_zeros(*acts.shape[:-1], n_features)
    return dense.scatter_add(-1, features, acts)


def dense_loss(coder, x, y=None, dead=None):
    """SparseCoder.forward from dense activations, with autograd's gradients."""
    c = coder.cfg
    y = x if y is None else y
    acts = torch.relu((x if c.transcode else x - coder.b_dec) @ coder.encoder.weight.T + coder.encoder.bias)

    def decoded(acts, k, activation="topk"):
        at = acts.topk(k).indices
        if activation == "groupmax":
            first = torch.arange(0, acts.shape[1], acts.shape[1] // k, device=acts.device)
            at = acts.unflatten(1, (k, -1)).argmax(-1) + first
        return torch.zeros_like(acts).scatter(1, at, acts.gather(1, at)).clamp_min(0) @ coder.W_dec

    skip = 0 if coder.W_skip is None else x @ coder.W_skip.T
    x_hat = decoded(acts, c.k, c.activation) + coder.b_dec + skip
    total_variance = (y - y.mean(0)).square().sum()
    loss = (y - x_hat).square().sum() / total_variance
    if dead is not None and dead.any():
        n_dead, k_aux = int(dead.sum()), y.shape[1] // 2
        e_hat = decoded(acts.masked_fill(~dead, -math.inf), min(k_aux, n_dead))
        aux = (e_hat - (y - x_hat).detach()).square().sum() / total_variance
        loss = loss + min(n_dead / k_aux, 1) * aux / 32
    if c.multi_topk:
        loss = loss + (decoded(acts, 4 * c.k) + coder.b_dec - y).square().sum() / total_variance / 8
    return loss


def assert_right_gradients(coder, x, y=None, dead=None, tolerance=1e-5):
    """Of the patched coder in its own dtype, against those of the dense loss in float64."""
    with patch_sparsify():
        out, found = gradients(coder, x, y=y, dead_mask=dead)
    exact = SparseCoder(coder.d_in, coder.cfg, device=x.device, dtype=torch.float64)
    exact.load_state_dict(coder.state_dict())
    loss = dense_loss(exact, x.double(), None if y is None else y.double(), dead)
    loss.backward()
    torch.testing.assert_close(total(out).double(), loss, atol=0, rtol=10 * tolerance)
    for name, p in exact.named_parameters():
        assert (found[name].double() - p.grad).norm() <= tolerance * p.grad.norm(), name
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_encode_selects_what_the_peer_selects(shape, dtype):
    coder, x = problem(shape, dtype)
    theirs = coder.encode(x)
    with patch_sparsify():
        ours = coder.encode(x)
    assert ours.top_acts.shape == ours.top_indices.shape == theirs.top_acts.shape
    assert ours.top_acts.dtype == dtype
    assert ours.top_indices.dtype == torch.int64
    a, b = (to_dense(e.top_acts, e.top_indices, shape[2]) for e in (ours, theirs))
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert torch.equal(a > 0, b > 0)


def test_encode_in_bfloat16_keeps_the_largest_rounded_values():
    coder, x = problem((50, 24, 512, 8), torch.bfloat16)
    with patch_sparsify(), torch.no_grad():
        ours = coder.encode(x)
    dense = torch.relu((x - coder.b_dec).float() @ coder.encoder.weight.float().T + coder.encoder.bias.float())
    assert ours.top_acts.dtype == torch.bfloat16
    expected = dense.detach().topk(8).values
    torch.testing.assert_close(ours.top_acts.float().sort(descending=True).values, expected, rtol=2**-8, atol=0)


@pytest.mark.parametrize("activation", ["topk", "groupmax"])
def test_encode_takes_leading_dimensions(activation):
    coder, x = problem((12, 16, 256, 8), activation=activation)
    with patch_sparsify():
        flat, batched = coder.encode(x), coder.encode(x.view(3, 4, 16))
        assert batched.top_acts.shape == (3, 4, 8)
        assert batched.pre_acts.shape == (3, 4, 256)
        torch.testing.assert_close(batched.top_acts, flat.top_acts.view(3, 4, 8))
        assert torch.equal(batched.top_indices, flat.top_indices.view(3, 4, 8))
        decoded = coder.decode(batched.top_acts, batched.top_indices)
        torch.testing.assert_close(decoded, coder.decode(flat.top_acts, flat.top_indices).view(3, 4, 16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_decode_of_any_table_is_the_peers(dtype):
    """Unsorted features, some twice in a token, zeros and negative values."""
    torch.manual_seed(0)
    W = torch.randn(90, 20, dtype=dtype, requires_grad=True)
    acts = torch.randn(17, 6, dtype=dtype).masked_fill(torch.rand(17, 6) < 0.2, 0).requires_grad_()
    features = torch.randint(90, (17, 6))
    weights = torch.randn(17, 20, dtype=dtype)
    results = []
    for patched in (False, True):
        with patch_sparsify() if patched else torch.enable_grad():
            out = sparse_coder.decoder_impl(features, acts, W.mT)
        results.append((out, *torch.autograd.grad((out * weights).sum(), (acts, W))))
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


OPTIONS = [
    {},
    {"activation": "groupmax"},
    {"transcode": True},
    {"skip_connection": True, "transcode": True},
    {"normalize_decoder": False},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", [(40, 24, 256, 8), (65, 16, 1024, 16), (1024, 8, 4096, 16)], ids=str)
def test_losses_and_gradients_are_the_peers(shape, options):
    """Without AuxK and Multi-TopK theirs are right where every kept activation is positive."""
    coder, x = problem(shape, **options)
    y = torch.randn_like(x) if options.get("transcode") else None
    theirs, expected = gradients(coder, x, y=y)
    with patch_sparsify():
        ours, found = gradients(coder, x, y=y)
    assert bool((theirs.latent_acts > 0).all())
    torch.testing.assert_close(ours.fvu, theirs.fvu)
    torch.testing.assert_close(ours.sae_out, theirs.sae_out, rtol=1e-5, atol=1e-5)
    assert set(found) == set(expected)
    for name, grad in expected.items():
        assert (found[name] - grad).norm() / grad.norm() < 1e-5, name


@pytest.mark.parametrize("share", [0.02, 0.3, 0.9])
@pytest.mark.parametrize("options", [{}, {"multi_topk": True}, {"transcode": True, "multi_topk": True}], ids=str)
@pytest.mark.parametrize("shape", [(40, 24, 256, 8), (33, 16, 2048, 16)], ids=str)
def test_gradients_of_auxk_and_multi_topk_are_right(shape, options, share):
    """Few dead features (a block of activations) and many (entries); the peer's losses are the same."""
    coder, x = problem(shape, **options)
    y = torch.randn_like(x) if options.get("transcode") else None
    dead = torch.rand(shape[2]) < share
    out = assert_right_gradients(coder, x, y, dead)
    theirs, _ = gradients(coder, x, y=y, dead_mask=dead)
    for name in ("fvu", "auxk_loss", "multi_topk_fvu"):
        torch.testing.assert_close(getattr(out, name), getattr(theirs, name))


@pytest.mark.parametrize("options", [{}, {"multi_topk": True}, {"activation": "groupmax"}], ids=str)
def test_float64_is_computed_in_float64(options):
    coder, x = problem((40, 24, 512, 8), torch.float64, **options)
    assert_right_gradients(coder, x, dead=torch.rand(512) < 0.3, tolerance=1e-12)


def test_the_peers_encoder_gets_no_gradient_from_auxk():
    """The defect that the patch mends."""
    coder, x = problem((40, 24, 256, 8))
    dead = torch.rand(256) < 0.5
    (theirs,) = torch.autograd.grad(coder(x, dead_mask=dead).auxk_loss, coder.encoder.weight)
    with patch_sparsify():
        (ours,) = torch.autograd.grad(coder(x, dead_mask=dead).auxk_loss, coder.encoder.weight)
    assert not theirs.any()
    assert ours[dead].norm() > 0
    assert not ours[~dead].any()


def silent_problem(silent):
    """Tokens with 5, 0, 1 and 20 of 40 activations positive, less those left out, each twice; k = 8."""
    coder, _ = problem((4, 40, 40, 8), normalize_decoder=False)
    with torch.no_grad():
        coder.encoder.weight.copy_(torch.eye(40))
        coder.encoder.bias.zero_()
        coder.b_dec.zero_()
    x = -torch.rand(4, 40) - 0.1
    for token, features in enumerate(([3, 7, 20, 21, 39], [], [7], range(0, 40, 2))):
        x[token, list(features)] *= -1
    x = x[[i for i in range(4) if i not in silent]]
    return coder, torch.cat((x, 1.5 * x))


@pytest.mark.parametrize("silent", [(), (3,), (0, 1, 3), (0, 2, 3)], ids=str)
def test_tokens_with_few_positive_activations_are_filled_up(silent, monkeypatch):
    monkeypatch.setattr("sampled_sae.integrations.sparsify.encoder_call.DENSE", 1)
    coder, x = silent_problem(silent)
    acts = torch.relu(x)
    with patch_sparsify():
        out = coder(x)
    torch.testing.assert_close(to_dense(out.latent_acts, out.latent_indices, 40), to_dense(*acts.topk(8), 40))
    for row in out.latent_indices:
        assert len(set(row.tolist())) == 8
        assert min(row) >= 0
        assert max(row) < 40
    assert_right_gradients(coder, x)


@pytest.mark.parametrize("activation", ["topk", "groupmax"])
def test_an_activation_of_zero_passes_no_gradient_on(activation):
    coder, x = problem((30, 16, 256, 16), activation=activation)
    with torch.no_grad():
        coder.encoder.bias.sub_(1.5)
    out = assert_right_gradients(coder, x)
    assert bool((out.latent_acts == 0).any())
    assert bool((out.latent_acts > 0).any())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_changed_tables_are_decoded_as_they_are(mode, monkeypatch):
    """Steering: what was 0 because the token had nothing more is decoded once it is not 0."""
    monkeypatch.setattr("sampled_sae.integrations.sparsify.encoder_call.DENSE", 1)
    coder, x = silent_problem(())
    with patch_sparsify(), mode():
        acts, features, _ = coder.encode(x)
        expected = utils.eager_decode(features, acts + 1, coder.W_dec.mT) + coder.b_dec
        torch.testing.assert_close(coder.decode(acts + 1, features), expected)
        swapped = utils.eager_decode(features.flip(1), acts, coder.W_dec.mT) + coder.b_dec
        torch.testing.assert_close(coder.decode(acts, features.flip(1)), swapped)
        acts += 1
        torch.testing.assert_close(coder.decode(acts, features), expected)
        features.copy_(features.flip(1))
        expected = utils.eager_decode(features, acts, coder.W_dec.mT) + coder.b_dec
        torch.testing.assert_close(coder.decode(acts, features), expected)
