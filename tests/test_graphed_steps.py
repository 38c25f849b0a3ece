"""Training steps that are captured once and replayed: the same training, with a stub for the graph."""

from contextlib import contextmanager

import pytest
import torch

pytest.importorskip("triton")

from makers import D, same_weights, write_store
from no_host_sync import NoHostSync

from sampled_sae import SampledSAEConfig, TrainConfig, Trainer
from sampled_sae.training import graphed_steps
from sampled_sae.training.graphed_steps import WARM_STEPS, GraphedSteps, graph_refusal

SAE = SampledSAEConfig(
    d_in=D, d_sae=32, k=3, l=2.0, impl="triton", aux_coefficient=1 / 32, dead_after=20, aux_pool=6, k_aux=2
)
# lr rises and falls, so that a rate frozen by the capture would show
TRAIN = TrainConfig(steps=WARM_STEPS + 4, batch_size=8, lr=3e-3, warmup=0.5, decay=0.5, log_every=2, precision="bf16")
GPU = torch.device("cuda")


class Replayed:
    """Does again what was captured; not before it is replayed, and without a look at the device."""

    def __init__(self, call, capturing):
        self.call, self.capturing, self.replays = call, capturing, 0

    def replay(self):
        self.replays += 1
        with self.capturing(), NoHostSync():
            self.out = self.call()


class Graphs:
    """In place of `CudaGraphs`: counts, and says that it captures where a graph would."""

    def __init__(self, monkeypatch):
        self.monkeypatch, self.warmed, self.captured = monkeypatch, 0, []

    @contextmanager
    def capturing(self):
        with self.monkeypatch.context() as patch:
            for place in ("optim", "impl.dead_features", "impl.pool", "impl.ranking", "impl.threshold"):
                patch.setattr(f"sampled_sae.{place}.capturing", lambda: True)
            # on a GPU nothing is checked inside a capture
            patch.setattr("sampled_sae.support.late_values.FiniteInputs.check", lambda self, x: None)
            yield

    def warm(self, call):
        self.warmed += 1
        return call()

    def capture(self, call):
        self.captured.append(Replayed(call, self.capturing))
        return self.captured[-1]


@pytest.fixture
def graphs(monkeypatch):
    monkeypatch.setattr("sampled_sae.training.feed.CALIBRATION_TOKENS", 8)
    return Graphs(monkeypatch)


def trainer(folder, store, sae=SAE, **changes):
    made = Trainer(sae, TrainConfig(**{**vars(TRAIN), **changes}), store, folder)
    made.sae.memory.idle.decide_on_device()
    return made


def graphed(made, graphs):
    made.graphed = GraphedSteps(made.sae, made.optimizer, made.config.precision, made.feed.device, graphs)
    return made


@pytest.mark.one_in(2)
@pytest.mark.parametrize(("l", "adam"), [(2.0, "dense"), (None, "decayed")])
def test_replayed_steps_are_the_same_training(l, adam, graphs, tmp_path):
    store = write_store(tmp_path / "store")
    sae = SampledSAEConfig(**{**SAE.to_dict(), "l": l})
    plain, replayed = (trainer(tmp_path / name, store, sae, adam=adam) for name in ("plain", "replayed"))
    graphed(replayed, graphs)
    for run in (plain, replayed):
        run.run(progress=False)
    assert graphs.warmed == WARM_STEPS
    assert [call.replays for call in graphs.captured] == [TRAIN.steps - WARM_STEPS]
    assert same_weights(plain.sae, replayed.sae)
    assert plain.metrics == replayed.metrics
    assert {float(group["lr"]) for group in replayed.optimizer.param_groups} == {TRAIN.lr_at(TRAIN.steps - 1)}
    assert not any(isinstance(group["lr"], torch.Tensor) for group in replayed.optimizer.param_groups)


def test_another_shape_and_another_config_are_captured_anew(graphs, tmp_path):
    run = graphed(trainer(tmp_path / "run", write_store(tmp_path / "store")), graphs)
    x = run.feed.batch(0).x
    for _ in range(WARM_STEPS + 2):
        run.graphed(x, None)
    assert [call.replays for call in graphs.captured] == [2]
    for _ in range(WARM_STEPS + 1):
        run.graphed(x[:5], None)
    assert [call.replays for call in graphs.captured] == [2, 1]
    run.sae.cfg = SampledSAEConfig(**{**run.sae.cfg.to_dict(), "k": 2})
    run.graphed(x[:5], None)
    assert graphs.warmed == 2 * WARM_STEPS + 1
    assert len(graphs.captured) == 2


def test_a_bad_batch_is_refused_before_it_is_replayed(graphs, tmp_path):
    run = graphed(trainer(tmp_path / "run", write_store(tmp_path / "store")), graphs)
    x = run.feed.batch(0).x
    for _ in range(WARM_STEPS + 1):
        run.graphed(x, None)
    before = run.sae.W_dec.detach().clone()
    x = x.clone()
    x[2, 1] = torch.nan
    with pytest.raises(ValueError, match="values are NaN or inf"):
        run.graphed(x, None)
    assert torch.equal(run.sae.W_dec, before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pool_every": 2}, "pool_every=2: every replay would use one pool"),
        ({"pool": "sample"}, "every replay would use one draw"),
        ({"score_tokens": 0.5}, "every replay would use one draw"),
        ({"impl": "torch"}, "needs impl='triton'"),
    ],
)
def test_what_a_replay_would_freeze_is_refused(changes, message, tmp_path):
    config = SampledSAEConfig(**{**SAE.to_dict(), **changes})
    made = Trainer(config, TrainConfig(steps=2, batch_size=8), write_store(tmp_path / "store"), tmp_path / "run")
    assert message in graph_refusal(made.sae, GPU, False)


def test_trainer_says_why_it_cannot(tmp_path, monkeypatch):
    store = write_store(tmp_path / "store")
    with pytest.raises(ValueError, match="graph=True: needs a GPU, this is cpu"):
        Trainer(SAE, TRAIN, store, tmp_path / "run", graph=True)
    made = Trainer(SAE, TRAIN, store, tmp_path / "run")
    assert graph_refusal(made.sae, GPU, True) == "k_start and l_start change sizes in mid-training"
    assert graph_refusal(made.sae, GPU, False) is None
    monkeypatch.setattr(graphed_steps, "CudaGraphs", lambda device: None)
    monkeypatch.setattr("sampled_sae.training.trainer.graph_refusal", lambda *args: None)
    assert Trainer(SAE, TRAIN, store, tmp_path / "other", graph=True).graphed is not None
