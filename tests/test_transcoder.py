"""Transcoders: other activations are reconstructed than are read, with and without a skip."""

import json
from dataclasses import replace

import pytest
import torch
from makers import gradients, make_sae, problem, same_weights, state_of, tokens
from optim_steps import assert_close, plain_step

from sampled_sae import RowAdam, SampledSAE, SampledSAEConfig, reference
from sampled_sae.integrations.saebench import SAEBenchSAE
from sampled_sae.model_card import RunFacts, model_card

D, D_OUT = 12, 7
SHAPES = [{"d_out": D_OUT}, {"d_out": D_OUT, "skip": True, "output_scale": 0.6, "input_scale": 0.37}, {"skip": True}]
RULES = [{"l": 3.0}, {"l": None}, {"l": None, "select": "token"}, {"l": 2.0, "groups": (10, 40, 96)}]
AUX = {"aux_coefficient": 0.5, "dead_after": 15, "k_aux": 3, "aux_pool": 20}


def make(dtype=torch.float64, **settings):
    return make_sae(dtype, **settings)


def batch(sae, *shape, seed=1):
    """(x, target) in the dtype of the weights."""
    dtype = sae.W_dec.dtype
    return tokens(*shape, D, dtype=dtype, seed=seed), tokens(*shape, sae.cfg.width_out, dtype=dtype, seed=seed + 100)


def test_the_reconstruction_by_hand():
    c = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    W_dec, b_dec = torch.tensor([[1.0, 2.0, 3.0], [0.0, 1.0, 0.0]]), torch.tensor([0.0, 0.0, 10.0])
    x, W_skip = torch.tensor([[1.0, -1.0], [2.0, 0.0]]), torch.tensor([[1.0, 0.0, 0.0], [0.0, 5.0, 0.0]])
    expected = torch.tensor([[1.0 + 1, 2.0 - 5, 13.0], [0.0 + 2, 2.0, 10.0]])
    assert torch.equal(reference.transcode(c, W_dec, b_dec, x, W_skip), expected)


@pytest.mark.parametrize("l", [1.5, None])
def test_gradients_of_the_specification(l):
    t = {name: value.requires_grad_() for name, value in problem(4, 3, 7, seed=3).items()}
    y, W_dec, b_dec, W_skip = (
        tokens(*shape, seed=i).requires_grad_() for i, shape in enumerate([(4, 2), (7, 2), (2,), (3, 2)])
    )

    def loss(x, y, W_enc, b_enc, W_dec, b_dec, W_skip):
        c = reference.sampled_topk(x, W_enc, b_enc, k=2, l=l)
        return reference.reconstruction_loss(y, reference.transcode(c, W_dec, b_dec, x, W_skip))

    assert torch.autograd.gradcheck(loss, (t["x"], y, t["W_enc"], t["b_enc"], W_dec, b_dec, W_skip))


def specified(sae, x, y):
    """Loss with the aux loss of the features that are dead, mse, and gradients, by the specification."""
    c, leaves = sae.cfg, {name: p.detach().clone().requires_grad_() for name, p in sae.named_parameters()}
    x, y = x.flatten(0, -2) * c.input_scale, y.flatten(0, -2) * c.output_scale
    rule = {"k": c.k, "l": c.l, "score": c.score, "select": c.select}
    codes = reference.sampled_topk(x, leaves["W_enc"], leaves["b_enc"], **rule)
    W_skip = leaves.get("W_skip", torch.zeros(c.d_in, c.width_out, dtype=x.dtype))
    ends = c.groups or (c.d_sae,)
    levels = [reference.transcode(codes[:, :g], leaves["W_dec"][:g], leaves["b_dec"], x, W_skip) for g in ends]
    loss = torch.stack([reference.reconstruction_loss(y, level) for level in levels]).mean()
    a = reference.encode(x, leaves["W_enc"], leaves["b_enc"])
    weights = [leaves[name] for name in ("W_enc", "b_enc", "W_dec")]
    scores = reference.column_scores(a, c.score)
    rule = {"k_aux": c.k_aux, "aux_pool": c.aux_pool, "scores": scores}
    aux = reference.aux_loss(y, levels[-1].detach(), x, *weights, sae.dead, **rule)
    (loss + c.aux_coefficient * aux).backward()
    return loss.detach() + c.aux_coefficient * aux.detach(), levels[-1].detach(), {n: t.grad for n, t in leaves.items()}


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_step_is_that_of_the_specification(shape, rule, impl):
    sae = make(impl=impl, **shape, **rule, **AUX)
    sae.tokens_since_active[::3] = 20
    x, y = batch(sae, 3, 5)
    loss, x_hat, expected = specified(sae, x, y)
    out = sae(x, y)
    assert out.aux > 0
    assert out.x_hat.shape == y.shape
    torch.testing.assert_close(out.loss, loss)
    torch.testing.assert_close(out.x_hat.flatten(0, 1) * sae.cfg.output_scale, x_hat)
    torch.testing.assert_close(out.mse, (y.flatten(0, 1) * sae.cfg.output_scale - x_hat).square().sum(1).mean())
    torch.testing.assert_close(sae.decode(out.codes, x).flatten(0, -2), out.x_hat.flatten(0, 1))
    out.loss.backward()
    torch.testing.assert_close(gradients(sae), expected)
    assert sae.W_skip is None or sae.W_skip.grad.abs().max() > 0


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
def test_triton_equals_torch(shape, rule):
    pytest.importorskip("triton")
    rule = {**rule, "groups": (10, 48)} if "groups" in rule else rule
    saes = [make(torch.float32, d_sae=48, impl=impl, **shape, **rule, **AUX) for impl in ("triton", "torch")]
    outs = []
    for sae in saes:
        sae.tokens_since_active[::3] = 20
        outs.append(sae(*batch(sae, 9)))
        outs[-1].loss.backward()
    assert outs[0].aux > 0
    for name in ("loss", "mse", "aux", "x_hat"):
        torch.testing.assert_close(*(getattr(out, name) for out in outs), msg=lambda m, n=name: f"{n}: {m}")
    torch.testing.assert_close(*map(gradients, saes), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["dense", "lazy", "decayed"])
@pytest.mark.parametrize("row_grads", [True, False])
def test_row_adam(mode, row_grads):
    """In mode "dense" as clip, project, Adam and normalise; W_skip and b_dec move in every step of all modes."""
    rule = {"d_out": D_OUT, "skip": True, **AUX}
    ours, other = make(row_grads=row_grads, **rule), make(**rule)
    optimizer, adam = RowAdam(ours, lr=0.01, mode=mode), torch.optim.Adam(other.parameters(), lr=0.01)
    for step in range(3):
        optimizer.zero_grad()
        adam.zero_grad()
        for sae in (ours, other):
            sae(*batch(sae, 10, seed=step)).loss.backward()
        before = ours.W_skip.detach().clone()
        optimizer.step()
        plain_step(other, adam, 1.0)
        assert (ours.W_skip != before).all()
        if mode == "dense":
            assert_close(state_of(ours), state_of(other), rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(ours.W_dec.norm(dim=1), torch.ones(96, dtype=torch.float64))
    again = RowAdam(ours, lr=0.01, mode=mode)
    again.load_state_dict(optimizer.state_dict())
    assert torch.equal(again.state[ours.W_skip]["exp_avg"], optimizer.state[ours.W_skip]["exp_avg"])


def test_evaluation_mode():
    sae = make(**SHAPES[1])
    x, y = batch(sae, 50)
    sae.calibrate(x, 4)
    sae.eval()
    out = sae(x, y)
    a = torch.relu(x * 0.37 @ sae.W_enc + sae.b_enc)
    expected = torch.where(a > sae.threshold, a, 0) @ sae.W_dec + sae.b_dec + x * 0.37 @ sae.W_skip
    torch.testing.assert_close(out.x_hat, expected / 0.6)
    torch.testing.assert_close(out.loss, (expected - 0.6 * y).square().sum(1).mean())
    torch.testing.assert_close(sae.decode(sae.encode(x), x), out.x_hat)
    without = sae.decode(sae.encode(x), torch.zeros_like(x))
    torch.testing.assert_close(without, (expected - x * 0.37 @ sae.W_skip) / 0.6)
    with pytest.raises(ValueError, match="x=None: a skip transcoder adds x W_skip"):
        sae.decode(sae.encode(x))
    scaled = sae(x * 0.37, y * 0.6, scaled=True)
    torch.testing.assert_close(scaled.x_hat, expected)


def test_where_a_training_starts():
    sae = SampledSAE(SampledSAEConfig(d_in=D, d_sae=96, k=4, d_out=D_OUT, skip=True))
    for rows in (sae.W_dec, sae.W_enc.t()):
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(96))
    assert sae.W_skip.count_nonzero() == 0
    square = SampledSAE(SampledSAEConfig(d_in=D, d_sae=96, k=4, d_out=D))
    assert not torch.equal(square.W_dec, square.W_enc.t())


@pytest.mark.parametrize(
    "rule", [{"l": 3.0}, {"l": None, "skip": True, "input_scale": 0.37, "output_scale": 2.0}], ids=str
)
def test_the_start_from_a_batch(rule):
    sae = SampledSAE(SampledSAEConfig(d_in=D, d_sae=96, k=4, d_out=D_OUT, **rule), dtype=torch.float64)
    x = tokens(60, D)
    x[:, 0] = x[:, 0].abs() + 1
    with torch.no_grad():
        sae.W_enc[:, 5] = -torch.eye(D, dtype=torch.float64)[0]  # active nowhere
    drawn, before = sae.W_dec[5].clone(), sae.W_enc.detach().clone()
    y = torch.relu(x @ tokens(D, D_OUT, seed=3)) + 1
    sae.init_b_dec(x, y)
    in_units = y * sae.cfg.output_scale
    gradient = torch.nn.functional.normalize(in_units - sae.b_dec, dim=1).sum(0)  # 0 at the geometric median
    assert gradient.norm() < 1e-2
    a = torch.relu(x * sae.cfg.input_scale @ before)
    expected = torch.nn.functional.normalize(a.t() @ (in_units - sae.b_dec), dim=1)
    torch.testing.assert_close(sae.W_dec[:5], expected[:5])
    assert torch.equal(sae.W_dec[5], drawn)
    out = sae(x, y)
    part = out.x_hat * sae.cfg.output_scale - sae.b_dec
    # no factor on the codes makes it better
    torch.testing.assert_close((part * (in_units - sae.b_dec)).sum(), part.square().sum())
    assert out.mse < (in_units - sae.b_dec).square().sum(1).mean()
    torch.testing.assert_close(sae.W_enc, before * (sae.W_enc[0, 0] / before[0, 0]))


def test_saved_and_loaded(tmp_path):
    sae = make(**SHAPES[1])
    sae.calibrate(tokens(50, D), 4)
    sae.save_pretrained(tmp_path)
    again = SampledSAE.from_pretrained(tmp_path)
    assert again.cfg == sae.cfg
    assert same_weights(sae, again)
    assert json.loads((tmp_path / "config.json").read_text())["sae"]["d_out"] == D_OUT
    with pytest.raises(ValueError, match=r"output_scale=1\.0: the state dict is of an SAE with output_scale=0\.6"):
        make(**{**SHAPES[1], "output_scale": 1.0}).load_state_dict(sae.state_dict())
    with pytest.raises(RuntimeError, match="W_skip"):
        make(d_out=D_OUT, input_scale=0.37, output_scale=0.6).load_state_dict(sae.state_dict())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"d_out": 0}, "d_out=0"),
        ({"d_out": 2.5}, "d_out=2.5"),
        ({"skip": "yes"}, "skip='yes'"),
        ({"d_out": 7, "apply_b_dec_to_input": True}, "b_dec is of its output; d_out=7"),
        ({"output_scale": 2.0}, "output_scale=2.0: must be 1 for an SAE"),
        ({"d_out": 7, "output_scale": 0}, "output_scale=0: must be a finite number > 0"),
        ({"d_out": 7, "output_scale": -1}, "output_scale=-1: must be a finite number > 0"),
    ],
    ids=str,
)
def test_bad_settings_are_named(settings, said):
    with pytest.raises((TypeError, ValueError), match=said):
        SampledSAEConfig(d_in=D, d_sae=96, k=4, **settings)


def test_defaults_of_a_config():
    sae, transcoder = (SampledSAEConfig(d_in=D, d_sae=96, k=4, d_out=width) for width in (None, D_OUT))
    assert (sae.apply_b_dec_to_input, transcoder.apply_b_dec_to_input) == (True, False)
    assert (sae.width_out, transcoder.width_out, transcoder.aux_features) == (D, D_OUT, D_OUT // 2)
    assert SampledSAEConfig(d_in=D, d_sae=96, k=4, skip=True).d_out == D
    assert replace(transcoder, k=5).d_out == D_OUT
    assert replace(sae, d_out=D_OUT, apply_b_dec_to_input=None) == transcoder
    with pytest.raises(ValueError, match=r"give None where dataclasses\.replace"):
        replace(sae, d_out=D_OUT)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda y: None, r"target=None: a transcoder \(d_out=7\) needs"),
        (lambda y: y[:4], r"target=tensor \(4, 7\): must be a tensor of shape \[5, 7\]"),
        (lambda y: y[:, :6], r"target=tensor \(5, 6\)"),
        (lambda y: y.tolist(), r"target=list: must be a tensor of shape \[5, 7\]"),
        (lambda y: y.numpy(), r"target=array \(5, 7\): must be a tensor of shape"),
        (lambda y: y.float(), "mixed dtypes: target"),
        (lambda y: y.masked_fill(y > 0, torch.nan), "target: .* values are NaN or inf"),
        (lambda y: y.masked_fill(y > 0, torch.inf), "target: .* values are NaN or inf"),
    ],
)
def test_bad_targets_are_named(change, said):
    sae = make(d_out=D_OUT)
    x, y = batch(sae, 5)
    before = sae.threshold_steps.clone()
    with pytest.raises((TypeError, ValueError), match=said):
        sae(x, change(y))
    assert torch.equal(sae.threshold_steps, before)


def test_an_sae_takes_no_target():
    with pytest.raises(ValueError, match="target: an SAE reconstructs x"):
        make()(tokens(5, D), tokens(5, D))


def test_another_shape_for_the_same_weights_is_refused():
    sae = make(d_out=D_OUT)
    for change in ({"d_out": 8}, {"skip": True}):
        with pytest.raises(ValueError, match="make another SampledSAE"):
            sae.cfg = replace(sae.cfg, **change)


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_the_skip_is_summed_in_float32_under_autocast(impl):
    sae = make(torch.float32, impl=impl, d_out=D_OUT, skip=True)
    x, y = batch(sae, 50)
    expected = sae(x, y).x_hat
    with torch.autocast("cpu", torch.bfloat16):
        found = sae(x, y).x_hat
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_decoding_needs_the_tokens_that_were_encoded():
    sae = make(d_out=D_OUT, skip=True)
    x = tokens(6, D)
    with pytest.raises(ValueError, match=r"x=tensor \(4, 12\): has 4 tokens, must be .* the codes have 6"):
        sae.decode(sae.encode_sparse(x), x[:4])


def test_the_card_says_how_a_transcoder_is_used():
    cfg = SampledSAEConfig(d_in=D, d_sae=96, k=4, d_out=D_OUT, skip=True)
    card = model_card("me/mine", cfg, RunFacts())
    assert "A transcoder and linear skip to activations of width 7, with 96 features" in card
    assert "sae.decode(codes, x)" in card
    card = model_card("me/mine", SampledSAEConfig(d_in=D, d_sae=96, k=4, groups=(10, 96)), RunFacts())
    assert "A Matryoshka sparse autoencoder with 96 features" in card
    assert "sae.decode(codes)" in card


def test_saebench_refuses_a_transcoder_before_all_else():
    with pytest.raises(ValueError, match="d_out=7: SAEBench has no place"):
        SAEBenchSAE(make(d_out=D_OUT), model_name="pythia-70m", hook_layer=1)


def test_a_transcoder_is_not_spliced_into_the_stream_it_reads():
    with pytest.raises(ValueError, match="a transcoder reconstructs other activations"):
        make(skip=True).eval().splice(torch.nn.Identity(), 0).__enter__()
