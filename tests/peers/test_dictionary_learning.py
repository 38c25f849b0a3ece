"""`trainSAE` with our trainers and with dictionary_learning's own, side by side."""

import queue
from types import MappingProxyType

import pytest
import torch
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE as TheirBatchTopKSAE
from dictionary_learning.training import log_stats
from dictionary_learning_makers import (
    BOTH,
    TRAINERS,
    D,
    F,
    arguments,
    assert_same_weights,
    batches,
    recording,
    trained,
)
from no_host_sync import NoHostSync, allow_late_scalars
from torch.utils._python_dispatch import TorchDispatchMode

from sampled_sae.integrations.dictionary_learning import BatchTopKSAE, BatchTopKTrainer, SampledTrainer, TopKTrainer


@BOTH
@pytest.mark.parametrize("dead_after", [None, 150])
@pytest.mark.parametrize("shape", [(48, 20, 150, 4), (37, 11, 83, 3), (8, 33, 500, 16)])
def test_losses_and_weights_are_theirs(kind, dead_after, shape):
    B, d, n_features, k = shape
    data = batches(50, B, d)
    theirs, ours = (
        trained(trainer, data, dead_after=dead_after, d=d, n_features=n_features, k=k) for trainer in TRAINERS[kind]
    )
    torch.testing.assert_close(ours.losses, theirs.losses, rtol=2e-5, atol=0)
    assert ours.losses[-1] < 0.95 * ours.losses[0]
    assert (ours.dead > 0) == (dead_after is not None)
    assert ours.dead == theirs.dead
    assert torch.equal(ours.num_tokens_since_fired, theirs.num_tokens_since_fired)
    assert_same_weights(ours.ae, theirs.ae, 3e-4)
    assert float(ours.ae.threshold) > 0


@BOTH
def test_in_float64_losses_and_weights_are_theirs_to_seven_places(kind):
    data = batches(50, dtype=torch.float64)
    run = {"autocast_dtype": torch.float64}
    theirs, ours = (trained(t, data, dead_after=150, dtype=torch.float64, run=run) for t in TRAINERS[kind])
    assert ours.dead == theirs.dead > 0
    torch.testing.assert_close(ours.losses, theirs.losses, rtol=1e-7, atol=0)
    ours, theirs = ours.ae.state_dict(), theirs.ae.state_dict()
    for name in ("encoder.weight", "encoder.bias", "decoder.weight", "b_dec"):
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-6)


@BOTH
def test_bfloat16_activations(kind):
    data = batches(20)
    run = {"autocast_dtype": torch.bfloat16}
    theirs, ours = (trained(t, data, run=run) for t in TRAINERS[kind])
    # theirs takes the geometric median in bfloat16
    torch.testing.assert_close(ours.losses, theirs.losses, rtol=1e-2, atol=0)


@BOTH
def test_what_is_logged(kind, capsys):
    data = batches(30)
    logs = []
    for cls in TRAINERS[kind]:
        trainer = recording(cls, dead_after=150)[0](**arguments(steps=30, decay_start=None))
        for step, x in enumerate(data):
            trainer.update(step, x)
        lines = queue.Queue()
        log_stats([trainer], 30, data[0], False, False, log_queues=[lines], verbose=True)
        logs.append(lines.get_nowait())
    theirs, ours = logs
    assert "Step 30: L0 = " in capsys.readouterr().out
    assert set(ours) == set(theirs)
    assert theirs["dead_features"] > 0
    for name in theirs:
        assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name


class Largest(TorchDispatchMode):
    """The most elements of a tensor that an operation gave; in a sparse one not all are there."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor) and t.layout == torch.strided:
                self.elements = max(self.elements, t.numel())
        return out


@pytest.mark.parametrize(
    ("trainer", "other"),
    [(BatchTopKTrainer, {}), (TopKTrainer, {}), (SampledTrainer, {"l": 4.0}), (SampledTrainer, {"l": 16.0})],
)
def test_no_update_forms_a_matrix_of_tokens_and_features(trainer, other):
    B, n_features = 600, 12000
    run = trainer(**arguments(d=8, n_features=n_features, k=2, **other))
    run.dead_feature_threshold = 3 * B
    data = batches(6, B, 8)
    for step in range(5):
        run.update(step, data[step])
    assert run.dead_features > 100
    with Largest() as largest:
        run.update(5, data[5])
    assert 0 < largest.elements < B * n_features / 2
    with Largest() as largest:
        run.loss(data[5], step=5, logging=True)
    assert largest.elements >= B * n_features, "this test can fail"


def test_threshold_where_nothing_or_little_is_active():
    data = batches(6)
    for cls in (BatchTopKTrainer, TopKTrainer):
        run = cls(**arguments(threshold_start_step=0))
        for step, x in enumerate(data[:3]):
            run.update(step, x)
        before = float(run.ae.threshold)
        with torch.no_grad():
            run.ae.encoder.bias.fill_(-1e6)
        run.update(3, data[3])
        # theirs: the mean moves towards 0 in BatchTopK, and is inf for ever in TopK
        assert float(run.ae.threshold) == pytest.approx(0.999 * before)


def test_a_token_that_keeps_nothing_is_left_out_of_topk_s_threshold():
    run = TopKTrainer(**arguments(threshold_start_step=0))
    x = batches(1)[0]
    run.update(0, x)
    x[5] = run.ae.b_dec.detach()
    f = run.ae.encode(x)
    assert not f[5].any()
    smallest = torch.where(f > 0, f, torch.inf).amin(1)
    run.loss(x, step=1)
    assert float(run.ae.threshold) == pytest.approx(smallest[smallest < torch.inf].mean().item(), rel=1e-6)


def test_first_step_where_a_token_is_the_median():
    run = BatchTopKTrainer(**arguments())
    x = batches(1)[0][:1]
    assert torch.isfinite(run.update(0, x))
    torch.testing.assert_close(run.ae.b_dec.detach(), x[0], rtol=1e-4, atol=1e-4)


def test_no_aux_loss_when_its_weight_is_zero():
    runs = [trained(BatchTopKTrainer, batches(20), dead_after=after, auxk_alpha=0.0) for after in (None, 50)]
    assert runs[0].losses == runs[1].losses
    assert runs[1].dead > 0
    assert runs[1].pre_norm_auxk_loss == -1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"k": 0}, "k=0"),
        ({"k": 2.5}, "k=2.5"),
        ({"k": F + 1}, f"k={F + 1}"),
        ({"steps": 0}, "steps=0"),
        ({"warmup_steps": 50}, "warmup_steps=50"),
        ({"decay_start": 3}, "decay_start=3"),
        ({"layer": None}, "layer=None"),
        ({"lr": -1.0}, "lr=-1.0"),
        ({"auxk_alpha": -1.0}, "auxk_alpha=-1.0"),
        ({"threshold_beta": 1.5}, "threshold_beta=1.5"),
        ({"dict_class": torch.nn.Linear}, "dict_class"),
        ({"device": "tpu"}, "device='tpu'"),
        ({"activation_dim": 0}, "activation_dim=0"),
        ({"l": 2.0}, "'l'"),
    ],
    ids=str,
)
def test_bad_arguments(changes, words):
    config = arguments(**changes)
    with pytest.raises((ValueError, TypeError), match=words):
        BatchTopKTrainer(**config)


def test_bad_activations():
    run = BatchTopKTrainer(**arguments())
    for x, words in (
        (torch.zeros(3, D + 1), "d_in=20"),
        (torch.zeros(0, D), "empty"),
        (torch.full((2, D), torch.nan), "NaN"),
    ):
        with pytest.raises(ValueError, match=words):
            run.update(0, x)


def test_dict_class_may_be_theirs_or_ours():
    for dict_class in (TheirBatchTopKSAE, BatchTopKSAE):
        assert type(BatchTopKTrainer(**arguments(dict_class=dict_class)).ae) is BatchTopKSAE


@BOTH
def test_defaults_are_theirs(kind):
    given = {name: value for name, value in arguments().items() if name in ("activation_dim", "dict_size", "k")}
    theirs, ours = (cls(steps=2000, layer=1, lm_name="a-model", device="cpu", **given) for cls in TRAINERS[kind])
    assert {name: ours.config[name] for name in theirs.config} == theirs.config
    assert ours.dead_feature_threshold == theirs.dead_feature_threshold
    assert [g["lr"] for g in ours.optimizer.param_groups] == [theirs.optimizer.param_groups[0]["lr"]] * 4


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="in Triton's interpreter")
@BOTH
def test_on_triton_losses_are_theirs_and_nothing_waits_for_the_device(kind, monkeypatch):
    class OnTriton(TRAINERS[kind][1]):
        rule = MappingProxyType({"impl": "triton"})

    data = batches(3)
    theirs, ours = (cls(**arguments(threshold_start_step=0)) for cls in (TRAINERS[kind][0], OnTriton))
    assert ours.ae.sae.impl_in_use == "triton"
    expected = [theirs.update(step, x) for step, x in enumerate(data)]
    found = [ours.update(0, data[0])]
    # on a CPU the check for NaN asks at once
    monkeypatch.setattr(ours._memory.inputs, "check", lambda x: None)
    allow_late_scalars(monkeypatch)
    with NoHostSync() as mode:
        found += [ours.update(step, data[step]) for step in (1, 2)]
    assert mode.seen
    torch.testing.assert_close([float(loss) for loss in found], expected, rtol=1e-5, atol=0)
    assert float(ours.ae.threshold) == pytest.approx(float(theirs.ae.threshold), rel=1e-5)
