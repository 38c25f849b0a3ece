"""sparsify's own Trainer on a tiny language model, with and without the patch."""

import pytest
import torch
from datasets import Dataset
from sparsify import SaeConfig, SparseCoder, TrainConfig, Trainer
from test_sparsify import eager_peer  # noqa: F401
from transformers import LlamaConfig, LlamaForCausalLM

from sampled_sae import formats
from sampled_sae.integrations.sparsify import patch_sparsify

STEPS = 6


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, max_position_embeddings=32, **sizes)).eval()


@pytest.fixture(scope="module")
def texts():
    torch.manual_seed(1)
    return Dataset.from_dict({"input_ids": torch.randint(64, (STEPS * 4, 16)).tolist()}).with_format("torch")


def train(model, texts, folder, patched, sae=None, **options):
    """(losses of each step, the trainer)"""
    cfg = TrainConfig(
        SaeConfig(**{"num_latents": 256, "k": 8, **(sae or {})}),
        batch_size=4,
        hookpoints=["layers.1"],
        lr_warmup_steps=1,
        log_to_wandb=False,
        save_dir=str(folder),
        **options,
    )
    losses = []
    with patch_sparsify() if patched else torch.enable_grad():
        trainer = Trainer(cfg, texts, model)
        coder = trainer.saes["layers.1"]
        coder.register_forward_hook(lambda _module, _inputs, out: losses.append([float(v.detach()) for v in out[3:]]))
        trainer.fit()
    assert len(losses) == STEPS * options.get("micro_acc_steps", 1)
    return torch.tensor(losses), trainer


OPTIONS = [
    {"optimizer": "adam"},
    {"optimizer": "signum", "lr": 1e-3},
    {"optimizer": "muon"},
    {"optimizer": "adam", "micro_acc_steps": 2, "grad_acc_steps": 2},
    {"optimizer": "adam", "sae": {"transcode": True, "skip_connection": True}},
    {"optimizer": "adam", "sae": {"activation": "groupmax"}},
    {"optimizer": "adam", "loss_fn": "ce"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_training_is_the_same(options, model, texts, tmp_path):
    expected, theirs = train(model, texts, tmp_path / "theirs", False, **options)
    found, ours = train(model, texts, tmp_path / "ours", True, **options)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert found[-1, 0] < found[0, 0] or options.get("loss_fn") == "ce"
    for (name, p), (_, q) in zip(
        ours.saes["layers.1"].named_parameters(), theirs.saes["layers.1"].named_parameters(), strict=True
    ):
        assert (p - q).norm() <= 1e-3 * q.norm(), name
    assert torch.equal(ours.num_tokens_since_fired["layers.1"], theirs.num_tokens_since_fired["layers.1"])


def test_with_auxk_and_multi_topk_the_first_losses_are_the_same(model, texts, tmp_path):
    """Later ones differ: only here does the encoder learn from the two."""
    options = {
        "optimizer": "adam",
        "lr": 1e-2,
        "auxk_alpha": 0.1,
        "dead_feature_threshold": 64,
        "sae": {"multi_topk": True},
    }
    expected, _ = train(model, texts, tmp_path / "theirs", False, **options)
    found, _ = train(model, texts, tmp_path / "ours", True, **options)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-6)
    assert found[-1, 1] > 0
    assert found[-1, 2] < found[0, 2]
    assert not torch.allclose(found[-1], expected[-1], rtol=1e-4)


def test_a_decaying_k_starts_the_same(model, texts, tmp_path):
    """With as many activations as there are features most kept ones are 0; theirs pass gradients through these."""
    expected, _ = train(model, texts, tmp_path / "theirs", False, optimizer="adam", k_decay_steps=4)
    found, trainer = train(model, texts, tmp_path / "ours", True, optimizer="adam", k_decay_steps=4)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-6)
    assert trainer.saes["layers.1"].cfg.k == 8
    assert bool(found.isfinite().all())


def test_what_the_trainer_saves_is_read_here(model, texts, tmp_path):
    _, trainer = train(model, texts, tmp_path, True, optimizer="adam", run_name="run")
    sae = formats.load(tmp_path / "run" / "layers.1").train()
    coder = SparseCoder.load_from_disk(tmp_path / "run" / "layers.1")
    x = torch.randn(20, 32)
    torch.testing.assert_close(sae(x).x_hat, coder(x).sae_out, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(coder.W_dec, trainer.saes["layers.1"].W_dec)
