"""Activations that do not vary, that are too large or too small: refused in words, or trained on."""

from dataclasses import replace

import pytest
import torch
from makers import SMALL_SAE as SAE
from makers import SMALL_TRAIN as TRAIN
from makers import D, tokens

from sampled_sae import ActivationStore, Trainer
from sampled_sae.training import training_run


@pytest.fixture
def x():
    return tokens(500, D, dtype=torch.float32) + 0.3


one = torch.linspace(-1, 1, D)


CONSTANT = {
    "one token": one.repeat(500, 1),
    "of 16 bits": one.half().float().repeat(500, 1),
    "rounding apart": one.repeat(500, 1) * (1 + 1e-7 * torch.rand(500, 1)),
    "one far token": torch.cat([1e-12 * tokens(499, D, dtype=torch.float32), torch.ones(1, D)]),
}


@pytest.mark.parametrize("name", CONSTANT)
def test_activations_that_do_not_vary(tmp_path, name):
    store = ActivationStore.write(tmp_path / "store", CONSTANT[name])
    with pytest.raises(ValueError, match=r"store: the activations of the first 64 tokens are all but the same"):
        Trainer(SAE, TRAIN, store, tmp_path / "run")


def test_one_token_a_batch_has_no_variance_and_trains(store, tmp_path):
    Trainer(SAE, replace(TRAIN, batch_size=1), store, tmp_path / "run").run(progress=False)


@pytest.mark.parametrize("size", [1e16, 1e20, 3e38])
def test_activations_whose_squares_overflow(x, tmp_path, size):
    x[77, 3] = size
    with pytest.raises(ValueError, match=r"the activations reach [13]e\+\d\d: must be at most 1e\+15"):
        ActivationStore.write(tmp_path / "store", x)
    with pytest.raises(ValueError, match="must be at most 1e"):
        ActivationStore.write(tmp_path / "store", x.split(50))
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("size", [1e-20, 1e-40])
def test_activations_that_are_all_but_zero(x, tmp_path, size):
    with pytest.raises(ValueError, match=r"the activations are of size .*: must be at least 1e-15"):
        ActivationStore.write(tmp_path / "store", x * size)


def test_large_and_small_activations_train(x, tmp_path):
    for size in (1e10, 1e-10):
        store = ActivationStore.write(tmp_path / f"store{size:g}", x * size)
        sae = Trainer(SAE, TRAIN, store, tmp_path / f"run{size:g}").run(progress=False)
        assert all(p.isfinite().all() for p in sae.parameters())


@pytest.mark.parametrize("step", [0, 7])
def test_a_later_batch_of_copies_stops_the_training_in_words(x, tmp_path, monkeypatch, step):
    """Dead features are asked to reconstruct a residual that is rounding alone."""
    store = ActivationStore.write(tmp_path / "store", x)
    trainer = Trainer(replace(SAE, dead_after=1), TRAIN, store, tmp_path / "run")
    whole = trainer.stream.batch
    copies = one.repeat(64, 1) * (1 + 1e-4 * torch.rand(64, 1, generator=torch.Generator().manual_seed(0)))
    monkeypatch.setattr(trainer.stream, "batch", lambda t: copies if t >= step else whole(t))
    monkeypatch.setattr(training_run, "LARGEST_AUX", 1e4)
    with pytest.raises(
        FloatingPointError, match=r"aux=\S+ at step \d+: .* copies of each other; leave repeated tokens"
    ):
        trainer.run(progress=False)
    assert all(p.isfinite().all() for p in trainer.sae.parameters())
