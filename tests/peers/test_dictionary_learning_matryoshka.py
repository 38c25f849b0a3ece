"""`trainSAE` with our Matryoshka trainer and with dictionary_learning's own, side by side."""

import pytest
import torch
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE as TheirSAE
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer as Theirs
from dictionary_learning_makers import D, F, arguments, assert_same_weights, batches, recording, trained

from sampled_sae.integrations.dictionary_learning import MatryoshkaBatchTopKSAE, MatryoshkaBatchTopKTrainer

GROUPS = {"group_fractions": [0.1, 0.3, 0.6]}
BOTH = (Theirs, MatryoshkaBatchTopKTrainer)


@pytest.mark.parametrize("dead_after", [None, 150])
@pytest.mark.parametrize("weights", [None, [0.5, 0.2, 0.3]])
@pytest.mark.parametrize("shape", [(48, 20, 150, 4), (8, 33, 500, 16)])
def test_losses_and_weights_are_theirs(dead_after, weights, shape, tmp_path):
    B, d, n_features, k = shape
    sizes = {"d": d, "n_features": n_features, "k": k, "group_weights": weights}
    theirs, ours = (trained(t, batches(50, B, d), dead_after=dead_after, **sizes, **GROUPS) for t in BOTH)
    torch.testing.assert_close(ours.losses, theirs.losses, rtol=2e-5, atol=0)
    assert ours.losses[-1] < 0.95 * ours.losses[0]
    assert ours.dead == theirs.dead
    assert (ours.dead > 0) == (dead_after is not None)
    assert torch.equal(ours.num_tokens_since_fired, theirs.num_tokens_since_fired)
    assert_same_weights(ours.ae, theirs.ae, 3e-4)
    assert {name: ours.config[name] for name in theirs.config} == theirs.config
    torch.save(ours.ae.state_dict(), tmp_path / "ae.pt")
    x = batches(1, 30, d, seed=3)[0]
    read = TheirSAE.from_pretrained(tmp_path / "ae.pt")
    torch.testing.assert_close(ours.ae(x), read(x))
    back = MatryoshkaBatchTopKSAE.from_pretrained(tmp_path / "ae.pt", device="cpu")
    assert torch.equal(back(x), ours.ae(x))


def test_in_float64_they_are_theirs_to_seven_places():
    run = {"autocast_dtype": torch.float64}
    data = batches(50, dtype=torch.float64)
    theirs, ours = (trained(t, data, dead_after=150, dtype=torch.float64, run=run, **GROUPS) for t in BOTH)
    torch.testing.assert_close(ours.losses, theirs.losses, rtol=1e-7, atol=0)
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        torch.testing.assert_close(getattr(ours.ae, name), getattr(theirs.ae, name), rtol=0, atol=1e-6)


def test_what_is_logged_and_groups_that_are_switched_off():
    data = batches(12)
    logs = []
    for cls in BOTH:
        trainer = recording(cls, dead_after=150)[0](**arguments(**GROUPS))
        for step, x in enumerate(data[:8]):
            trainer.update(step, x)
        trainer.ae.active_groups = 2
        for step, x in enumerate(data[8:], 8):
            trainer.update(step, x)
        f = trainer.ae.encode(data[0])
        assert f[:, : int(0.4 * F)].any()
        assert not f[:, int(0.4 * F) :].any()
        trainer.ae.active_groups = 3
        log = trainer.loss(data[0], step=12, logging=True)
        logs.append((trainer.losses, log.losses, f))
    (theirs, their_log, their_f), (ours, our_log, our_f) = logs
    torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=0)
    torch.testing.assert_close(our_f, their_f, rtol=1e-3, atol=1e-4)
    assert set(our_log) == set(their_log)
    for name in their_log:
        assert our_log[name] == pytest.approx(their_log[name], rel=1e-4), name


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"group_fractions": [0.5, 0.4]}, r"group_fractions=\[0.5, 0.4\]: must add up to 1"),
        ({"group_fractions": [1.5, -0.5]}, r"group_fractions\[1\]"),
        ({"group_fractions": [0.001, 0.999]}, r"group_sizes\[0\]"),
        ({"group_weights": [1.0]}, "must be as many as group_fractions"),
        ({"dict_class": torch.nn.Linear}, "dict_class"),
    ],
    ids=str,
)
def test_bad_arguments(changes, words):
    with pytest.raises(ValueError, match=words):
        MatryoshkaBatchTopKTrainer(**{**arguments(**GROUPS), **changes})


def test_foreign_files_are_named(tmp_path):
    state = MatryoshkaBatchTopKSAE(D, F, 4, [50, 100], "cpu").state_dict()
    for changes, said in (
        ({"group_sizes": torch.tensor([50, 99])}, "group_sizes"),
        ({"W_enc": torch.ones(3)}, "W_enc=tensor"),
        ({"W_dec": torch.ones(3, 4)}, "W_dec is"),
    ):
        torch.save({**state, **changes}, tmp_path / "ae.pt")
        with pytest.raises(ValueError, match=said):
            MatryoshkaBatchTopKSAE.from_pretrained(tmp_path / "ae.pt")
    with pytest.raises(ValueError, match=r"group_sizes=\[50, 90\]: must add up to dict_size=150"):
        MatryoshkaBatchTopKSAE(D, F, 4, [50, 90], "cpu")
