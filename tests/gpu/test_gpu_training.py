"""A training on a GPU: the host does not wait between two lines of metrics, and a bad loss is found all the same."""

from dataclasses import replace

import pytest
import torch
from makers import SMALL_SAE as SAE

from sampled_sae.training.checkpoint import CHECKPOINT
from sampled_sae.training.train_config import TrainConfig
from sampled_sae.training.trainer import Trainer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

TRAIN = TrainConfig(steps=40, batch_size=64, checkpoint_every=100, log_every=20)


@pytest.mark.parametrize("l", [2.0, None])
def test_the_host_does_not_wait(store, tmp_path, l):
    trainer = Trainer(replace(SAE, l=l), TRAIN, store, tmp_path / "run", device="cuda")
    trainer.sae.train()
    for t in range(18):
        batch = trainer.feed.batch(t)
        torch.cuda.set_sync_debug_mode("error" if t > 9 else "default")
        try:
            trainer.train_on(batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_a_bad_loss_is_named_and_never_saved(store, tmp_path):
    train = replace(TRAIN, checkpoint_every=3)
    trainer = Trainer(replace(SAE, aux_coefficient=3e38), train, store, tmp_path / "run", device="cuda")
    with pytest.raises(FloatingPointError, match=r"^loss=inf at step 5; the last checkpoint in \S+ is intact$"):
        trainer.run(progress=False)
    assert torch.load(tmp_path / "run" / CHECKPOINT, weights_only=True)["step"] == 3


@pytest.mark.parametrize("l", [2.0, None])
def test_steps_of_a_graph_train_the_same(store, tmp_path, l):
    saes = []
    for graph in (False, True):
        trainer = Trainer(replace(SAE, l=l), TRAIN, store, tmp_path / f"run {graph}", device="cuda", graph=graph)
        trainer.sae.memory.idle.decide_on_device()
        saes.append(trainer.run(progress=False))
    for (name, p), q in zip(saes[0].named_parameters(), saes[1].parameters()):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
