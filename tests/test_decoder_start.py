"""Decoder rows that begin at tokens of the training."""

from dataclasses import replace

import pytest
import torch
from makers import SMALL_SAE, SMALL_TRAIN, D, begun_training, same_weights, tokens

from sampled_sae import SampledSAEConfig, TrainConfig, Trainer
from sampled_sae.cli import main
from sampled_sae.impl.decoder_rows import layer_norms
from sampled_sae.training.activation_stream import ActivationStream
from sampled_sae.training.iterator_source import IteratorSource
from sampled_sae.training.joined_activations import PairedActivations, StackedActivations

TRAIN = replace(SMALL_TRAIN, decoder_start="tokens")
X = 2 * tokens(320, D, dtype=torch.float32, seed=3) + 1


def directions(sae, x):
    """Of tokens x, scaled, from what b_dec begins as."""
    return torch.nn.functional.normalize(x - sae.b_dec.detach(), dim=1)


def test_rows_begin_at_distinct_tokens_of_the_training(tmp_path):
    trainer = Trainer(SMALL_SAE, TRAIN, X, tmp_path)
    W_dec, W_enc = trainer.sae.W_dec.detach(), trainer.sae.W_enc.detach()
    nearest = (W_dec @ directions(trainer.sae, X * trainer.store.scale).T).max(1)
    assert torch.allclose(nearest.values, torch.ones(SMALL_SAE.d_sae), atol=1e-5)
    assert len(nearest.indices.unique()) == SMALL_SAE.d_sae
    assert not torch.equal(W_dec, W_dec[W_dec[:, 0].argsort()]), "in no order that groups would follow"
    assert torch.allclose(W_enc, W_dec.T, atol=1e-6)


def test_the_seed_of_the_sae_draws_the_tokens(tmp_path):
    same, other = (Trainer(replace(SMALL_SAE, seed=seed), TRAIN, X, tmp_path / f"{seed}").sae for seed in (0, 1))
    assert same_weights(same, Trainer(SMALL_SAE, TRAIN, X, tmp_path / "again").sae)
    assert set(map(tuple, same.W_dec.tolist())) != set(map(tuple, other.W_dec.tolist()))


def test_copies_of_a_token_begin_one_row_and_the_rest_are_random(tmp_path):
    copies = X[:80].repeat(4, 1)
    random = Trainer(SMALL_SAE, SMALL_TRAIN, copies, tmp_path / "random").sae.W_dec.detach()
    W_dec = Trainer(SMALL_SAE, TRAIN, copies, tmp_path / "tokens").sae.W_dec.detach()
    assert len(W_dec.unique(dim=0)) == SMALL_SAE.d_sae
    as_they_were = (W_dec == random).all(1)
    assert SMALL_SAE.d_sae - 80 <= as_they_were.sum() < SMALL_SAE.d_sae / 2
    assert torch.allclose(W_dec.norm(dim=1), torch.ones(SMALL_SAE.d_sae), atol=1e-6)


def test_layers_of_a_crosscoder_have_norms_that_add_up_to_1(tmp_path):
    stack = StackedActivations([X[:, :5], 3 * X[:, 5:10]])
    config = SampledSAEConfig(d_in=5, d_sae=64, k=3, layers=2)
    sae = Trainer(config, TRAIN, stack, tmp_path).sae
    norms = layer_norms(sae.W_dec.detach(), 2).sum(1)
    assert torch.allclose(norms, torch.ones(64), atol=1e-6)
    unit = sae.W_dec.detach() / sae.W_dec.detach().norm(dim=1, keepdim=True)
    scaled = torch.cat([stack.shard(i) for i in range(len(stack.tokens))]) * stack.row_scale
    assert torch.allclose((unit @ directions(sae, scaled).T).amax(1), torch.ones(64), atol=1e-5)
    assert torch.allclose(sae.W_enc.detach().T * norms[:, None], unit * layer_norms(unit, 2).sum(1)[:, None], atol=1e-6)


def test_a_resumed_training_begins_at_no_tokens_again(tmp_path):
    whole = Trainer(SMALL_SAE, TRAIN, X, tmp_path / "whole").run(progress=False)
    begun_training(SMALL_SAE, TRAIN, X, tmp_path / "cut", steps=5)
    assert same_weights(Trainer(SMALL_SAE, TRAIN, X, tmp_path / "cut").run(progress=False), whole)


def test_a_checkpoint_of_before_the_choice_goes_on(tmp_path):
    begun_training(SMALL_SAE, SMALL_TRAIN, X, tmp_path, steps=1)
    state = torch.load(tmp_path / "checkpoint.pt")
    del state["settings"]["train"]["decoder_start"]
    torch.save(state, tmp_path / "checkpoint.pt")
    assert Trainer(SMALL_SAE, SMALL_TRAIN, X, tmp_path).step == 1
    with pytest.raises(ValueError, match="decoder_start was 'random', is 'tokens'"):
        Trainer(SMALL_SAE, TRAIN, X, tmp_path)


def test_what_cannot_begin_at_tokens_is_refused(tmp_path):
    def refused(match, config, store, **options):
        with pytest.raises(ValueError, match=rf"^decoder_start='tokens': must be 'random', since .*{match}"):
            Trainer(config, TRAIN, store, tmp_path / "refused", **options)

    initial = Trainer(SMALL_SAE, SMALL_TRAIN, X, tmp_path / "initial").sae
    refused("init_from", SMALL_SAE, X, init_from=initial)
    refused("targets", SampledSAEConfig(D, 96, 3, d_out=D), PairedActivations(X, X))
    refused("read once", SMALL_SAE, ActivationStream(IteratorSource(X.split(40)), 128))
    with pytest.raises(ValueError, match="decoder_start='median': must be"):
        TrainConfig(decoder_start="median")


def test_the_command_begins_at_tokens(tmp_path, capsys):
    torch.save(X, tmp_path / "x.pt")
    options = ["--steps", "3", "--batch-size", "64", "--features", "32", "--k", "3", "--decoder-start", "tokens"]
    main(["train", str(tmp_path / "x.pt"), str(tmp_path / "run"), "--holdout", "64", *options])
    capsys.readouterr()
    assert '"decoder_start": "tokens"' in (tmp_path / "run" / "run.json").read_text()
