"""SAELens' language model runner with our architectures, unchanged."""

import copy

import pytest
import torch
from datasets import Dataset
from sae_lens import SAE, LanguageModelSAERunnerConfig, LanguageModelSAETrainingRunner, LoggingConfig
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY
from sae_lens.saes.sae import TrainingSAE
from saelens_makers import ALL, D, F
from transformer_lens import HookedTransformer, HookedTransformerConfig


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    cfg = HookedTransformerConfig(
        n_layers=1, d_model=D, n_ctx=16, d_head=8, n_heads=3, d_mlp=32, d_vocab=50, act_fn="gelu", seed=0, device="cpu"
    )
    return HookedTransformer(cfg)


@pytest.fixture(scope="module")
def dataset():
    g = torch.Generator().manual_seed(0)
    return Dataset.from_dict({"tokens": torch.randint(0, 50, (400, 16), generator=g).tolist()})


def runner_config(sae, folder, **changes):
    settings = {
        "sae": sae,
        "model_name": "made",
        "dataset_path": "made",
        "hook_name": "blocks.0.hook_resid_pre",
        "is_dataset_tokenized": True,
        "streaming": False,
        "context_size": 16,
        "prepend_bos": False,
        "training_tokens": 1280,
        "train_batch_size_tokens": 64,
        "store_batch_size_prompts": 4,
        "n_batches_in_buffer": 4,
        "lr": 1e-3,
        "logger": LoggingConfig(log_to_wandb=False),
        "checkpoint_path": str(folder / "checkpoints"),
        "output_path": str(folder / "output"),
        "dead_feature_window": 5,
        **changes,
    }
    return LanguageModelSAERunnerConfig(**settings)


@pytest.mark.parametrize("kind", ALL)
def test_language_model_runner(kind, model, dataset, tmp_path):
    config, settings = ALL[kind]
    cfg = runner_config(config(d_in=D, d_sae=F, **copy.deepcopy(settings)), tmp_path, n_checkpoints=1)
    runner = LanguageModelSAETrainingRunner(cfg, override_model=model, override_dataset=dataset)
    assert isinstance(runner.sae, SAE_TRAINING_CLASS_REGISTRY[config.architecture()][0])
    before = runner.sae.W_dec.detach().clone()
    sae = runner.run()
    assert not torch.equal(sae.W_dec, before)
    saved = SAE.load_from_disk(tmp_path / "output")
    assert saved.cfg.architecture() == ("topk" if kind == "topk" else "jumprelu")
    checkpoint = next((tmp_path / "checkpoints").glob("*/*/sae_weights.safetensors")).parent
    assert type(TrainingSAE.load_from_disk(checkpoint)) is type(sae)


def test_runner_logs_and_evaluates(model, dataset, tmp_path, monkeypatch):
    logged = []
    monkeypatch.setattr("wandb.init", lambda **settings: None)
    monkeypatch.setattr("wandb.finish", lambda: None)
    monkeypatch.setattr("wandb.log", lambda values, step: logged.append(values))
    monkeypatch.setattr(LoggingConfig, "log", lambda *args, **settings: None)
    logger = LoggingConfig(wandb_log_frequency=2, eval_every_n_wandb_logs=3)
    config, settings = ALL["sampled"]
    cfg = runner_config(config(d_in=D, d_sae=F, **settings), tmp_path, logger=logger, n_eval_batches=1)
    cfg.feature_sampling_window = 5
    runner = LanguageModelSAETrainingRunner(cfg, override_model=model, override_dataset=dataset)
    runner.run()
    names = {name for values in logged for name in values}
    assert {"losses/mse_loss", "metrics/topk_threshold", "metrics/l0", "sparsity/below_1e-5"} <= names
    assert any(name.startswith("model_performance_preservation") for name in names)
