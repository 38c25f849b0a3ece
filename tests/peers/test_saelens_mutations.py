"""Whatever is changed on a SAELens SAE changes our step as it changes SAELens' own."""

import dataclasses

import mutations
import pytest
import torch
from sae_lens.saes import topk_sae
from saelens_makers import KINDS, D, F, dead_mask, pair, step, step_input, tokens
from torch import nn

from sampled_sae.integrations.saelens import SampledTrainingSAE, SampledTrainingSAEConfig
from sampled_sae.integrations.saelens.as_made import DENSE_METHODS

# what SAELens refuses by a defect: its backward pass fails on sparse activations
MENDED = ("activation_fn.use_sparse_activations = True",)


def changes_of(kind):
    theirs, _ = pair(kind)
    cfg = {f.name: getattr(theirs.cfg, f.name) for f in dataclasses.fields(theirs.cfg)}
    named = {
        f"cfg.{name} = {other}": mutations.set_attribute(f"cfg.{name}", other)
        for name, value in cfg.items()
        if (other := mutations.changed_value(value)) is not None
    }
    for norm in ("expected_average_only_in", "layer_norm"):
        named[f"cfg.normalize_activations = {norm}"] = mutations.set_attribute("cfg.normalize_activations", norm)
    methods = [name for name in DENSE_METHODS if hasattr(theirs, name)]
    named |= mutations.of_values(theirs) | mutations.of_functions(theirs, [*methods, "get_activation_fn"])
    named |= mutations.of_tensors(theirs) | mutations.of_modules(theirs)
    named["cfg.apply_b_dec_to_input = 0.5"] = mutations.set_attribute("cfg.apply_b_dec_to_input", 0.5)
    for k in (1, 2.5, F, F + 1, 0, -1, True, torch.tensor(3), "3"):
        named[f"activation_fn.k = {k}"] = mutations.set_attribute("activation_fn.k", k)
    named["to float64"] = lambda sae: sae.to(torch.float64)
    named["dtype = float64"] = mutations.set_attribute("dtype", torch.float64)
    named["tied"] = tie
    named["parametrized"] = lambda sae: nn.utils.parametrize.register_parametrization(sae, "W_enc", nn.Softplus())
    named["wider"] = widen
    named["loaded"] = lambda sae: sae.load_state_dict({n: 0.7 * t + 0.01 for n, t in sae.state_dict().items()})
    named["loaded by assignment"] = lambda sae: sae.load_state_dict(
        {n: 0.7 * t + 0.01 for n, t in sae.state_dict().items()}, assign=True
    )
    return named


def tie(sae):
    sae.W_enc = None
    del sae.W_enc
    sae.W_enc = sae.W_dec.t()


@torch.no_grad()
def widen(sae):
    """Twelve more features."""
    sae.W_enc = nn.Parameter(torch.cat((sae.W_enc, sae.W_enc[:, :12].flip(0)), 1))
    sae.W_dec = nn.Parameter(torch.cat((sae.W_dec, sae.W_dec[:12].flip(1))))
    sae.b_enc = nn.Parameter(torch.cat((sae.b_enc, sae.b_enc[:12])))


def outcome(sae, change):
    """(loss by name, gradients, threshold, sae_out) of the second step after one unchanged, or the error."""
    try:
        step(sae, tokens())
        change(sae)
        n_features = sae.W_dec.shape[0]
        sae.zero_grad()
        output = sae.training_forward_pass(
            step_input(tokens(seed=2).to(sae.W_dec.dtype), dead_mask(100, n_features), 1)
        )
        output.loss.backward()
    except Exception as error:
        return type(error), str(error)
    grads = {name: p.grad for name, p in sae.named_parameters() if p.grad is not None}
    state = {name: b.clone() for name, b in sae.named_buffers()}
    acts = output.feature_acts.detach()
    acts = acts.to_dense() if acts.is_sparse else acts
    return {"loss": output.loss.detach(), **output.losses}, grads, state, output.sae_out.detach(), acts


@pytest.mark.parametrize("kind", KINDS)
def test_every_change_is_heard(kind):
    unchanged = None
    heard = 0
    for name, change in {"": lambda sae: None, **changes_of(kind)}.items():
        theirs, ours = pair(kind)
        expected, found = outcome(theirs, change), outcome(ours, change)
        if name in MENDED:
            assert not isinstance(found[0], type)
            continue
        if isinstance(expected[0], type):
            assert isinstance(found[0], type), f"{kind}, {name}: SAELens raises {expected}"
            continue
        assert not isinstance(found[0], type), f"{kind}, {name}: {found}"
        torch.testing.assert_close(
            found, expected, rtol=2e-4, atol=2e-5, msg=lambda m, name=name: f"{kind}, {name}: {m}"
        )
        unchanged = expected if unchanged is None else unchanged
        heard += not torch.equal(unchanged[0]["loss"], expected[0]["loss"])
    assert heard > 30, "changes that change nothing prove nothing"


@pytest.mark.parametrize("name", ["decode", "process_sae_in", "calculate_topk_aux_loss"])
@pytest.mark.parametrize("kind", ["topk", "batchtopk", "matryoshka"])
def test_a_wrapped_method_of_the_class_is_heard(kind, name, monkeypatch):
    """`functools.wraps` gives the wrapper the name and the module of SAELens' own."""
    theirs, ours = pair(kind)
    before = step(ours, tokens(), dead_mask(100))[0].loss
    cls = KINDS[kind][0]
    monkeypatch.setattr(cls, name, mutations.louder(getattr(cls, name)))
    expected, found = (step(sae, tokens(), dead_mask(100))[0].loss for sae in (theirs, ours))
    torch.testing.assert_close(found, expected)
    assert not torch.isclose(found, before)


@pytest.mark.parametrize("name", ["act_times_W_dec", "calculate_topk_aux_acts"])
def test_a_replaced_function_of_the_module_is_heard(name, monkeypatch):
    theirs, ours = pair("batchtopk")
    monkeypatch.setattr(topk_sae, name, mutations.louder(getattr(topk_sae, name)))
    expected, found = (step(sae, tokens(), dead_mask(100))[0].loss for sae in (theirs, ours))
    torch.testing.assert_close(found, expected)


def test_hooks_on_all_modules_see_the_dense_activations():
    _, ours = pair("topk")
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, inputs, out: seen.append(module))
    try:
        step(ours, tokens())
    finally:
        handle.remove()
    assert ours.hook_sae_acts_post in seen
    assert step(ours, tokens())[0].feature_acts.is_sparse


@pytest.mark.parametrize("kind", ["topk", "batchtopk"])
def test_a_k_that_is_annealed(kind):
    """Also in the memory that a step leaves for the next."""
    theirs, ours = pair(kind)
    for i, k in enumerate((20, 9, 4, 2, 1)):
        for sae in (theirs, ours):
            sae.activation_fn.k = k
        expected, found = (step(sae, tokens(seed=i))[0] for sae in (theirs, ours))
        torch.testing.assert_close(found.loss, expected.loss)
        assert found.feature_acts.is_sparse
        assert found.feature_acts._nnz() == int((expected.feature_acts != 0).sum())


def test_the_sampled_sae_hears_its_k():
    sae = SampledTrainingSAE(SampledTrainingSAEConfig(d_in=D, d_sae=F, k=5, l=3.0))
    for k in (5, 2):
        sae.activation_fn.k = k
        found = step(sae, tokens())[0]
        assert found.feature_acts._nnz() <= k * len(tokens())
        assert len(found.feature_acts.coalesce().indices()[1].unique()) <= 3 * k
