"""A training on a language model at work goes on with the texts that it began with alone."""

import json

import pytest
import torch
from makers import same_weights
from small_texts import Numbers, numbered_texts
from tiny_models import D, llama

from sampled_sae import SampledSAEConfig, TrainConfig, Trainer
from sampled_sae.lm import ModelSource, RowReader
from sampled_sae.training.activation_stream import ActivationStream

CONFIG = SampledSAEConfig(d_in=D, d_sae=32, k=3)
TRAIN = TrainConfig(steps=10, batch_size=16)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return llama().eval()


def trainer(model, texts, folder):
    source = ModelSource(model, RowReader(texts, Numbers(), 8), (1,), batch_size=3, drop_tokens=(0,))
    return Trainer(CONFIG, TRAIN, ActivationStream(source, 32).parts[0], folder)


def changed(which):
    return lambda: (text + " 7" if i == which else text for i, text in enumerate(numbered_texts()))


def test_a_resumed_training_refuses_texts_that_have_changed(model, tmp_path):
    begun = trainer(model, numbered_texts, tmp_path / "run")
    for t in range(7):
        begun.train_on(begun.feed.batch(t))
    begun.save()
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=False)["stream"]["source"]
    read = state["rows"]["pieces"]
    assert read > 3
    for texts in (changed(0), changed(read - 1), lambda: numbered_texts(read - 1), lambda: iter([])):
        with pytest.raises(ValueError, match=f"texts: are not those .* in their first {read} pieces"):
            trainer(model, texts, tmp_path / "run").run(progress=False)
    whole = trainer(model, numbered_texts, tmp_path / "whole").run(progress=False)
    assert same_weights(trainer(model, numbered_texts, tmp_path / "run").run(progress=False), whole)


def test_each_share_and_each_place_knows_what_was_before_it():
    for which, of in ((0, 1), (0, 2), (1, 2)):
        whole = RowReader(numbered_texts, Numbers(), 8).share(which, of)
        whole.take(5)
        whole.deal()
        whole.take(11)
        place, rest = json.loads(json.dumps(whole.state_dict())), whole.take(None)
        again = RowReader(numbered_texts, Numbers(), 8).share(which, of)
        again.load_state_dict(place)
        assert torch.equal(again.take(None), rest)
        other = RowReader(changed(1), Numbers(), 8).share(which, of)
        other.load_state_dict(place)
        with pytest.raises(ValueError, match="texts: are not those that were read before"):
            other.take(None)
        del place["crc32"]  # as an earlier version wrote it
        other.load_state_dict(place)
        assert len(other.take(1)) == 1
