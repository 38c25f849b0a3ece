"""Patching sparsify and taking it back, `pre_acts`, checkpoints."""

import math

import pytest
import torch
from sparsify import SparseCoder, fused_encoder, sparse_coder, utils
from test_sparsify import eager_peer, problem, to_dense  # noqa: F401

from sampled_sae import SampledSAE, SampledSAEConfig, formats
from sampled_sae.integrations.sparsify import patch_sparsify
from sampled_sae.integrations.sparsify.encoder_call import PreActivations


def functions():
    return sparse_coder.fused_encoder, sparse_coder.decoder_impl, fused_encoder.fused_encoder, utils.decoder_impl


def test_patch_replaces_and_restores():
    before = functions()
    patch = patch_sparsify()
    inside = functions()
    assert all(a is not b for a, b in zip(before, inside, strict=True))
    patch.undo()
    assert all(a is b for a, b in zip(before, functions(), strict=True))
    patch.undo()
    assert all(a is b for a, b in zip(before, functions(), strict=True))


def test_patching_twice_is_patching_once():
    before = functions()
    with patch_sparsify():
        inside = functions()
        with patch_sparsify():
            assert all(a is b for a, b in zip(inside, functions(), strict=True))
        assert all(a is b for a, b in zip(inside, functions(), strict=True))
    assert all(a is b for a, b in zip(before, functions(), strict=True))


def test_patch_is_undone_after_an_error_and_leaves_later_changes_alone(monkeypatch):
    before = functions()
    with pytest.raises(KeyError), patch_sparsify():
        raise KeyError
    assert all(a is b for a, b in zip(before, functions(), strict=True))
    patch = patch_sparsify()
    monkeypatch.setattr(utils, "decoder_impl", len)
    patch.undo()
    assert utils.decoder_impl is len
    assert sparse_coder.decoder_impl is before[1]


def test_another_sparsify_is_refused_and_left_as_it_is(monkeypatch):
    before = functions()
    monkeypatch.delattr(fused_encoder, "fused_encoder")
    with pytest.raises(ImportError, match=r"patch_sparsify: .*needs sparsify"):
        patch_sparsify()
    assert sparse_coder.fused_encoder is before[0]
    assert sparse_coder.decoder_impl is before[1]


@pytest.fixture
def encoded():
    """(coder, x, pre_acts, the dense activations in the coder's dtype, with gradient, to be written to)"""
    coder, x = problem((30, 16, 300, 8))
    x.requires_grad_()
    with patch_sparsify():
        pre_acts = coder.encode(x).pre_acts
    z = torch.nn.functional.linear(x - coder.b_dec, *coder.encoder.parameters())
    return coder, x, pre_acts, torch.relu(z).clone()


def wanted_gradients(coder, x, result):
    loss = (result * torch.linspace(-1, 1, result.numel()).view(result.shape)).sum()
    return torch.autograd.grad(loss, (x, coder.encoder.weight, coder.encoder.bias), retain_graph=True)


def written(p, columns=slice(0, 99)):
    """p, with other values in some columns."""
    p[:, columns] = 0.5
    return p


def written_after_masking(p):
    masked = torch.where(torch.arange(300) % 2 == 0, p, -math.inf)
    written(p)
    return masked


def written_selection(p):
    p.topk(8, sorted=False).values.zero_()
    return p


USES = {
    "sum": lambda p: p.sum(0),
    "product": lambda p: p @ torch.ones(300, 2),
    "add": lambda p: 1 + p,
    "index": lambda p: p[:, 5:9],
    "double": lambda p: p.double(),
    "where with another value": lambda p: torch.where(torch.arange(300) < 100, p, 0.0),
    "where of single entries": lambda p: torch.where(torch.arange(9000).view(30, 300) % 2 == 0, p, -math.inf).relu(),
    "masked": lambda p: torch.where(torch.arange(300)[None] < 100, p, -math.inf).relu(),
    "smallest": lambda p: p.topk(300, largest=False).values,
    "over tokens": lambda p: p.topk(3, dim=0).values,
    "topk": lambda p: p.topk(20).values,
    "torch.topk": lambda p: torch.topk(p, 20, -1, True, True)[0],
    "more than are positive": lambda p: p.topk(290).values,
    "masked topk": lambda p: torch.where(torch.arange(300)[None] % 3 == 0, p, -math.inf).topk(20).values,
    "masked topk, all": lambda p: torch.where(torch.arange(300)[None] < 40, p, -math.inf).topk(40).values,
    "masked topk, too many": lambda p: torch.where(torch.arange(300) < 9, p, -math.inf).topk(11).values[:, :9],
    "masked twice": lambda p: (
        torch.where(torch.arange(300) > 9, torch.where(torch.arange(300) < 99, p, -math.inf), -math.inf).topk(20).values
    ),
    "written, topk": lambda p: written(p).topk(20).values,
    "written, masked topk": lambda p: torch.where(torch.arange(300) < 150, written(p), -math.inf).topk(20).values,
    "masked, written, topk": lambda p: (
        written(torch.where(torch.arange(300) < 150, p, -math.inf), slice(140, 170)).topk(20).values
    ),
    "masked, written before, topk": lambda p: written_after_masking(p).topk(20).values,
    "masked, written before": lambda p: written_after_masking(p).relu(),
    "multiplied in place, topk": lambda p: (p.mul_(2), p.topk(20).values)[1],
    "topk after a written topk": lambda p: written_selection(p).topk(8).values,
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_pre_acts_stand_for_the_dense_activations(encoded, use):
    coder, x, pre_acts, dense = encoded
    found, expected = use(pre_acts), use(dense)
    assert isinstance(pre_acts, torch.Tensor)
    assert not isinstance(found, PreActivations)
    torch.testing.assert_close(found, expected)
    for a, b in zip(wanted_gradients(coder, x, found), wanted_gradients(coder, x, expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_topk_of_pre_acts_names_the_features(encoded):
    _, _, pre_acts, dense = encoded
    dead = torch.rand(300) < 0.2
    for source, expected in ((pre_acts, dense), (torch.where(dead[None], pre_acts, -math.inf), dense * dead)):
        for is_sorted in (True, False):
            values, features = source.topk(17, sorted=is_sorted)
            assert bool((values.diff() <= 0).all()) or not is_sorted
            torch.testing.assert_close(expected.gather(1, features), values)
            torch.testing.assert_close(to_dense(values, features, 300), to_dense(*expected.topk(17), 300))
            assert all(len(set(row)) == 17 for row in features.tolist())


@pytest.mark.parametrize("k", [8, 32])
def test_topk_of_pre_acts_shares_no_memory_with_the_kept_activations(k, encoded):
    """Nor with another topk."""
    coder, x, *_ = encoded
    with patch_sparsify(), torch.no_grad():
        acts, features, pre_acts = coder.encode(x)
        kept = acts.clone(), features.clone()
        for _ in range(2):
            values, indices = pre_acts.topk(k, sorted=False)
            torch.testing.assert_close(to_dense(values, indices, 300).amax(1), acts.amax(1))
            values.zero_()
            indices.zero_()
            assert torch.equal(acts, kept[0])
            assert torch.equal(features, kept[1])


def test_pre_acts_know_their_shape_without_being_computed(encoded):
    _, _, pre_acts, _ = encoded
    assert pre_acts.shape == (30, 300)
    assert pre_acts.dtype == torch.float32
    assert pre_acts.device.type == "cpu"
    assert pre_acts.dim() == 2
    assert pre_acts.made is None
    assert pre_acts.requires_grad


def test_pre_acts_of_other_weights_are_refused(encoded):
    coder, _, pre_acts, _ = encoded
    with torch.no_grad():
        coder.encoder.weight.mul_(2)
    for use in (torch.sum, lambda p: p.topk(20)):
        with pytest.raises(RuntimeError, match="pre_acts: the input or the weights have been changed"):
            use(pre_acts)


def test_pre_acts_without_gradient_have_none_later():
    coder, x = problem((30, 16, 300, 8))
    with patch_sparsify(), torch.no_grad():
        pre_acts = coder.encode(x).pre_acts
    assert not pre_acts.sum().requires_grad
    assert not pre_acts.topk(20).values.requires_grad
    with patch_sparsify(), torch.inference_mode():
        assert coder(x).sae_out.isfinite().all()
        assert coder.encode(x).pre_acts.sum() > 0


@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_an_exported_topk_sae_encodes_and_decodes_the_same_there(tmp_path, scale):
    sae = SampledSAE(SampledSAEConfig(d_in=24, d_sae=512, k=8, l=None, select="token"))
    with torch.no_grad():
        sae.b_enc.normal_(0, 0.1)
        sae.b_dec.normal_()
    x = torch.randn(50, 24)
    codes = sae.encode_sparse(x * scale)
    formats.export(sae, tmp_path, to="sparsify", scale=scale)
    coder = SparseCoder.load_from_disk(tmp_path)
    for patched in (False, True):
        with patch_sparsify() if patched else torch.enable_grad():
            acts, features, _ = coder.encode(x)
            torch.testing.assert_close(to_dense(acts, features, 512) * scale, codes.to_dense(), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(coder.decode(acts, features) * scale, sae.decode(codes), rtol=1e-4, atol=1e-5)


def test_a_coder_trained_there_is_read_here(tmp_path):
    coder, x = problem((50, 24, 512, 8))
    optimizer = torch.optim.Adam(coder.parameters(), lr=1e-2)
    with patch_sparsify():
        for _ in range(3):
            coder(x).fvu.backward()
            optimizer.step()
            optimizer.zero_grad()
        coder.save_to_disk(tmp_path)
        out = coder(x)
    sae = formats.load(tmp_path).train()
    assert sae.cfg.select == "token"
    assert sae.cfg.l is None
    assert sae.cfg.k == 8
    torch.testing.assert_close(sae(x).x_hat, out.sae_out, rtol=1e-5, atol=1e-5)
