"""Data, settings and runs of `trainSAE` for the tests of sampled_sae.integrations.dictionary_learning."""

import pytest
import torch
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE as TheirBatchTopKSAE
from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer as TheirBatchTopK
from dictionary_learning.trainers.top_k import AutoEncoderTopK as TheirAutoEncoderTopK
from dictionary_learning.trainers.top_k import TopKTrainer as TheirTopK
from dictionary_learning.training import trainSAE

from sampled_sae.integrations.dictionary_learning import AutoEncoderTopK, BatchTopKSAE, BatchTopKTrainer, TopKTrainer

D, F, K = 20, 150, 4
TRAINERS = {"batch": (TheirBatchTopK, BatchTopKTrainer), "token": (TheirTopK, TopKTrainer)}
DICTIONARIES = {"batch": (TheirBatchTopKSAE, BatchTopKSAE), "token": (TheirAutoEncoderTopK, AutoEncoderTopK)}
BOTH = pytest.mark.parametrize("kind", ["batch", "token"])


def batches(n, B=48, d=D, dtype=torch.float32, seed=0):
    """Sparse combinations of directions around a mean."""
    g = torch.Generator().manual_seed(seed)
    mixing = torch.randn(3 * d, d, generator=g)
    return [(torch.rand(B, 3 * d, generator=g).pow(6) @ mixing + 0.5).to(dtype) for _ in range(n)]


class Data(list):
    """Gives every caller copies: `trainSAE` scales batches in place."""

    @property
    def config(self):
        return {"ctx_len": 8}

    def __iter__(self):
        return (x.clone() for x in super().__iter__())


def recording(cls, dead_after=None, dtype=None):
    """The class, and a list of the instances that will be made of it, with their losses."""
    made = []

    class Recorder(cls):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.losses, self.dead = [], 0
            if dead_after is not None:
                self.dead_feature_threshold = dead_after
            if dtype is not None:
                self.ae.to(dtype)
            made.append(self)

        def update(self, step, x):
            self.losses.append(float(super().update(step, x)))
            self.dead = max(self.dead, int(self.dead_features))

    return Recorder, made


def settings(trainer, steps=50, d=D, n_features=F, k=K, **changes):
    return {
        "trainer": trainer,
        "steps": steps,
        "activation_dim": d,
        "dict_size": n_features,
        "k": k,
        "layer": 3,
        "lm_name": "a-model",
        "lr": 3e-3,
        "warmup_steps": 5,
        "decay_start": 40,
        "threshold_start_step": 10,
        "seed": 7,
        "device": "cpu",
        "submodule_name": "resid_post",
        **changes,
    }


def arguments(**changes):
    """`settings` for a trainer that is made by hand."""
    return {name: value for name, value in settings(None, **changes).items() if name != "trainer"}


def trained(trainer, data, folder=None, dead_after=None, dtype=None, run=None, **changes):
    """One trainer taken through `trainSAE`."""
    recorder, made = recording(trainer, dead_after, dtype)
    config = settings(recorder, steps=changes.pop("steps", len(data)), **changes)
    if config["decay_start"] is not None and config["decay_start"] >= config["steps"]:
        config["decay_start"] = None
    trainSAE(Data(data), [config], steps=config["steps"], save_dir=folder, device="cpu", **(run or {}))
    return made[0]


def assert_same_weights(ours, theirs, tolerance):
    ours, theirs = ours.state_dict(), theirs.state_dict()
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype, name
        torch.testing.assert_close(ours[name], value, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")
