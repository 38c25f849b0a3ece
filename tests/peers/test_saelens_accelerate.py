"""`accelerate`, and whose methods a step runs."""

import copy
from functools import partial

import pytest
import torch
from sae_lens.saes.sae import TrainingSAE
from saelens_makers import KINDS, OURS, D, F, dead_mask, pair, step, tokens

from sampled_sae.integrations import saelens
from sampled_sae.integrations.saelens.as_made import DENSE_METHODS


def test_accelerate_keeps_the_object_and_its_tensors():
    theirs, _ = pair("batchtopk")
    before = {name: (p, p.detach().clone()) for name, p in theirs.named_parameters()}
    ours = saelens.accelerate(theirs)
    assert ours is theirs
    assert isinstance(ours, KINDS["batchtopk"][0])
    assert ours.cfg.architecture() == "batchtopk"
    for name, p in ours.named_parameters():
        assert p is before[name][0]
        assert torch.equal(p, before[name][1])
    assert saelens.accelerate(ours) is ours


def test_accelerate_refuses_what_it_does_not_know():
    cls, config, settings = KINDS["batchtopk"]

    class Mine(cls):
        pass

    with pytest.raises(TypeError, match=r"sae=Mine: must be one of SAELens' TopKTrainingSAE, BatchTopK.*no subclass"):
        saelens.accelerate(Mine(config(d_in=4, d_sae=8, **settings)))
    with pytest.raises(TypeError, match="sae=Linear"):
        saelens.accelerate(torch.nn.Linear(2, 2))
    sae = cls(config(d_in=4, d_sae=8, **settings))
    sae.training_forward_pass = torch.compile(sae.training_forward_pass)
    with pytest.raises(ValueError, match="training_forward_pass: was replaced on this object"):
        saelens.accelerate(sae)


@pytest.mark.parametrize(("kind", "k"), [("topk", 2.5), ("topk", 0), ("batchtopk", 0), ("batchtopk", F + 1)])
def test_bad_k(kind, k):
    cls, config, settings = KINDS[kind]
    cfg = {"d_in": D, "d_sae": F, **settings, "k": k}
    with pytest.raises(ValueError, match=f"k={k}"):
        saelens.accelerate(cls(config(**cfg)))
    with pytest.raises(ValueError, match=f"k={k}"):
        TrainingSAE.from_dict(OURS[kind](**cfg).to_dict())


@pytest.mark.parametrize("name", DENSE_METHODS)
def test_accelerate_refuses_replaced_methods(name):
    theirs, _ = pair("matryoshka")
    setattr(theirs, name, getattr(theirs, name))
    with pytest.raises(ValueError, match=rf"sae\.{name}: was replaced on this object"):
        saelens.accelerate(theirs)


def louder(self, *args, original, **kwargs):
    """The original's result, its tensors half as large again."""
    result = original(self, *args, **kwargs)
    if isinstance(result, dict):
        return {name: 1.5 * loss for name, loss in result.items()}
    return tuple(1.5 * t for t in result) if isinstance(result, tuple) else 1.5 * result


@pytest.mark.parametrize("name", ["process_sae_in", "encode_with_hidden_pre", "decode", "calculate_aux_loss"])
@pytest.mark.parametrize("kind", ["topk", "batchtopk", "matryoshka"])
def test_overridden_methods_are_trained_with(kind, name):
    """In a subclass of ours, on the object, or patched into SAELens' class."""
    theirs, ours = pair(kind)
    original = getattr(KINDS[kind][0], name)

    def changed(self, *args, **kwargs):
        return louder(self, *args, original=original, **kwargs)

    theirs.__class__ = type("Theirs", (type(theirs),), {name: changed})
    on_object = copy.deepcopy(ours)
    setattr(on_object, name, partial(changed, on_object))
    ours.__class__ = type("Ours", (type(ours),), {name: changed})
    expected, expected_grads = step(theirs, tokens(), dead_mask(100))
    for sae in (ours, on_object):
        output, grads = step(sae, tokens(), dead_mask(100))
        torch.testing.assert_close(output.loss, expected.loss)
        for parameter, grad in expected_grads.items():
            torch.testing.assert_close(grads[parameter], grad, rtol=1e-4, atol=1e-5)


def test_an_overridden_threshold_rule_is_followed():
    _, ours = pair("batchtopk")

    class Mine(type(ours)):
        def update_topk_threshold(self, acts_topk):
            self.topk_threshold = torch.full_like(self.topk_threshold, 7)

    ours.__class__ = Mine
    step(ours, tokens())
    assert ours.topk_threshold == 7


def test_a_method_patched_into_saelens_class_is_trained_with(monkeypatch):
    cls = KINDS["batchtopk"][0]
    _, ours = pair("batchtopk")
    original = cls.decode
    monkeypatch.setattr(cls, "decode", lambda sae, acts: 1.5 * original(sae, acts))
    theirs, _ = pair("batchtopk")
    torch.testing.assert_close(step(ours, tokens())[0].loss, step(theirs, tokens())[0].loss)


def test_a_subclass_that_overrides_nothing_takes_the_sparse_step():
    _, ours = pair("batchtopk")
    ours.__class__ = type("Ours", (type(ours),), {"extra": lambda self: None})
    assert step(ours, tokens())[0].feature_acts.is_sparse


@pytest.mark.parametrize("first", [True, False])
def test_accelerate_lays_the_optimizers_state_out(first):
    """On an SAE that is accelerated now, and on one that was."""
    theirs, ours = pair("batchtopk")
    sae = theirs if first else ours
    optimizer = torch.optim.Adam(sae.parameters())
    step(sae, tokens())
    optimizer.step()
    state = optimizer.state[sae.W_enc]
    state["exp_avg"] = state["exp_avg"].contiguous()
    before = state["exp_avg"].clone()
    assert saelens.accelerate(sae, optimizer) is sae
    assert state["exp_avg"].stride() == sae.W_enc.stride() == (1, D)
    assert torch.equal(state["exp_avg"], before)
