"""Trainings on iterators of activations, which are read once and stored nowhere."""

import re
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from makers import D, same_weights, tokens

from sampled_sae import SampledSAE, SampledSAEConfig, TrainConfig, Trainer
from sampled_sae.training.activation_stream import ActivationStream
from sampled_sae.training.iterator_source import IteratorSource
from sampled_sae.training.sae_group import SAEGroup
from sampled_sae.training.streamed_batches import StreamedBatches
from sampled_sae.training.sweep import run_sweep
from sampled_sae.training.training_run import METRICS

SAE = SampledSAEConfig(d_in=D, d_sae=48, k=3, l=2.0)
TRAIN = TrainConfig(steps=20, batch_size=32, checkpoint_every=6, log_every=2, lr=3e-3)
X = 2 * tokens(1000, D, dtype=torch.float32, seed=3) + 1


def chunks(x=X, size=17):
    """A generator of so many tokens a time."""
    yield from x.split(size)


class Placed:
    """An iterator that says where it is."""

    def __init__(self, x=X, size=17):
        self.x, self.size, self.at = x, size, 0

    def __iter__(self):
        return self

    def __next__(self):
        if self.at >= len(self.x):
            raise StopIteration
        self.at += self.size
        return self.x[self.at - self.size : self.at]

    def state_dict(self):
        return {"at": self.at, "tensor": torch.tensor(self.at), "numpy": np.int64(self.at), "pair": (1, None)}

    def load_state_dict(self, state):
        assert state["pair"] == (1, None)
        self.at = state["at"]


def stream_of(x, buffer_tokens=128):
    return ActivationStream(IteratorSource(x), buffer_tokens)


def batches_of(x, steps=20, buffer_tokens=128, batch_size=32):
    return StreamedBatches(stream_of(x, buffer_tokens).parts[0], batch_size, 0, steps)


def killed_at(step, x, folder, train=TRAIN):
    """A training that ends without a word right before `step`."""
    begun = Trainer(SAE, train, stream_of(x), folder)
    for t in range(step):
        begun.train_on(begun.feed.batch(t))
        if begun.step % train.checkpoint_every == 0:
            begun.save()
    return begun


def test_every_token_comes_once_within_its_block():
    batches = batches_of(chunks(), steps=12)
    seen = [batches.batch(t) / batches.scale for t in range(12)]
    # a block is the next chunks of 17 with at least 128 tokens: 136, of which 8 fill no batch
    for block in range(3):
        found = torch.cat(seen[4 * block : 4 * block + 4])
        given = X[136 * block : 136 * (block + 1)]
        places = (found[:, None] - given).abs().sum(2).argmin(1)
        torch.testing.assert_close(found, given[places])
        assert len(set(places.tolist())) == 128, "none twice"
        assert places.tolist() != sorted(places.tolist()), "shuffled"


def test_the_scale_is_that_of_the_first_block():
    batches = batches_of(chunks())
    first = X[:136].double()
    assert batches.scale == pytest.approx(float((D / first.square().sum(1).mean()).sqrt()), rel=1e-12)
    short = batches_of(chunks(), steps=2)
    assert short.scale == pytest.approx(float((D / X[:68].double().square().sum(1).mean()).sqrt()), rel=1e-12)


def test_a_stream_is_read_no_further_than_needed_and_its_last_blocks_are_even():
    given = []

    def watched():
        for chunk in X.split(16):
            given.append(len(chunk))
            yield chunk

    batches = batches_of(watched(), steps=9)
    with batches.reading_ahead():
        for t in range(9):
            batches.batch(t)
            assert sum(given) <= 9 * 32
        # 9 batches, 4 a block: 4, then 5 in two blocks
        assert batches.calibration_batches(100) == range(7, 9)
    assert sum(given) == 9 * 32


def test_the_next_block_is_read_on_a_thread_meanwhile():
    asked, may_go_on = threading.Event(), threading.Event()

    def slow():
        for i, chunk in enumerate(X.split(128)):
            if i == 1:
                asked.set()
                assert may_go_on.wait(60)
            yield chunk

    batches = batches_of(slow())
    with batches.reading_ahead():
        batches.batch(0)
        assert asked.wait(60), "nobody has asked for batch 4 yet"
        batches.batch(3)
        may_go_on.set()
        batches.batch(4)
    assert not any("activations" in thread.name for thread in threading.enumerate())


@pytest.mark.parametrize("make", [chunks, Placed, lambda: list(chunks())], ids=["generator", "placed", "list"])
@pytest.mark.parametrize("step", [3, 15])
def test_a_resumed_training_equals_an_uninterrupted_one_bit_for_bit(tmp_path, make, step):
    whole = Trainer(SAE, TRAIN, stream_of(make()), tmp_path / "whole").run(progress=False)
    killed_at(step, make(), tmp_path / "run")
    resumed = Trainer(SAE, TRAIN, stream_of(make()), tmp_path / "run")
    assert resumed.step == step // 6 * 6
    assert same_weights(resumed.run(progress=False), whole)
    assert (tmp_path / "run" / METRICS).read_bytes() == (tmp_path / "whole" / METRICS).read_bytes()
    again = Trainer(SAE, TRAIN, stream_of(make()), tmp_path / "run").run(progress=False)
    assert same_weights(again, whole), "ended already, calibrated again"


def test_a_loader_of_a_tensor_is_an_iterator_of_it(tmp_path):
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X), batch_size=17)
    assert isinstance(next(iter(loader)), list)
    found = Trainer(SAE, TRAIN, stream_of(loader), tmp_path / "loader").run(progress=False)
    assert same_weights(found, Trainer(SAE, TRAIN, stream_of(chunks()), tmp_path / "chunks").run(progress=False))


def test_a_trainer_and_a_group_take_an_iterator_itself(tmp_path):
    alone = Trainer(SAE, TRAIN, chunks(), tmp_path / "alone").run(progress=False)
    configs = {"one": SAE, "two": replace(SAE, l=None)}
    group = SAEGroup(configs, TRAIN, chunks(), tmp_path / "group").run(progress=False)
    assert same_weights(group["one"], alone)
    assert SampledSAE.from_pretrained(tmp_path / "group" / "two").cfg.l is None


def test_a_group_whose_members_stand_at_different_steps_goes_on(tmp_path):
    configs = {"one": SAE, "two": replace(SAE, l=None)}
    whole = SAEGroup(configs, TRAIN, stream_of(chunks()), tmp_path / "whole").run(progress=False)
    group = SAEGroup(configs, TRAIN, stream_of(chunks()), tmp_path / "group")
    for t in range(9):
        for name, member in group.members.items():
            if t < 5 or name == "one":
                member.train_on(member.feed.batch(t))
        if t == 4:
            group.members["two"].save()
    group.members["one"].save()
    resumed = SAEGroup(configs, TRAIN, stream_of(chunks()), tmp_path / "group")
    assert [member.step for member in resumed.members.values()] == [9, 5]
    found = resumed.run(progress=False)
    assert all(same_weights(found[name], whole[name]) for name in configs)


def test_what_does_not_go_on_is_refused(tmp_path):
    begun = killed_at(12, chunks(), tmp_path)
    with pytest.raises(ValueError, match=r"does not give the activations that it gave before: chunk \d+ is another"):
        Trainer(SAE, TRAIN, stream_of(chunks(X.flip(0))), tmp_path).run(progress=False)
    used = chunks()
    next(used)
    with pytest.raises(ValueError, match="does not give the activations that it gave before"):
        Trainer(SAE, TRAIN, stream_of(used), tmp_path).run(progress=False)
    with pytest.raises(ValueError, match=r"data: buffer_tokens\): buffer_tokens was 128, is 64"):
        Trainer(SAE, TRAIN, stream_of(chunks(), 64), tmp_path)
    with pytest.raises(ValueError, match=r"activations: was a stream\); use another folder"):
        Trainer(SAE, TRAIN, X, tmp_path)
    Trainer(SAE, TRAIN, X, tmp_path / "stored").save()
    with pytest.raises(ValueError, match=r"activations: was stored activations\)"):
        Trainer(SAE, TRAIN, stream_of(chunks()), tmp_path / "stored")
    with pytest.raises(ValueError, match="has been read from, and has no state_dict"):
        begun.feed.batch(0)


def test_more_steps_read_on_where_the_finished_run_ended(tmp_path):
    short = replace(TRAIN, steps=8)
    Trainer(SAE, short, stream_of(chunks()), tmp_path).run(progress=False)
    longer = Trainer(SAE, TRAIN, stream_of(chunks()), tmp_path)
    assert longer.step == 8
    seen = longer.feed.batch(8).x / longer.feed.scale
    # two blocks of 136 tokens were read
    assert float((seen[:, None] - X[272:]).abs().sum(2).min(1).values.max()) < 1e-4
    assert longer.run(progress=False) is longer.sae


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        (lambda: chunks(X[:300]), ValueError, r"steps=20: .* has ended, with tokens for 9 steps of batch_size=32"),
        (lambda: iter([]), ValueError, "holds no activations"),
        (lambda: [], ValueError, "holds no activations"),
        (lambda: [X[:0], X[:0]], ValueError, "has ended, with tokens for 0 steps"),
        (lambda: iter([X[:64], X[:64, :5]]), ValueError, r"chunk 1: shape=\(64, 5\): must be \[n, 12\]"),
        (lambda: iter([X[:64].long()]), TypeError, "x, chunk 0: dtype=torch.int64"),
        (lambda: iter([X[:64], X[:64] * torch.nan]), ValueError, "chunk 1: nan at token 0, dimension 0"),
        (lambda: [X[:64], None, X[64:]], TypeError, "x, chunk 1: NoneType: must be a torch.Tensor"),
        (lambda: iter(["text"]), TypeError, "x, chunk 0: str: must be a torch.Tensor"),
        (lambda: iter([(X[:64], X[:64])]), ValueError, r"a stream of 2 parts; give one of them, stream.pair\(\)"),
        (lambda: iter([X[:64].view(32, 2, D)]), ValueError, r"layers side by side give StackedActivations\(x.unbind"),
        (lambda: iter([X[:700] * 0]), ValueError, "the first 700 activations have a mean square of 0"),
        (lambda: {"x": X}, TypeError, "store=dict: must be"),
    ],
)
def test_iterators_that_cannot_be_trained_on_are_named(tmp_path, given, error, said):
    with pytest.raises(error, match=said):
        Trainer(SAE, TRAIN, given(), tmp_path).run(progress=False)


def test_an_error_of_the_iterator_is_that_of_the_training_and_the_checkpoint_stays(tmp_path):
    def failing():
        yield from X[:300].split(20)
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        Trainer(SAE, TRAIN, stream_of(failing()), tmp_path).run(progress=False)
    resumed = Trainer(SAE, TRAIN, stream_of(X.split(20)), tmp_path)
    assert resumed.step == 6
    assert same_weights(
        resumed.run(progress=False), Trainer(SAE, TRAIN, stream_of(X.split(20)), tmp_path / "b").run(progress=False)
    )


def test_a_list_begins_anew_at_its_end_and_a_place_must_be_plain(tmp_path):
    batches = batches_of([X[:50], X[50:64]], steps=6)
    both = torch.cat([batches.batch(t) for t in range(4)]) / batches.scale
    assert float((both[:, None] - X[:64]).abs().sum(2).min(1).values.max()) < 1e-4
    odd = Placed()
    odd.state_dict = lambda: {"file": object()}
    with pytest.raises(TypeError, match=r"state_dict\(\) of the iterator holds a object"):
        Trainer(SAE, TRAIN, odd, tmp_path)


def test_what_streams_do_not_serve_is_refused(tmp_path):
    with pytest.raises(ValueError, match="an iterator, which holds out nothing"):
        run_sweep({"one": SAE}, TRAIN, stream_of(chunks()), tmp_path)
    with pytest.raises(ValueError, match="lanes=2: the iterator is read by the process that it was given to"):
        Trainer(SAE, TRAIN, chunks(), tmp_path, lanes=2)
    with pytest.raises(ValueError, match="batch_size=32: must be at most 16, the buffer_tokens"):
        Trainer(SAE, TRAIN, stream_of(chunks(), 16), tmp_path)
    with pytest.raises(MemoryError, match="buffer_tokens=1000000000000"):
        stream_of(chunks(), 10**12)


def test_the_page_runs(tmp_path, monkeypatch, capsys):
    page = (Path(__file__).resolve().parent.parent / "docs" / "activations.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    for block in blocks:
        exec(block, {})
    assert len(blocks) == 2
    assert float(capsys.readouterr().out) > 0
    assert {"my_sae", "streamed_sae"} == {path.name for path in tmp_path.iterdir()}
