"""The dictionaries, and the files that `trainSAE` leaves: read by dictionary_learning, and its by us."""

from types import SimpleNamespace

import pytest
import torch
from dictionary_learning.evaluation import evaluate
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE as TheirBatchTopKSAE
from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer as TheirBatchTopK
from dictionary_learning.utils import load_dictionary
from dictionary_learning_makers import (
    BOTH,
    DICTIONARIES,
    TRAINERS,
    D,
    Data,
    F,
    K,
    arguments,
    assert_same_weights,
    batches,
    recording,
    trained,
)

from sampled_sae import formats
from sampled_sae.integrations.dictionary_learning import BatchTopKSAE, BatchTopKTrainer


@BOTH
@pytest.mark.parametrize("normalize", [False, True])
def test_their_loader_reads_what_we_train(kind, normalize, tmp_path):
    data = batches(30)
    run = {"normalize_activations": normalize, "save_steps": [20]}
    theirs, ours = (trained(t, data, tmp_path / str(i), run=run) for i, t in enumerate(TRAINERS[kind]))
    folder = tmp_path / "1" / "trainer_0"
    loaded, config = load_dictionary(str(folder), "cpu")
    their_class, our_class = DICTIONARIES[kind]
    assert type(loaded) is their_class
    expected = {k: v for k, v in theirs.config.items() if k != "norm_factor"}
    assert {k: v for k, v in config["trainer"].items() if k in expected} == expected
    assert config["buffer"] == Data().config

    x = data[0]
    for use_threshold in (True, False):
        f = loaded.encode(x, use_threshold=use_threshold)
        torch.testing.assert_close(ours.ae.encode(x, use_threshold=use_threshold), f, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.ae.decode(f), loaded.decode(f))
    for ae, reference in ((ours.ae, loaded), (our_class.from_pretrained(folder / "ae.pt", k=K), loaded)):
        x_hat, f = ae(x, output_features=True)
        torch.testing.assert_close((x_hat, f), reference(x, output_features=True), rtol=1e-5, atol=1e-5)
        assert torch.equal(ae(x), x_hat)
    # a boundary case may be kept by one run and not by the other
    assert_same_weights(ours.ae, theirs.ae, 3e-3)

    checkpoint = their_class.from_pretrained(tmp_path / "1" / "trainer_0" / "checkpoints" / "ae_20.pt")
    reference = their_class.from_pretrained(tmp_path / "0" / "trainer_0" / "checkpoints" / "ae_20.pt")
    assert_same_weights(checkpoint, reference, 3e-3)


@BOTH
def test_what_the_file_holds(kind, tmp_path):
    ours = trained(TRAINERS[kind][1], batches(15), tmp_path)
    state = torch.load(tmp_path / "trainer_0" / "ae.pt", weights_only=True)
    shapes = {"encoder.weight": (F, D), "encoder.bias": (F,), "decoder.weight": (D, F), "b_dec": (D,)}
    assert {name: tuple(t.shape) for name, t in state.items()} == {**shapes, "k": (), "threshold": ()}
    assert all(t.is_contiguous() for t in state.values())
    assert state["k"].dtype == torch.int32
    assert state["threshold"].dtype == torch.float32
    assert torch.equal(state["encoder.weight"], ours.ae.encoder.weight)
    assert torch.equal(state["decoder.weight"], ours.ae.decoder.weight)


@BOTH
def test_we_read_what_they_train(kind, tmp_path):
    theirs = trained(TRAINERS[kind][0], batches(30), tmp_path)
    folder = tmp_path / "trainer_0"
    ours = DICTIONARIES[kind][1].from_pretrained(folder / "ae.pt")
    assert all(torch.equal(ours.state_dict()[name], t) for name, t in theirs.ae.state_dict().items())
    x = batches(1, seed=3)[0].view(4, 12, D)
    for use_threshold in (True, False):
        expected = theirs.ae.encode(x.view(-1, D), use_threshold=use_threshold).view(4, 12, F)
        torch.testing.assert_close(ours.encode(x, use_threshold=use_threshold), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours(x), theirs.ae(x), rtol=1e-5, atol=1e-5)

    sae = formats.load(folder)
    assert (sae.cfg.k, sae.cfg.l, sae.cfg.select) == (K, None, kind)
    torch.testing.assert_close(sae.encode(x), ours.encode(x, use_threshold=kind == "batch"))


@BOTH
def test_training_goes_on_from_a_checkpoint(kind, tmp_path):
    data = batches(40)
    whole = trained(TRAINERS[kind][1], data, tmp_path, run={"save_steps": [20]})
    trainer = recording(TRAINERS[kind][1])[0](**arguments(steps=40, decay_start=None))
    trainer.ae.load_state_dict(torch.load(tmp_path / "trainer_0" / "checkpoints" / "ae_20.pt"))
    # the first loss depends on the weights alone; Adam's moments are in no file of theirs
    trainer.update(20, data[20])
    assert trainer.losses[0] == pytest.approx(whole.losses[20], rel=1e-6)


def test_the_normalisation_factor_is_kept():
    theirs, ours = (
        trained(t, batches(8), run={"normalize_activations": True}, threshold_start_step=0) for t in TRAINERS["batch"]
    )
    norm = torch.stack([x.square().sum(1).mean() for x in batches(8)]).mean().sqrt()
    assert ours.config["norm_factor"] == pytest.approx(float(norm), rel=1e-5)
    assert "norm_factor" not in theirs.config


@BOTH
@pytest.mark.parametrize("threshold", [-1.0, 0.0, 0.75])
def test_scale_biases(kind, threshold):
    made = []
    for cls in DICTIONARIES[kind]:
        torch.manual_seed(0)
        ae = cls(D, F, K)
        with torch.no_grad():
            ae.encoder.bias.copy_(torch.linspace(-1, 1, F))
            ae.b_dec.copy_(torch.linspace(-2, 1, D))
            ae.threshold.fill_(threshold)
        ae.scale_biases(2.5)
        made.append(ae)
    assert_same_weights(made[1], made[0], 0)


@BOTH
@pytest.mark.parametrize("threshold", [-1.0, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_encode_returns_what_theirs_does(kind, threshold, dtype):
    made = []
    for cls in DICTIONARIES[kind]:
        torch.manual_seed(0)
        ae = cls(D, F, K)
        ae.threshold.fill_(threshold)
        with torch.no_grad():
            ae.b_dec.copy_(torch.linspace(0, 1, D))
        made.append(ae)
    x = batches(1)[0].to(dtype)
    flag = "return_active" if kind == "batch" else "return_topk"
    for use_threshold in (True, False):
        theirs, ours = (list(ae.encode(x, use_threshold=use_threshold, **{flag: True})) for ae in made)
        if kind == "token":
            order = [values.argsort(1, descending=True) for values in (theirs[1], ours[1])]
            for found, by in zip((theirs, ours), order):
                found[1:3] = found[1].gather(1, by), found[2].gather(1, by)
        for a, b in zip(ours, theirs):
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(made[1](x), made[0](x), rtol=1e-5, atol=1e-5)


def test_their_trainer_sets_our_threshold():
    """It assigns the attribute."""
    f = torch.tensor([[0.0, 2.0, 0.5]])
    made = []
    for cls in DICTIONARIES["batch"]:
        trainer = SimpleNamespace(ae=cls(D, F, K), threshold_beta=0.9)
        for batch in (f, 3 * f):
            TheirBatchTopK.update_threshold(trainer, batch)
        made.append(trainer.ae)
    assert float(made[1].threshold) == pytest.approx(0.9 * 0.5 + 0.1 * 1.5)
    assert torch.equal(made[1].threshold, made[0].threshold)
    held = made[1].sae.threshold
    made[1].threshold = torch.tensor(0.25, dtype=torch.float64)
    assert held is made[1].sae.threshold
    assert (float(held), held.dtype, int(made[1].sae.threshold_steps)) == (0.25, torch.float32, 1)
    made[1].threshold = -1
    assert int(made[1].sae.threshold_steps) == 0


def test_their_evaluation_runs_on_ours(tmp_path):
    theirs, ours = (trained(t, batches(30)) for t in TRAINERS["batch"])
    found = [evaluate(run.ae, iter(batches(4, seed=9)), n_batches=3) for run in (theirs, ours)]
    assert found[1] == pytest.approx(found[0], rel=1e-3)


def test_gradients_reach_the_parameters():
    torch.manual_seed(0)
    ours = BatchTopKSAE(D, F, K)
    ours.threshold.fill_(0.5)
    ours(batches(1)[0]).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in ours.parameters())


@BOTH
def test_initial_weights_and_random_stream_are_theirs(kind):
    ends = []
    for cls in DICTIONARIES[kind]:
        torch.manual_seed(5)
        ends.append((cls(D, F, K), torch.rand(3)))
    assert_same_weights(ends[1][0], ends[0][0], 0)
    assert torch.equal(ends[0][1], ends[1][1])


@BOTH
def test_files_of_other_versions(kind, tmp_path):
    theirs, ours = DICTIONARIES[kind]
    ae = theirs(D, F, K)
    state = {name: t for name, t in ae.state_dict().items() if name not in ("k", "threshold")}
    torch.save(state, tmp_path / "ae.pt")
    with pytest.raises(ValueError, match="k=None"):
        ours.from_pretrained(tmp_path / "ae.pt")
    loaded = ours.from_pretrained(tmp_path / "ae.pt", k=K)
    assert float(loaded.threshold) == -1
    x = batches(1)[0]
    torch.testing.assert_close(loaded.encode(x), ae.encode(x))


def test_bad_files(tmp_path):
    path = tmp_path / "ae.pt"
    with pytest.raises(ValueError, match="no such file"):
        BatchTopKSAE.from_pretrained(path)
    path.write_bytes(b"PK\x03\x04 half a file")
    with pytest.raises(ValueError, match="truncated"):
        BatchTopKSAE.from_pretrained(path)
    state = TheirBatchTopKSAE(D, F, K).state_dict()
    for changed, words in (
        ({k: v for k, v in state.items() if k != "b_dec"}, "b_dec"),
        ({k: v for k, v in state.items() if k != "encoder.weight"}, "encoder.weight"),
        ({**state, "decoder.weight": torch.zeros(F, D)}, "decoder.weight"),
    ):
        torch.save(changed, path)
        with pytest.raises(ValueError, match=words):
            BatchTopKSAE.from_pretrained(path)
    torch.save(state, path)
    with pytest.raises(ValueError, match="k=9"):
        BatchTopKSAE.from_pretrained(path, k=9)


def test_loading_weights_of_another_k_changes_k():
    ours, theirs = BatchTopKSAE(D, F, K), TheirBatchTopKSAE(D, F, 9)
    ours.load_state_dict(theirs.state_dict())
    x = batches(1)[0]
    torch.testing.assert_close(ours.encode(x, use_threshold=False), theirs.encode(x, use_threshold=False))
    assert int(ours.k) == 9


def test_the_sae_inside_is_a_whole_one(tmp_path):
    """Saved, loaded and trained on, it goes on from the threshold it had."""
    ours = trained(BatchTopKTrainer, batches(30), tmp_path)
    again = BatchTopKSAE.from_pretrained(tmp_path / "trainer_0" / "ae.pt")
    x = batches(1)[0]
    for sae in (ours.ae.sae, again.sae):
        before = float(sae.threshold)
        sae.train()(x)
        assert float(sae.threshold) == pytest.approx(before, rel=0.01)


@BOTH
def test_shown_weights_are_saved_as_ordinary_tensors(kind, tmp_path):
    ae = DICTIONARIES[kind][1](D, F, K)
    torch.save({"W": ae.encoder.weight, "decoder": ae.decoder.weight}, tmp_path / "weights.pt")
    saved = torch.load(tmp_path / "weights.pt", weights_only=True)
    assert type(saved["W"]) is torch.Tensor
    assert torch.equal(saved["decoder"], ae.decoder.weight)
    assert type(ae.encoder.weight + 1) is torch.Tensor
