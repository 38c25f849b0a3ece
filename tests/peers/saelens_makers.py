"""Small SAEs of SAELens, the same ones accelerated, and steps of both."""

from __future__ import annotations

import copy

import torch
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.matryoshka_batchtopk_sae import MatryoshkaBatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAEConfig
from sae_lens.saes.sae import TrainStepInput
from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.training.sae_trainer import SAETrainer
from torch.utils._python_dispatch import TorchDispatchMode

from sampled_sae.integrations import saelens

D, F, B = 24, 160, 50
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KINDS = {
    "topk": (TopKTrainingSAE, TopKTrainingSAEConfig, {"k": 5}),
    "batchtopk": (BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig, {"k": 5.3}),
    "matryoshka": (
        MatryoshkaBatchTopKTrainingSAE,
        MatryoshkaBatchTopKTrainingSAEConfig,
        {"k": 5.3, "matryoshka_widths": [20, 60, F]},
    ),
    "matryoshka_aux": (
        MatryoshkaBatchTopKTrainingSAE,
        MatryoshkaBatchTopKTrainingSAEConfig,
        {"k": 5.3, "matryoshka_widths": [20, 60, F], "use_matryoshka_aux_loss": True},
    ),
}
OURS = {
    "topk": saelens.SampledTopKTrainingSAEConfig,
    "batchtopk": saelens.SampledBatchTopKTrainingSAEConfig,
    "matryoshka": saelens.SampledMatryoshkaBatchTopKTrainingSAEConfig,
    "matryoshka_aux": saelens.SampledMatryoshkaBatchTopKTrainingSAEConfig,
}
SAMPLED = {"k": 3, "l": 4.0, "aux_pool": 50}
ALL = {name: (config, KINDS[name][2]) for name, config in OURS.items()}
ALL["sampled"] = (saelens.SampledTrainingSAEConfig, SAMPLED)
ALL["sampled_token"] = (saelens.SampledTrainingSAEConfig, {**SAMPLED, "l": None, "select": "token"})


@torch.no_grad()
def uneven(sae, seed=0):
    """The same SAE with every parameter away from its initial value and decoder rows of norms 0.1 to 3 times theirs."""
    g = torch.Generator().manual_seed(seed)
    for p in sae.parameters():
        p.add_(0.2 * torch.randn(p.shape, generator=g).to(p.dtype))
    sae.W_dec.mul_((torch.rand(len(sae.W_dec), 1, generator=g) * 3 + 0.1).to(sae.W_dec.dtype))
    return sae


def pair(kind, dtype="float32", seed=0, device="cpu", **changes):
    """(SAELens' SAE, a copy that is accelerated)."""
    torch.manual_seed(seed)
    cls, config, settings = KINDS[kind]
    theirs = uneven(cls(config(d_in=D, d_sae=F, dtype=dtype, **{**settings, **changes})), seed).to(device)
    return theirs, saelens.accelerate(copy.deepcopy(theirs))


@torch.no_grad()
def in_float64(sae):
    """SAELens' own SAE with the same weights in float64, on the same device."""
    cls = next(cls for cls, _, _ in KINDS.values() if type(sae) is cls)
    exact = cls(copy.deepcopy(sae.cfg)).to(sae.device, torch.float64)
    for p, q in zip(exact.parameters(), sae.parameters()):
        p.copy_(q)
    return exact


def tokens(n=B, d=D, seed=1, dtype=torch.float32):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)).to(dtype)


def dead_mask(n, n_features=F):
    """n features at random; None for None."""
    if n is None:
        return None
    order = torch.randperm(n_features, generator=torch.Generator().manual_seed(5))
    return torch.zeros(n_features, dtype=torch.bool).index_fill_(0, order[:n], True)


def relative_error(a, b):
    return float((a.detach().double() - b.detach()).norm() / b.detach().norm())


def step_input(x, dead=None, step=0):
    return TrainStepInput(x, {}, dead, step, False)


def step(sae, x, dead=None, number=0):
    """(output, gradients by name) of one training step."""
    sae.zero_grad()
    output = sae.training_forward_pass(step_input(x, dead, number))
    output.loss.backward()
    return output, {name: p.grad.clone() for name, p in sae.named_parameters()}


def trainer(sae, data, n_tokens, batch=B, **changes):
    """A SAETrainer without logging; changed fields of its config are given by name."""
    settings = {
        "total_training_samples": n_tokens,
        "train_batch_size_samples": batch,
        "lr": 3e-3,
        "lr_end": 3e-4,
        "dead_feature_window": 5,
        "logger": LoggingConfig(log_to_wandb=False),
        "checkpoint_path": None,
        **changes,
    }
    base = {"device": "cpu", "autocast": False, "lr_scheduler_name": "constant", "lr_warm_up_steps": 0}
    base |= {"lr_decay_steps": 0, "n_restart_cycles": 1, "adam_beta1": 0.9, "adam_beta2": 0.999, "n_checkpoints": 0}
    base |= {"feature_sampling_window": 1000, "save_final_checkpoint": False}
    return SAETrainer(SAETrainerConfig(**{**base, **settings}), sae, iter(data))


def batches(n, batch=B, d=D, seed=3):
    """Activations with few active directions each."""
    g = torch.Generator().manual_seed(seed)
    mixing = torch.randn(3 * d, d, generator=g)
    return [torch.rand(batch, 3 * d, generator=g).pow(12) @ mixing + 0.3 for _ in range(n)]


class Largest(TorchDispatchMode):
    """The number of elements of the largest dense tensor that any operation returns."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor) and t.layout == torch.strided:
                self.size = max(self.size, t.untyped_storage().nbytes() // t.element_size())
        return out
