"""Whatever is changed on a trainer or its dictionary changes our step as dictionary_learning's own, or is an error."""

import mutations
import pytest
import torch
from dictionary_learning_makers import BOTH, TRAINERS, F, K, arguments, batches
from torch import nn

from sampled_sae.integrations.dictionary_learning import SampledTrainer

WEIGHTS = ("ae.encoder.weight", "ae.encoder.bias", "ae.decoder.weight", "ae.b_dec")
# an error in ours: rows of gradients call no hooks, and the parameters are those that the optimizer has
REFUSED = {f"{name} gradient hook" for name in WEIGHTS[:3]} | {"optimizer replaced", "ae replaced", "ae.k.fill_(0)"}
REFUSED |= {f"ae.{name} {how}" for name in ("encoder", "decoder") for how in ("replaced", "forward hook")}
# an error in theirs alone
MENDED = {"ae.decoder.weight frozen"}
# theirs goes on with a parameter that its optimizer does not train
NOT_TRAINED_THERE = tuple(f"{name} new" for name in WEIGHTS)


def changes_of(kind):
    theirs = TRAINERS[kind][0](**arguments())
    named = mutations.of_values(theirs)
    named |= mutations.of_functions(theirs, ["get_auxiliary_loss", "update_threshold", "loss", "update"])
    named.pop("geometric_median() on the object", None)
    for name in ("encode", "decode"):
        named[f"ae.{name}"] = mutations.wrapped(f"ae.{name}")
    for name in WEIGHTS:
        named[f"{name} in place"] = mutations.change_in(name, mutations.fill)
        named[f"{name}.data"] = mutations.change_in(name, mutations.new_data)
        named[f"{name}.data in place"] = mutations.change_in(name, lambda p: p.data.mul_(1.25))
        named[f"{name} frozen"] = mutations.change_in(name, lambda p: p.requires_grad_(False))
        named[f"{name} new"] = mutations.wrapped(name, lambda p: nn.Parameter(1.25 * p.detach()))
        named[f"{name} gradient hook"] = mutations.change_in(name, lambda p: p.register_hook(lambda grad: 3 * grad))
    for name, value in (("k", torch.tensor(2, dtype=torch.int)), ("threshold", torch.tensor(0.3))):
        named[f"ae.{name}.fill_"] = mutations.change_in(f"ae.{name}", lambda b, value=value: b.fill_(value))
        named[f"ae.{name}.data.fill_"] = mutations.change_in(f"ae.{name}", lambda b, value=value: b.data.fill_(value))
        named[f"ae.{name}.data"] = mutations.set_attribute(f"ae.{name}.data", value.clone())
        named[f"ae.{name} new"] = mutations.set_attribute(f"ae.{name}", value.clone())
        named[f"ae.{name} copied"] = mutations.change_in(f"ae.{name}", lambda b, value=value: b.copy_(value))
    for bad in (0, F + 1):
        named[f"ae.k.fill_({bad})"] = mutations.change_in("ae.k", lambda b, bad=bad: b.fill_(bad))
    named["ae.k = 2"] = mutations.set_attribute("ae.k", 2)
    idle = torch.arange(F) * 200_000
    named["idle in place"] = mutations.change_in("num_tokens_since_fired", lambda t: t.copy_(idle))
    named["idle new"] = lambda run: setattr(run, "num_tokens_since_fired", idle.clone())
    named["no features dead before long"] = mutations.set_attribute("dead_feature_threshold", 60)
    named["lr"] = lambda run: [group.update(lr=0.02) for group in run.optimizer.param_groups]
    named["scheduler replaced"] = lambda run: setattr(
        run, "scheduler", torch.optim.lr_scheduler.LambdaLR(run.optimizer, lambda step: 0.3)
    )
    named["optimizer replaced"] = lambda run: setattr(run, "optimizer", torch.optim.SGD(run.ae.parameters(), lr=0.1))
    named["ae replaced"] = lambda run: setattr(run, "ae", type(run.ae)(run.ae.activation_dim, run.ae.dict_size, K))
    for name in ("encoder", "decoder"):
        named[f"ae.{name} replaced"] = mutations.wrapped(f"ae.{name}", mutations.Louder)
        named[f"ae.{name} forward hook"] = mutations.change_in(
            f"ae.{name}", lambda m: m.register_forward_hook(lambda module, inputs, out: 1.25 * out)
        )
    named["loaded"] = lambda run: run.ae.load_state_dict(
        {name: 0.7 * t if t.is_floating_point() else t - 1 for name, t in run.ae.state_dict().items()}
    )
    return named


def outcome(cls, change):
    """(losses, weights and buffers, tokens since fired) of two steps after two unchanged ones, or the error."""
    run, data = cls(**arguments(threshold_start_step=0)), batches(4)
    losses = [float(run.update(step, x)) for step, x in enumerate(data[:2])]
    try:
        change(run)
        losses += [float(run.update(step, x)) for step, x in enumerate(data[2:], 2)]
    except Exception as error:
        return type(error), str(error)
    return losses, {name: t.clone() for name, t in run.ae.state_dict().items()}, run.num_tokens_since_fired.clone()


@BOTH
def test_every_change_is_heard_or_an_error(kind):
    theirs, ours = TRAINERS[kind]
    unchanged, heard = outcome(theirs, lambda run: None), 0
    for name, change in changes_of(kind).items():
        expected, found = outcome(theirs, change), outcome(ours, change)
        if isinstance(expected[0], type) or name in REFUSED:
            assert isinstance(found[0], type) != (name in MENDED), f"{kind}, {name}: {expected}, {found}"
            continue
        assert not isinstance(found[0], type), f"{kind}, {name}: {found}"
        if name not in NOT_TRAINED_THERE:
            torch.testing.assert_close(
                found, expected, rtol=1e-3, atol=1e-4, msg=lambda m, name=name: f"{kind}, {name}: {m}"
            )
        heard += expected[0] != unchanged[0]
    assert heard > 20, "changes that change nothing prove nothing"


@pytest.mark.parametrize("rule", [{"l": 4.0}, {"l": None, "select": "token"}], ids=str)
def test_the_sampled_trainer_hears_its_k(rule):
    run, (x, y) = SampledTrainer(**arguments(), **rule), batches(2)
    run.update(0, x)
    run.ae.k.fill_(2)
    assert float(run.loss(y, 1, logging=True).f.count_nonzero(-1).float().mean()) <= 2
    run.update(1, y)


@BOTH
def test_a_subclass_that_overrides_a_part_of_the_loss(kind):
    theirs, ours = TRAINERS[kind]

    def made(cls):
        class Mine(cls):
            def get_auxiliary_loss(self, residual_BD, post_relu_acts_BF):
                return residual_BD.abs().mean() + 0.1 * post_relu_acts_BF.mean()

        return Mine

    expected, found = (outcome(made(cls), lambda run: None) for cls in (theirs, ours))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@BOTH
def test_a_wrapped_encode_of_the_class_is_heard(kind, monkeypatch):
    outcomes = []
    for cls in TRAINERS[kind]:
        dictionary = type(cls(**arguments()).ae)
        monkeypatch.setattr(dictionary, "encode", mutations.louder(dictionary.encode))
        outcomes.append(outcome(cls, lambda run: None))
    torch.testing.assert_close(outcomes[1], outcomes[0], rtol=1e-3, atol=1e-4)
