"""Transcoders and Matryoshka SAEs in the peers' own loaders, and from their own saves."""

import json

import pytest
import torch
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE, MatryoshkaBatchTopKTrainer
from dictionary_learning.utils import load_dictionary
from format_peers_makers import NEAR
from makers import make_sae, tokens
from sae_lens import SAE
from sae_lens.saes.transcoder import JumpReLUSkipTranscoder, JumpReLUTranscoder
from safetensors.torch import load_file
from sparsify import SparseCoder, SparseCoderConfig

from sampled_sae import formats


def trained(**settings):
    sae = make_sae(torch.float32, **settings)
    sae.calibrate(tokens(200, 12, dtype=torch.float32, seed=7))
    return sae.eval()


@pytest.mark.parametrize("scales", [{}, {"input_scale": 0.37, "output_scale": 0.6}], ids=["as they are", "scaled"])
@pytest.mark.parametrize("skip", [False, True])
@torch.no_grad()
def test_saelens_computes_what_we_do(tmp_path, skip, scales):
    sae = trained(d_out=7, skip=skip, **scales)
    formats.export(sae, tmp_path / "ours", to="saelens")
    theirs = SAE.load_from_disk(tmp_path / "ours")
    assert type(theirs) is (JumpReLUSkipTranscoder if skip else JumpReLUTranscoder)
    x = tokens(60, 12, dtype=torch.float32, seed=3)
    codes = sae.encode(x)
    torch.testing.assert_close(theirs.encode(x) * sae.cfg.input_scale, codes, **NEAR)
    torch.testing.assert_close(theirs(x), sae.decode(codes, x), **NEAR)
    # saved again by them it comes back as it was
    theirs.save_model(tmp_path / "theirs")
    before, after = (load_file(tmp_path / name / "sae_weights.safetensors") for name in ("ours", "theirs"))
    assert set(before) == set(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    again = formats.load(tmp_path / "theirs")
    torch.testing.assert_close(again.decode(again.encode(x), x), sae.decode(codes, x), **NEAR)


@pytest.mark.parametrize("skip", [False, True])
@torch.no_grad()
def test_sparsify_computes_what_we_do(tmp_path, skip):
    sae = trained(d_out=12, skip=skip, l=None, select="token")
    formats.export(sae, tmp_path, to="sparsify")
    theirs = SparseCoder.load_from_disk(tmp_path)
    x, y = (tokens(60, 12, dtype=torch.float32, seed=seed) for seed in (3, 4))
    torch.testing.assert_close(theirs(x, y).sae_out, sae(x, y).x_hat, **NEAR)


@pytest.mark.parametrize("skip", [False, True])
@torch.no_grad()
def test_sparsify_own_saves(tmp_path, skip):
    cfg = SparseCoderConfig(k=4, num_latents=96, transcode=True, skip_connection=skip)
    theirs = SparseCoder(12, cfg)
    for p in theirs.parameters():
        p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    theirs.save_to_disk(tmp_path / "theirs")
    ours = formats.load(tmp_path / "theirs")
    x, y = (tokens(60, 12, dtype=torch.float32, seed=seed) for seed in (3, 4))
    torch.testing.assert_close(theirs(x, y).sae_out, ours(x, y).x_hat, **NEAR)
    formats.export(ours, tmp_path / "again", to="sparsify")
    before, after = (load_file(tmp_path / name / "sae.safetensors") for name in ("theirs", "again"))
    assert set(before) == set(after)
    assert all(torch.equal(before[name], after[name]) for name in before)


@torch.no_grad()
def test_dictionary_learning_computes_what_we_do(tmp_path):
    sae = trained(l=None, groups=(10, 40, 96))
    formats.export(sae, tmp_path, to="dictionary_learning")
    theirs = MatryoshkaBatchTopKSAE.from_pretrained(tmp_path / "ae.pt")
    assert theirs.group_sizes.tolist() == [10, 30, 56]
    x = tokens(60, 12, dtype=torch.float32, seed=3)
    torch.testing.assert_close(theirs.encode(x), sae.encode(x), **NEAR)
    torch.testing.assert_close(theirs(x), sae.decode(sae.encode(x)), **NEAR)


@torch.no_grad()
def test_dictionary_learning_own_saves(tmp_path):
    sizes = {"activation_dim": 12, "dict_size": 96, "k": 4, "group_fractions": [0.25, 0.75]}
    made = MatryoshkaBatchTopKTrainer(9, **sizes, layer=3, lm_name="org/model", warmup_steps=1, device="cpu", seed=0)
    made.ae.threshold.fill_(1.25)
    torch.save(made.ae.state_dict(), tmp_path / "ae.pt")
    (tmp_path / "config.json").write_text(json.dumps({"trainer": made.config, "buffer": {}}))
    ours = formats.load(tmp_path)
    assert (ours.cfg.groups, ours.cfg.l, ours.cfg.k) == ((24, 96), None, 4)
    x = tokens(60, 12, dtype=torch.float32, seed=3)
    torch.testing.assert_close(made.ae.encode(x), ours.encode(x), **NEAR)
    formats.export(ours, tmp_path / "again", to="dictionary_learning")
    before, after = (torch.load(f / "ae.pt", weights_only=True) for f in (tmp_path, tmp_path / "again"))
    assert set(before) == set(after)
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)
    assert type(load_dictionary(str(tmp_path), "cpu")[0]) is MatryoshkaBatchTopKSAE


def test_the_mean_over_groups_is_that_of_dictionary_learning():
    """Its trainer takes the mean of the levels' errors, each times 1 / G."""
    sizes = {"activation_dim": 12, "dict_size": 96, "k": 4, "group_fractions": [0.25, 0.75]}
    made = MatryoshkaBatchTopKTrainer(9, **sizes, layer=3, lm_name="org/model", warmup_steps=1, device="cpu", seed=0)
    sae = make_sae(torch.float32, l=None, groups=(24, 96))
    for name, p in sae.named_parameters():
        getattr(made.ae, name).data.copy_(p.detach())
    x = tokens(30, 12, dtype=torch.float32, seed=3)
    ours, theirs = sae(x).loss, made.loss(x, step=0)
    torch.testing.assert_close(ours / 2, theirs)
    ours.backward()
    theirs.backward()
    for name, p in sae.named_parameters():
        torch.testing.assert_close(p.grad / 2, getattr(made.ae, name).grad, **NEAR)
