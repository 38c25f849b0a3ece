"""`accelerate` on SAELens' SAEs for inference: what it gives, and what somebody who looks on sees."""

import copy
import warnings

import pytest
import torch
from published_makers import ARCHITECTURES, D, write_saelens, x
from sae_lens import SAE, HookedSAETransformer
from saelens_makers import Largest
from transformer_lens import HookedTransformerConfig

from sampled_sae.integrations import saelens
from sampled_sae.integrations.saelens.inference import INFERENCE_FORMS, SparseInference

NEAR = {"rtol": 1e-4, "atol": 1e-5}
SAES = [name for name in ARCHITECTURES if "transcoder" not in name]
HOOKS = ("hook_sae_input", "hook_sae_acts_pre", "hook_sae_acts_post", "hook_sae_recons", "hook_sae_output")


def pair(folder, architecture="jumprelu", threshold="random", **changes):
    """(SAELens' SAE, the same accelerated)."""
    write_saelens(folder, architecture, threshold, **changes)
    return SAE.load_from_disk(folder), saelens.accelerate(SAE.load_from_disk(folder))


def assert_same(theirs, ours, tokens=None):
    """Codes, reconstructions and gradients."""
    tokens = x() if tokens is None else tokens
    tokens = tokens.to(theirs.dtype)
    with torch.no_grad():
        expected = theirs.encode(tokens)
        codes = ours.encode(tokens)
        assert codes.shape == expected.shape
        assert torch.equal(codes != 0, expected != 0)
        torch.testing.assert_close(codes, expected, **NEAR)
        torch.testing.assert_close(ours.decode(codes), theirs.decode(expected), **NEAR)
        torch.testing.assert_close(ours(tokens), theirs(tokens), **NEAR)
        sparse = ours.encode_sparse(tokens)
        torch.testing.assert_close(sparse.to_dense().to(codes.dtype), codes.reshape(sparse.shape), **NEAR)
    given = [tokens.clone().requires_grad_() for _ in range(2)]
    for sae, one in zip((theirs, ours), given, strict=True):
        sae.zero_grad()
        (sae.encode(one).square().sum() + sae(one).square().sum()).backward()
    torch.testing.assert_close(given[1].grad, given[0].grad, rtol=1e-3, atol=1e-4)
    for (name, p), q in zip(theirs.named_parameters(), ours.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-3, atol=1e-3, msg=name)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_same_results(tmp_path, architecture):
    theirs, ours = pair(tmp_path, architecture)
    assert type(ours) is INFERENCE_FORMS[type(theirs)]
    assert saelens.accelerate(ours) is ours
    assert_same(theirs, ours)
    assert_same(theirs, ours, x().view(4, 10, D))


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("topk", {"rescale_acts_by_decoder_norm": True}),
        ("jumprelu", {"normalize_activations": "layer_norm"}),
        ("standard", {"normalize_activations": "constant_norm_rescale", "apply_b_dec_to_input": False}),
        ("jumprelu", {"threshold": "-inf"}),
        ("jumprelu", {"threshold": "zero"}),
        ("jumprelu", {"threshold": "huge"}),
    ],
    ids=str,
)
def test_conventions(tmp_path, architecture, changes):
    assert_same(*pair(tmp_path, architecture, **changes))


def test_heads(tmp_path):
    metadata = {"sae_lens_version": "6.22.1", "hook_name": "blocks.0.attn.hook_z"}
    theirs, ours = pair(tmp_path, "standard", reshape_activations="hook_z", metadata=metadata)
    heads = x().view(4, 10, 3, D // 3)
    with torch.no_grad():
        torch.testing.assert_close(ours.encode(heads), theirs.encode(heads), **NEAR)
        torch.testing.assert_close(ours(heads), theirs(heads), **NEAR)
    assert ours(heads).shape == heads.shape


@pytest.mark.parametrize("architecture", SAES)
def test_weights_that_change(tmp_path, architecture):
    theirs, ours = pair(tmp_path, architecture)
    with torch.no_grad():
        for sae in (theirs, ours):
            sae(x())  # nothing of the old weights may be kept
            if architecture != "topk":
                sae.fold_W_dec_norm()
            sae.W_enc.data[:, 3] *= -2
            sae.b_dec += 0.1
            if architecture == "jumprelu":
                sae.threshold.data = sae.threshold * 0.3
            if architecture == "topk":
                sae.activation_fn.k = 2
    assert_same(theirs, ours)
    assert_same(theirs.to(torch.float64), ours.to(torch.float64))
    state = {name: 2 * t for name, t in theirs.state_dict().items()}
    theirs.load_state_dict(state)
    ours.load_state_dict(state)
    assert_same(theirs, ours)


@pytest.mark.parametrize("architecture", SAES)
@pytest.mark.parametrize("name", HOOKS)
def test_hooks_see_and_change_what_they_did(tmp_path, architecture, name):
    seen = {}

    def change(value, hook):
        seen.setdefault(hook.name, []).append(value.detach().clone())
        value = value.clone()
        value[..., :2] = 1.5
        return value

    for sae in pair(tmp_path, architecture):
        with torch.no_grad(), sae.hooks(fwd_hooks=[(name, change)]):
            seen.setdefault("out", []).append(sae(x()))
            seen.setdefault("codes", []).append(sae.encode(x()))
        if name != "hook_sae_output" and name != "hook_sae_recons":
            sparse = None
            with sae.hooks(fwd_hooks=[(name, lambda value, hook: 2 * value)]):
                sparse = sae.encode_sparse(x()).to_dense() if isinstance(sae, SparseInference) else sae.encode(x())
            seen.setdefault("sparse", []).append(sparse.detach())
    for values in seen.values():
        half = len(values) // 2
        for theirs, ours in zip(values[:half], values[half:], strict=True):
            torch.testing.assert_close(ours, theirs, **NEAR)


@pytest.mark.parametrize("architecture", SAES)
def test_error_terms(tmp_path, architecture):
    theirs, ours = pair(tmp_path, architecture)
    errors = []

    def ablate(value, hook):
        return torch.zeros_like(value)

    for sae in (theirs, ours):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            sae.use_error_term = True
        with torch.no_grad():
            torch.testing.assert_close(sae(x()), x(), **NEAR)
            with sae.hooks(fwd_hooks=[("hook_sae_error", lambda value, hook: errors.append(value.clone()))]):
                sae(x())
            with sae.hooks(fwd_hooks=[("hook_sae_acts_post", ablate)]):
                errors.append(sae(x()))
    torch.testing.assert_close(errors[2], errors[0], **NEAR)
    torch.testing.assert_close(errors[3], errors[1], **NEAR)


@pytest.mark.parametrize("architecture", SAES)
def test_inside_a_hooked_transformer(tmp_path, architecture):
    """Logits, what is cached, what an ablated feature changes, and the gradient of the loss."""
    config = HookedTransformerConfig(
        n_layers=2, d_model=D, n_ctx=16, d_head=4, n_heads=3, d_mlp=24, d_vocab=50, act_fn="relu", seed=0
    )
    model = HookedSAETransformer(config)
    metadata = {"sae_lens_version": "6.22.1", "hook_name": "blocks.0.hook_resid_post"}
    results = []
    tokens, post = torch.arange(24).view(2, 12), "blocks.0.hook_resid_post.hook_sae_acts_post"

    def ablate(value, hook):
        value[..., ::2] = 0
        return value

    for sae in pair(tmp_path, architecture, metadata=metadata):
        for use_error_term in (False, True):
            model.zero_grad()
            how = {"saes": [sae], "use_error_term": use_error_term}
            model.run_with_saes(tokens, **how, return_type="loss").backward()
            with torch.no_grad():
                logits, cache = model.run_with_cache_with_saes(tokens, saes=[sae], use_error_term=use_error_term)
                results.append({"logits": logits, **{name: t for name, t in cache.items() if "sae" in name}})
                alone = model.run_with_saes(tokens, saes=[sae], use_error_term=use_error_term)
                torch.testing.assert_close(alone, logits, **NEAR)
                ablated = model.run_with_hooks_with_saes(tokens, saes=[sae], fwd_hooks=[(post, ablate)])
            assert (ablated - logits).abs().max() > 1e-3
            results[-1] |= {"ablated": ablated, "grad": model.W_E.grad.clone()}
    for theirs, ours in zip(results[:2], results[2:], strict=True):
        assert set(theirs) == set(ours)
        assert any("acts_pre" in name for name in theirs)
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name], value, **NEAR, msg=name)


def test_what_is_replaced_is_followed(tmp_path):
    theirs, ours = pair(tmp_path, "standard")
    for sae in (theirs, ours):
        sae.activation_fn = torch.nn.Tanh()
    assert_same(theirs, ours)
    theirs, ours = pair(tmp_path, "jumprelu")
    with torch.no_grad():
        bad = x()
        bad[3, 2] = torch.nan
        torch.testing.assert_close(ours.encode(bad), theirs.encode(bad), **NEAR, equal_nan=True)
        cls = type(theirs)
        original = cls.encode
        try:
            cls.encode = lambda sae, tokens: 3 * original(sae, tokens)
            torch.testing.assert_close(ours(x()), theirs(x()), **NEAR)
        finally:
            cls.encode = original
        mine = type("Mine", (type(ours),), {"encode": lambda sae, tokens: 3 * original(sae, tokens)})
        ours.__class__ = mine
        torch.testing.assert_close(ours(x()), ours.decode(3 * theirs.encode(x())), **NEAR)
        torch.testing.assert_close(ours.encode_sparse(x()).to_dense(), 3 * theirs.encode(x()), **NEAR)


@pytest.mark.parametrize("architecture", SAES)
def test_nan_is_what_it_was(tmp_path, architecture):
    """Of a token of zeros that is divided by its norm, and of biases."""
    theirs, ours = pair(tmp_path, architecture, normalize_activations="constant_norm_rescale")
    tokens = x()
    tokens[3] = 0
    with torch.no_grad():
        expected = theirs.encode(tokens)
        assert expected[3].isnan().any()
        torch.testing.assert_close(ours.encode(tokens), expected, **NEAR, equal_nan=True)
        torch.testing.assert_close(ours(tokens), theirs(tokens), **NEAR, equal_nan=True)
        for sae in (theirs, ours):
            (sae.b_mag if architecture == "gated" else sae.b_enc).data[5] = torch.nan
        torch.testing.assert_close(ours.encode(x()), theirs.encode(x()), **NEAR, equal_nan=True)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_second_derivatives_are_refused(tmp_path, architecture):
    """torch.autograd.grad would leave them out in silence."""
    theirs, ours = pair(tmp_path, architecture)
    tokens = x().requires_grad_()
    for sae in (theirs, ours):
        sae.requires_grad_(False)
        (first,) = torch.autograd.grad(sae(tokens).square().sum(), tokens, create_graph=True)
        if sae is theirs:
            assert torch.autograd.grad((first * tokens).sum(), tokens)[0].isfinite().all()
            continue
        with pytest.raises(RuntimeError, match=r"a second derivative was asked for, .*an SAE that is not accelerated"):
            torch.autograd.grad((first * tokens).sum(), tokens)


def test_it_refuses_what_it_does_not_know(tmp_path):
    theirs, _ = pair(tmp_path, "standard")
    theirs.__class__ = type("Mine", (type(theirs),), {})
    with pytest.raises(TypeError, match="sae=Mine: must be one of SAELens'"):
        saelens.accelerate(theirs)
    theirs, _ = pair(tmp_path, "standard")
    theirs.encode = theirs.encode
    with pytest.raises(ValueError, match=r"sae\.encode: was replaced on this object"):
        saelens.accelerate(theirs)


@pytest.mark.parametrize("architecture", ["jumprelu", "topk"])
def test_no_matrix_of_codes_is_made(architecture):
    n, wide = 300, 1 << 15
    options = {"k": 5} if architecture == "topk" else {}
    sae = SAE.from_dict({"architecture": architecture, "d_in": D, "d_sae": wide, **options})
    if architecture == "jumprelu":
        sae.threshold.data.fill_(4 * float(sae.encode(x()).detach().std()))
    results = []
    for made in (sae, saelens.accelerate(copy.deepcopy(sae))):
        with torch.no_grad(), Largest() as largest:
            results.append(made(x(n)))
        assert (largest.size < n * wide) == isinstance(made, SparseInference)
    torch.testing.assert_close(*results, **NEAR)


def test_saved_files_are_the_same(tmp_path):
    theirs, ours = pair(tmp_path, "jumprelu")
    theirs.save_model(tmp_path / "theirs")
    ours.save_model(tmp_path / "ours")
    for name in ("cfg.json", "sae_weights.safetensors"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()
    again = SAE.load_from_disk(tmp_path / "ours")
    assert torch.equal(again.encode(x()), theirs.encode(x()))
