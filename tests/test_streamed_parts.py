"""Iterators whose chunks have several parts: transcoders and crosscoders on a stream that is no language model."""

from dataclasses import replace

import pytest
import torch
from makers import same_weights

from sampled_sae import SampledSAEConfig, TrainConfig, Trainer
from sampled_sae.training.activation_stream import ActivationStream
from sampled_sae.training.feed import Feed
from sampled_sae.training.iterator_source import IteratorSource
from sampled_sae.training.sae_group import SAEGroup

X = torch.randn(700, 6, generator=torch.Generator().manual_seed(0))
Y = torch.relu(X @ torch.randn(6, 4, generator=torch.Generator().manual_seed(1))) + 1
TRAIN = TrainConfig(steps=14, batch_size=32, checkpoint_every=5, lr=1e-2)
PAIR = SampledSAEConfig(d_in=6, d_out=4, d_sae=32, k=3, skip=True)
STACK = SampledSAEConfig(d_in=6, layers=2, d_sae=32, k=3, l=2.0)


def pairs():
    return ActivationStream(IteratorSource(zip(X.split(20), Y.numpy().reshape(35, 20, 4))), 128).pair()


def stacks():
    both = torch.stack([X, 3 * X.flip(1)], dim=1)
    return ActivationStream(IteratorSource(chunk.unbind(1) for chunk in both.split(20)), 128).beside()


def test_a_batch_has_the_parts_of_each_token_side_by_side():
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), batch_size=50)
    stream = ActivationStream(IteratorSource(loader), 128)
    feed = Feed(stream.pair(), 32, seed=0, steps=3)
    batch = feed.batch(1)
    at = (batch.x[:, None] / feed.scale - X).abs().sum(2).argmin(1)
    torch.testing.assert_close(batch.x, X[at] * feed.scale)
    torch.testing.assert_close(batch.target, Y[at] * feed.output_scale)
    assert feed.output_scale != feed.scale
    back = Feed(stream.pair(1, 0), 32, seed=0, steps=3).batch(1)
    torch.testing.assert_close(back.x, batch.target)


@pytest.mark.parametrize(("config", "stream"), [(PAIR, pairs), (STACK, stacks)], ids=["transcoder", "crosscoder"])
def test_a_training_learns_and_resumes(config, stream, tmp_path):
    whole = Trainer(config, TRAIN, stream(), tmp_path / "whole")
    sae = whole.run(progress=False)
    assert whole.metrics[-1]["fvu"] < 1
    assert not torch.equal(sae.W_dec, Trainer(config, replace(TRAIN, steps=1), stream(), tmp_path / "one").sae.W_dec)
    begun = Trainer(config, TRAIN, stream(), tmp_path / "halves")
    for t in range(9):
        begun.train_on(begun.feed.batch(t))
    begun.save()
    assert same_weights(Trainer(config, TRAIN, stream(), tmp_path / "halves").run(progress=False), sae)


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        ([(X[:64], Y[:63])], ValueError, r"x, chunk 0, part 1: 63 tokens: must be those of part 0, which has 64"),
        ([(X[:64], Y[:64]), (X[:64],)], ValueError, r"x, chunk 1: 1 parts: must be 2, as in the first chunk"),
        ([(X[:64], Y[:64]), X[:64]], ValueError, r"x, chunk 1: 1 parts: must be 2"),
        ([X[:64], (X[:64], Y[:64])], ValueError, r"x, chunk 1: 2 parts: must be 1"),
        ([(X[:64], Y[:64]), (X[:64], X[:64])], ValueError, r"chunk 1, part 1: shape=\(64, 6\): must be \[n, 4\]"),
        ([(X[:64], Y[:64] / 0)], ValueError, "x, chunk 0, part 1: .* at token 0"),
        ([(X[:64], torch.arange(64))], TypeError, "x, chunk 0, part 1: dtype=torch.int64"),
        ([(X[:64], None)], TypeError, "x, chunk 0, part 1: NoneType: must be a torch.Tensor"),
        ([()], ValueError, "x, chunk 0: 0 parts: must be 1"),
    ],
)
def test_parts_that_do_not_fit_are_named(given, error, said):
    with pytest.raises(error, match=said):
        ActivationStream(IteratorSource(iter(given)), 128).blocks.get(0, 128)


@pytest.mark.parametrize(("first", "second"), [(9, 0), (9, 3), (3, 9)])
def test_members_that_were_killed_at_different_steps_go_on_together(first, second, tmp_path):
    """Of one stream, whose blocks they share: one that is ahead waits for the other."""

    def group(folder):
        stream = ActivationStream(IteratorSource(list(zip(X.split(20), Y.split(20)))), 128)
        stores = {"pair": stream.pair(), "one": stream.parts[0]}
        return SAEGroup({"pair": PAIR, "one": replace(STACK, layers=1)}, TRAIN, stores, tmp_path / folder)

    whole = group("whole").run(progress=False)
    for name, steps in (("pair", first), ("one", second)):
        begun = group("killed").members[name]
        for t in range(steps):
            begun.train_on(begun.feed.batch(t))
        if steps:
            begun.save()
    again = group("killed")
    assert [member.step for member in again.members.values()] == [first, second]
    for name, sae in again.run(progress=False).items():
        assert same_weights(sae, whole[name])
