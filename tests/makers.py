"""What many tests start from: inputs, a small SAE, one step of an implementation with its gradients, a store."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from sampled_sae import ActivationStore, SampledSAE, SampledSAEConfig, TrainConfig, Trainer, reference, testing
from sampled_sae import functional as F
from sampled_sae.support.atomic_files import write_json

D = 12
# a training of two checkpoints, in seconds
SMALL_SAE = SampledSAEConfig(d_in=D, d_sae=96, k=3, l=2.0, dead_after=300, aux_pool=16)
SMALL_TRAIN = TrainConfig(steps=12, batch_size=64, checkpoint_every=6, log_every=2, lr=3e-3)
# of selection, for `make_sae`: each form and kind of a step
TOPK = {"l": None, "select": "token"}
RULES = [
    {"d_sae": 128, "l": 4.0},
    {"l": 4.0},
    {"l": 4.0, "score": "entropy", "pool": "sample"},
    {"l": 2.0, "select": "token"},
    {"l": None},
    TOPK,
    {"l": None, "apply_b_dec_to_input": False},
    {"d_sae": 128, "l": 2.0, "apply_b_dec_to_input": False},
]


def problem(B, d, n_features, dtype=torch.float64, seed=0):
    """x [B, d], W_enc [d, F], b_enc [F], W_dec [F, d], b_dec [d] by name, all drawn from a normal distribution."""
    return testing.normal(B, d, n_features, dtype, seed)


def leaves(tensors):
    """Copies that take gradients."""
    return {name: t.clone().requires_grad_() for name, t in tensors.items()}


def run(tensors, impl, generator_seed=None, scale=None, **rule):
    """(codes, x_hat, loss, gradients by name) of one step by the functions of sampled_sae.functional."""
    t = leaves(tensors)
    generator = None if generator_seed is None else torch.Generator().manual_seed(generator_seed)
    codes = F.sampled_topk(
        t["x"] - t["b_dec"], t["W_enc"], t["b_enc"], scale=scale, generator=generator, impl=impl, **rule
    )
    x_hat = F.decode(codes, t["W_dec"], t["b_dec"], impl=impl)
    loss = reference.reconstruction_loss(t["x"], x_hat)
    loss.backward()
    return codes, x_hat.detach(), loss.detach(), {name: leaf.grad for name, leaf in t.items()}


def assert_same_entries(ours, theirs):
    """The same places, in the same order."""
    assert ours.shape == theirs.shape
    assert torch.equal(ours.tokens, theirs.tokens)
    assert torch.equal(ours.features, theirs.features)


def make_sae(dtype=torch.float64, seed=0, device="cpu", **changes):
    """A small SAE (d_in 12, d_sae 96, k 4) with every parameter away from its initial value."""
    settings = {"d_in": 12, "d_sae": 96, "k": 4, "l": 3.0, "aux_coefficient": 0.0, **changes}
    sae = SampledSAE(SampledSAEConfig(**settings), device=device, dtype=dtype)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in sae.parameters():
            noise = 0.2 * torch.randn(p.shape, generator=g, dtype=torch.float64)
            p.add_(noise.to(p))
    sae.normalize_decoder()
    return sae


def tokens(*shape, dtype=torch.float64, seed=1):
    """Normally distributed activations of the given shape."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def in_each_form(rules, without_pool="block"):
    """Parameters `rule` and `form`: rules with a pool in both forms of one, rules without in one.

    What a step keeps without a pool is the same in both forms; the aux loss has a pool of its own.
    """
    pairs = [(rule, form) for rule in rules for form in ("block", "entries") if rule["l"] or form == without_pool]
    return pytest.mark.parametrize(("rule", "form"), pairs, indirect=["form"], ids=str)


def gradients(sae):
    return {name: p.grad.clone() for name, p in sae.named_parameters()}


def same_weights(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))


def state_of(sae):
    """Copies of its parameters by name."""
    return {name: p.detach().clone() for name, p in sae.named_parameters()}


def contents(folder):
    """name -> bytes of the files of a folder."""
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def names(folder):
    return {entry.name for entry in folder.iterdir()}


def cut(file, size):
    """Leaves the first bytes of a file, or with a size below 0 all but the last."""
    file.write_bytes(file.read_bytes()[:size])


def begun_training(sae, how, activations, folder, steps, **options):
    """A `Trainer` that was stopped after `steps`, with a checkpoint."""
    begun = Trainer(sae, how, activations, folder, **options)
    for t in range(steps):
        begun.train_on(begun.feed.batch(t))
    begun.save()
    return begun


def write_store(folder, n=(200, 130, 170), n_holdout=150, d=D, seed=5, **changes):
    """Correlated activations in a folder like that of `sampled-sae harvest`; `changes` are of its manifest."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(40, d, generator=generator)

    def draw(count):
        hidden = torch.rand(count, 40, generator=generator).pow(8)
        return hidden @ mixing + 0.3

    folder.mkdir(parents=True)
    files = {f"shard_{i:05d}.safetensors": {"activations": draw(c)} for i, c in enumerate(n)}
    files["holdout.safetensors"] = {"activations": draw(n_holdout), "rows": torch.zeros(3, 8, dtype=torch.int64)}
    entries = []
    for name, tensors in files.items():
        save_file(tensors, folder / name)
        entries.append({"file": name, "tokens": len(tensors["activations"]), "bytes": (folder / name).stat().st_size})
    manifest = {
        "format": "sampled-sae activations",
        "version": 1,
        "model": "made",
        "layer": 0,
        "context": 8,
        "d_in": d,
        "dtype": "float32",
        "scale": 0.5,
        "max_norm": 1e9,
        "source": "made",
        "shards": entries[:-1],
        "holdout": {**entries[-1], "rows": 3},
        "complete": True,
        "settings": {},
        "versions": {},
        **changes,
    }
    write_json(folder / "manifest.json", manifest)
    return folder


def harvested(folder, **changes):
    """The `ActivationStore` of `write_store`: layer 0 of the model "made", unless changed."""
    return ActivationStore.open(write_store(folder, **changes))
