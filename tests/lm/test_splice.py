"""Spliced cross-entropy."""

import math
from types import SimpleNamespace

import pytest
import torch
from makers import make_sae, tokens
from tiny_models import CONTEXT, D, llama

from sampled_sae import ActivationStore, SampledSAEConfig, TrainConfig
from sampled_sae.lm import (
    SpliceEvaluator,
    capture,
    harvest,
    replace,
    spliced_cross_entropy,
    transformer_blocks,
    weights_digest,
)
from sampled_sae.training.evaluation import reconstruct_with
from sampled_sae.training.sweep import run_sweep


def cross_entropy(model, rows):
    logits = model(input_ids=rows).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).item()


def test_splice_identity_and_zero(model, rows):
    evaluator = SpliceEvaluator(model, rows, 1, scale=1.0, batch_size=3)
    assert evaluator.ce_clean == pytest.approx(cross_entropy(model, rows), rel=1e-5)
    about = {"model": model.name_or_path, "weights_sha256": weights_digest(model), "layer": 1, "rows": 11}
    assert evaluator.about == about
    same = evaluator.evaluate(lambda x: x)
    assert same["ce_spliced"] == pytest.approx(same["ce_clean"], abs=1e-6)
    assert same["loss_recovered_zero"] == pytest.approx(1, abs=1e-4)
    assert same["loss_recovered_mean"] == pytest.approx(1, abs=1e-4)
    assert same["predicted_tokens"] == same["spliced_tokens"] == 11 * (CONTEXT - 1)
    nothing = evaluator.evaluate(torch.zeros_like)
    assert nothing["ce_spliced"] == nothing["ce_zero"]
    assert nothing["loss_recovered_zero"] == 0


@pytest.mark.parametrize("scale", [0.1, 3.0])
def test_an_sae_scales_by_itself(model, rows, scale):
    """The reconstruction of an SAE is that of its own input_scale, and another factor is refused."""
    sae = make_sae(torch.float32, d_in=D, d_sae=64, input_scale=scale).eval()
    sae.calibrate(tokens(200, D, dtype=torch.float32), scaled=True)
    found = SpliceEvaluator(model, rows, 1).evaluate(reconstruct_with(sae))
    by_hand = SpliceEvaluator(model, rows, 1, scale=scale).evaluate(
        lambda x: sae.decode(sae.encode_sparse(x, scaled=True), scaled=True)
    )
    assert found["ce_spliced"] == pytest.approx(by_hand["ce_spliced"], rel=1e-6)
    with pytest.raises(ValueError, match=rf"scale={scale}: the SAE multiplies by its own input_scale; leave"):
        SpliceEvaluator(model, rows, 1, scale=scale).evaluate(reconstruct_with(sae))


def test_splice_runs_only_the_blocks_after_the_layer(model, rows):
    evaluator = SpliceEvaluator(model, rows, 1, scale=1.0)
    ran = []
    layers = transformer_blocks(model)
    for index, block in enumerate(layers):
        block.attention_probe = (getattr(block, "self_attn", None) or getattr(block, "attention", None)) or block.attn
        block.attention_probe.register_forward_hook(lambda *_, index=index: ran.append(index))
    evaluator.evaluate(lambda x: 0.9 * x)
    assert set(ran) == {2, 3}
    assert all("forward" not in vars(block) for block in layers)


def test_splice_equals_the_model_with_a_replaced_layer(model, rows):
    with capture(model, 2) as captured:
        model(input_ids=rows)
    norms = captured.value[:, 1:].norm(dim=-1)
    limit = norms.median().item()
    scale = 0.37
    got = spliced_cross_entropy(model, rows, 2, lambda x: x.tanh(), scale=scale, max_norm=limit, batch_size=4)

    def expected(x):
        where = x.norm(dim=-1, keepdim=True) <= limit
        where[:, 0] = False
        return torch.where(where, (x * scale).tanh() / scale, x)

    with replace(model, 2, expected):
        assert got["ce_spliced"] == pytest.approx(cross_entropy(model, rows), rel=1e-5)
    assert got["spliced_tokens"] == int((norms <= limit).sum())


def test_splice_takes_a_mean(small_llama, rows):
    mean = torch.full((D,), 0.5)
    evaluator = SpliceEvaluator(small_llama, rows, 1, scale=2.0, mean=mean)
    assert evaluator.evaluate(lambda x: torch.ones_like(x))["ce_spliced"] == pytest.approx(evaluator.ce_mean)
    # all rows in one batch, so that the mean over a batch is the mean over all
    own = SpliceEvaluator(small_llama, rows, 1, scale=2.0, batch_size=len(rows))
    assert own.evaluate(lambda x: x.mean(dim=0).expand_as(x))["ce_spliced"] == pytest.approx(own.ce_mean, rel=1e-5)


def test_splice_runs_the_whole_model_where_blocks_share_more_than_the_residual(small_llama, rows):
    layers = small_llama.model.layers
    seen = SimpleNamespace(queries=None)
    layers[0].self_attn.q_proj.register_forward_hook(lambda m, a, out: setattr(seen, "queries", out))

    def borrow(module, args, output):
        queries, seen.queries = seen.queries, None
        return output + queries

    layers[3].self_attn.q_proj.register_forward_hook(borrow)
    evaluator = SpliceEvaluator(small_llama, rows, 1, scale=1.0)
    assert evaluator.evaluate(lambda x: x)["ce_spliced"] == pytest.approx(evaluator.ce_clean, abs=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale": 0.0}, "scale="),
        ({"scale": math.nan}, "scale="),
        ({"max_norm": 0.0}, "max_norm="),
        ({"max_norm": 1e-9}, "no token would be replaced"),
        ({"batch_size": 0}, "batch_size="),
        ({"batch_size": 2.5}, "batch_size=2.5: must be a whole number"),
        ({"mean": torch.zeros(3)}, rf"mean=.* must be a tensor of shape \[{D}\]"),
        ({"mean": [0.0] * D}, "mean="),
        ({"drop_tokens": 5}, "drop_tokens=5: must be token ids"),
        ({"reconstruct": make_sae(torch.float32, d_in=D)}, "SampledSAEOutput: must be a tensor; for an SAE give"),
        ({"reconstruct": lambda x: x[:, :2]}, "reconstruct returned"),
        ({"reconstruct": lambda x: x * math.nan}, "not finite"),
    ],
)
def test_splice_bad_arguments(small_llama, rows, changes, message):
    arguments = {"reconstruct": lambda x: x, "scale": 1.0, **changes}
    with pytest.raises((ValueError, TypeError), match=message):
        spliced_cross_entropy(small_llama, rows, 1, **arguments)


def test_the_model_is_the_one_that_was_harvested(small_llama, rows, tmp_path):
    manifest = harvest(small_llama, rows, 1, tmp_path / "a", model_name="made", progress=False)
    torch.manual_seed(5)
    for other in (llama(), small_llama.half()):
        with pytest.raises(ValueError, match=r"of layer 1 of made \(weights .*, but the model gives layer 1 of "):
            SpliceEvaluator.of_harvest(other, rows, manifest)
        assert SpliceEvaluator.of_harvest(other, rows, manifest, insist=True).spliced_tokens > 0
    written = ActivationStore.write(tmp_path / "b", torch.ones(9, D))
    with pytest.raises(ValueError, match="that no harvest wrote"):
        SpliceEvaluator.of_harvest(small_llama, rows, written.manifest)


@pytest.mark.parametrize("layer", [1, 2])
def test_a_sweep_is_held_to_the_layer_and_weights_of_its_evaluator(small_llama, rows, tmp_path, layer):
    torch.manual_seed(5)
    other = llama().eval()
    harvest(small_llama, rows, layer, tmp_path / "a", holdout_rows=3, progress=False)
    store = ActivationStore.open(tmp_path / "a")
    configs = {"a": SampledSAEConfig(d_in=D, d_sae=32, k=3, l=2.0)}
    train = TrainConfig(steps=2, batch_size=16)
    for wrong in (SpliceEvaluator(small_llama, rows, 3 - layer), SpliceEvaluator(other, rows, layer)):
        with pytest.raises(ValueError, match=rf"splice is in layer .*, but .* holds layer {layer} of "):
            run_sweep(configs, train, store, tmp_path / "s", wrong.evaluate, progress=False)
        assert not (tmp_path / "s").exists()
    right = SpliceEvaluator.of_harvest(small_llama, store.holdout_rows(), store.manifest)
    [row] = run_sweep(configs, train, store, tmp_path / "s", right.evaluate, progress=False)
    assert row["ce_clean"] == right.ce_clean
