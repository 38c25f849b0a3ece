"""Matryoshka SAEs: nested reconstructions by groups of features, in every implementation and all around."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from makers import begun_training, gradients, make_sae, problem, same_weights, state_of, tokens
from optim_steps import assert_close, plain_step

from sampled_sae import RowAdam, SampledSAE, SampledSAEConfig, SparseCodes, TrainConfig, Trainer, reference
from sampled_sae.cli import build_parser
from sampled_sae.cli.training_options import sae_config
from sampled_sae.formats.origin import training_fields
from sampled_sae.impl.interface import implementation
from sampled_sae.impl.levels import level_of
from sampled_sae.training.array_activations import ArrayActivations
from sampled_sae.training.evaluation import evaluate_activations

GROUPS = (10, 11, 40, 96)
RULES = [
    {"l": 3.0},
    {"l": 3.0, "select": "token", "score": "entropy"},
    {"l": None},
    {"l": None, "select": "token"},
    {"l": 20.0, "apply_b_dec_to_input": False, "input_scale": 0.37},
]
AUX = {"aux_coefficient": 0.5, "dead_after": 15, "k_aux": 3, "aux_pool": 20}


def test_levels_by_hand():
    c = torch.tensor([[1.0, 0.0, 2.0], [0.0, 3.0, 0.0]])
    W_dec = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    b_dec = torch.tensor([10.0, 20.0])
    levels = reference.decode_levels(c, W_dec, b_dec, (1, 3))
    assert torch.equal(levels, torch.tensor([[[11.0, 20.0], [13.0, 22.0]], [[10.0, 20.0], [10.0, 23.0]]]))
    x = torch.tensor([[11.0, 20.0], [10.0, 20.0]])
    # the first level reconstructs both tokens, the second is off by (2, 2) and (0, 3)
    assert reference.nested_loss(x, levels) == (0 + (8 + 9) / 2) / 2


@pytest.mark.parametrize("select", ["batch", "token"])
@pytest.mark.parametrize("l", [1.5, None])
def test_gradients_of_the_specification(select, l):
    tensors = [t.requires_grad_() for t in problem(4, 3, 7, seed=3).values()]

    def loss(x, W_enc, b_enc, W_dec, b_dec):
        c = reference.sampled_topk(x - b_dec, W_enc, b_enc, k=2, l=l, select=select)
        return reference.nested_loss(x, reference.decode_levels(c, W_dec, b_dec, (2, 3, 7)))

    assert torch.autograd.gradcheck(loss, tensors)


def specified(sae, x):
    """Loss without aux and gradients by the specification."""
    leaves = {name: p.detach().clone().requires_grad_() for name, p in sae.named_parameters()}
    c, scaled = sae.cfg, x * sae.cfg.input_scale
    centred = scaled - leaves["b_dec"] if c.apply_b_dec_to_input else scaled
    rule = {"k": c.k, "l": c.l, "score": c.score, "select": c.select}
    codes = reference.sampled_topk(centred, leaves["W_enc"], leaves["b_enc"], **rule)
    loss = reference.nested_loss(scaled, reference.decode_levels(codes, leaves["W_dec"], leaves["b_dec"], c.groups))
    loss.backward()
    return loss.detach(), {name: leaf.grad for name, leaf in leaves.items()}


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("row_grads", [True, False])
def test_a_step_is_that_of_the_specification(rule, row_grads):
    sae, x = make_sae(groups=GROUPS, row_grads=row_grads, **rule), tokens(3, 5, 12)
    out = sae(x)
    loss, expected = specified(sae, x.flatten(0, 1))
    torch.testing.assert_close(out.loss, loss)
    x_hat = sae.decode(out.codes)
    torch.testing.assert_close(out.x_hat.flatten(0, 1), x_hat)
    mse = (x.flatten(0, 1) - x_hat).square().sum(-1).mean() * sae.cfg.input_scale**2
    torch.testing.assert_close(out.mse, mse)
    assert out.x_hat.is_contiguous()
    out.loss.backward()
    for part in sae.row_grads:
        whole = torch.zeros_like(sae.get_parameter(part.name))
        rows = whole.t() if part.name == "W_enc" else whole
        rows.index_copy_(0, part.features, part.rows.grad)
        sae.get_parameter(part.name).grad = whole
    torch.testing.assert_close(gradients(sae), expected)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_gradcheck_of_the_layer(impl):
    sae = make_sae(d_in=3, d_sae=8, k=2, l=None, groups=(2, 3, 8), impl=impl)
    block = make_sae(d_in=3, d_sae=64, k=2, l=2.0, groups=(2, 30, 64), impl=impl)
    for layer in (sae, block):
        x = tokens(5, 3)
        names, leaves = zip(*((n, p.detach().clone().requires_grad_()) for n, p in layer.named_parameters()))

        def loss(x, *leaves, layer=layer, names=names):
            return torch.func.functional_call(layer, dict(zip(names, leaves)), (x,)).loss

        assert torch.autograd.gradcheck(loss, (x.requires_grad_(), *leaves))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_levels_of_any_codes(data):
    """Both torch forms against the specification, for codes of any shape and groups with and without features."""
    B, F, seed = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 40)), data.draw(st.integers(0, 999))
    groups = sorted({*data.draw(st.lists(st.integers(1, F), max_size=5)), F})
    t = problem(B, 3, F, seed=seed)
    dense = torch.relu(t["x"] @ t["W_enc"]) * (torch.rand(B, F, generator=torch.Generator().manual_seed(seed)) < 0.4)
    pool = torch.arange(F)[torch.rand(F, generator=torch.Generator().manual_seed(seed + 1)) < 0.5]
    inside = torch.zeros_like(dense).index_copy_(1, pool, dense[:, pool])
    listed, block = SparseCodes.from_dense(dense), SparseCodes.from_block(dense[:, pool], pool, F)
    for codes, matrix in ((listed, dense), (block, inside)):
        levels = implementation("torch").decode_levels(codes, t["W_dec"], t["b_dec"], groups)
        torch.testing.assert_close(levels, reference.decode_levels(matrix, t["W_dec"], t["b_dec"], groups))
        for g, level in zip(groups, levels.unbind(1)):
            kept = codes.of_first(g)
            torch.testing.assert_close(kept.to_dense() @ t["W_dec"] + t["b_dec"], level)
    features = torch.arange(F)
    assert torch.equal(level_of(features, groups), torch.bucketize(features, torch.tensor(groups[:-1]), right=True))


def test_one_group_is_no_group():
    plain, nested = make_sae(**AUX), make_sae(groups=(96,), **AUX)
    for seed in range(3):
        outs = [sae(tokens(9, 12, seed=seed)) for sae in (plain, nested)]
        torch.testing.assert_close(outs[0].loss, outs[1].loss)
        for sae, out in zip((plain, nested), outs):
            sae.zero_grad()
            out.loss.backward()
        torch.testing.assert_close(gradients(plain), gradients(nested))
    assert outs[0].aux > 0


@pytest.mark.parametrize("rule", [{"d_sae": 128, "groups": (9, 128)}, {"l": None, "groups": (9, 50, 96)}], ids=str)
def test_row_adam(rule):
    rows, other = make_sae(row_grads=True, **rule, **AUX), make_sae(**rule, **AUX)
    ours, adam = RowAdam(rows, lr=0.01), torch.optim.Adam(other.parameters(), lr=0.01)
    for step in range(4):
        ours.zero_grad()
        adam.zero_grad()
        for sae in (rows, other):
            sae(tokens(10, 12, seed=step)).loss.backward()
        ours.step()
        plain_step(other, adam, 1.0)
    assert_close(state_of(rows), state_of(other), rtol=1e-5, atol=1e-8)


def test_evaluation_mode_has_the_nested_loss_too():
    sae, x = make_sae(groups=GROUPS), tokens(40, 12)
    sae.calibrate(x, 4)
    sae.eval()
    out = sae(x)
    levels = reference.decode_levels(sae.encode(x), sae.W_dec, sae.b_dec, GROUPS)
    torch.testing.assert_close(out.loss, reference.nested_loss(x, levels))
    torch.testing.assert_close(out.mse, (x - levels[:, -1]).square().sum(-1).mean())
    result = evaluate_activations(sae, x)
    expected = (x[:, None] - levels).square().sum((0, 2)) / (x - x.mean(0)).square().sum()
    assert result["fvu_groups"] == pytest.approx(expected.tolist())
    assert result["fvu_groups"][-1] == pytest.approx(result["fvu"])
    assert "fvu_groups" not in evaluate_activations(make_sae_calibrated(x), x)


def make_sae_calibrated(x):
    sae = make_sae()
    sae.calibrate(x, 4)
    return sae


@pytest.mark.parametrize(
    ("groups", "error"),
    [
        ((), ValueError),
        ((0, 96), ValueError),
        ((96, 96), ValueError),
        ((40, 10, 96), ValueError),
        ((10, 40), ValueError),
        ((10, 97), ValueError),
        ((10.5, 96), TypeError),
        (("10", 96), TypeError),
        ((True, 96), ValueError),
        (96, TypeError),
        ("96", TypeError),
        ({10, 96}, TypeError),
    ],
    ids=str,
)
def test_bad_groups_are_named(groups, error):
    with pytest.raises(error, match=r"groups=.*ascend from 1 to d_sae=96"):
        SampledSAEConfig(d_in=12, d_sae=96, k=4, groups=groups)


def test_saved_and_loaded(tmp_path):
    sae = make_sae(groups=[torch.tensor(10), 40, 96])
    assert sae.cfg.groups == (10, 40, 96)
    sae.save_pretrained(tmp_path)
    again = SampledSAE.from_pretrained(tmp_path)
    assert again.cfg == sae.cfg
    assert same_weights(sae, again)
    assert json.loads((tmp_path / "config.json").read_text())["sae"]["groups"] == [10, 40, 96]
    # without groups the file is what earlier versions read and wrote
    make_sae().save_pretrained(tmp_path)
    assert "groups" not in json.loads((tmp_path / "config.json").read_text())["sae"]


def test_training_resumes_with_its_groups_alone(store, tmp_path):
    config = SampledSAEConfig(d_in=store.d_in, d_sae=64, k=3, l=None, groups=(8, 64), dead_after=500)
    how = TrainConfig(steps=12, batch_size=40, checkpoint_every=5, log_every=4)
    whole = Trainer(config, how, store, tmp_path / "whole").run(progress=False)
    begun_training(config, how, store, tmp_path / "halves", steps=7)
    halves = Trainer(config, how, store, tmp_path / "halves").run(progress=False)
    assert same_weights(whole, halves)
    assert SampledSAE.from_pretrained(tmp_path / "whole").cfg.groups == (8, 64)
    for other in (None, (9, 64)):
        with pytest.raises(ValueError, match=r"groups was \[8, 64\], is"):
            Trainer(replace(config, groups=other), how, store, tmp_path / "halves")


def test_command_line():
    def config(*options):
        args = build_parser().parse_args(["train", "activations", "out", "--features", "96", "--k", "3", *options])
        return sae_config(args, ArrayActivations(tokens(5, 12)), d_sae=96, k=3)

    assert config().groups is None
    assert config("--groups", "10, 40").groups == config("--groups", "10,40,96").groups == (10, 40, 96)
    with pytest.raises(ValueError, match=r"groups=\[97, 96\]"):
        config("--groups", "97")
    with pytest.raises(SystemExit):
        config("--groups", "10,many")


@pytest.mark.parametrize("groups", [[1, "2"], "12", [3, 2], 5])
def test_recorded_groups_that_are_none_name_the_file(tmp_path, groups):
    assert training_fields(tmp_path / "cfg.json", {"groups": [2, 7]}) == {"groups": [2, 7]}
    with pytest.raises(ValueError, match=r"cfg\.json: recorded training"):
        training_fields(tmp_path / "cfg.json", {"groups": groups})


@pytest.mark.parametrize("number", [-1, 2.5, "10"], ids=str)
def test_codes_of_no_number_of_features_are_refused(number):
    codes = make_sae(groups=GROUPS)(tokens(5, 12)).codes
    with pytest.raises((TypeError, ValueError), match=f"n_features={number!r}"):
        codes.of_first(number)
