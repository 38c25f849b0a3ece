"""SAEs of every inference architecture that SAELens makes, against its own classes."""

import pytest
import torch
from sae_lens import SAE
from sae_lens.registry import SAE_CLASS_REGISTRY

from sampled_sae import InferenceConfig, InferenceSAE

D, F, K, D_OUT = 12, 96, 4, 7
INF = float("inf")
# architecture: (rule, further fields of SAELens' configuration)
HELD = {
    "standard": ("relu", {}),
    "jumprelu": ("jumprelu", {}),
    "topk": ("topk", {"k": K}),
    "gated": ("gated", {}),
    "transcoder": ("relu", {"d_out": D_OUT}),
    "skip_transcoder": ("relu", {"d_out": D_OUT}),
    "jumprelu_transcoder": ("jumprelu", {"d_out": D_OUT}),
    "jumprelu_skip_transcoder": ("jumprelu", {"d_out": D_OUT}),
}
# codes with signs, codes found one after another, codes of attention over time
NOT_HELD = {"abstopk", "matching_pursuit", "temporal"}
NORMS = {"none": "none", "layer_norm": "layer_norm", "constant_norm_rescale": "constant_norm"}
FORMS = {
    "reference": {"impl": "reference"},
    "torch": {"impl": "torch", "screen": "off"},
    "screened": {"impl": "torch", "screen": "bf16"},
    "triton": {"impl": "triton"},
}


def pair(architecture, form, whole, thresholds="drawn", normalize="none", rescale=False, b_dec_at_input=True):
    """(SAELens' SAE, ours of the same tensors, activations [3, 5, d])."""
    rule, fields = HELD[architecture]
    transcoder = "d_out" in fields
    b_dec_at_input &= not transcoder
    fields = {**fields, "apply_b_dec_to_input": b_dec_at_input, "normalize_activations": normalize}
    if architecture == "topk":
        fields["rescale_acts_by_decoder_norm"] = rescale
    config = SAE_CLASS_REGISTRY[architecture][1](d_in=D, d_sae=F, **fields)
    theirs = SAE_CLASS_REGISTRY[architecture][0](config)
    assert isinstance(theirs, SAE)
    g = torch.Generator().manual_seed(0)

    def draw(shape):
        return torch.randint(-2, 3, shape, generator=g).float() if whole else torch.randn(shape, generator=g)

    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(draw(p.shape))
        if whole and rule == "gated":
            theirs.r_mag.zero_()
        if rule == "jumprelu":
            t = 2 * draw((F,))
            adversarial = {"drawn": t, "zero": 0 * t, "-inf": t - INF, "inf": t + INF, "huge": 0 * t + 3e38}
            if thresholds == "mixed":
                t[::4], t[1::4], t[2::4] = -INF, INF, 3e38
            theirs.threshold.copy_(adversarial.get(thresholds, t))
    cfg = InferenceConfig(
        D,
        F,
        rule,
        k=fields.get("k"),
        d_out=fields.get("d_out"),
        apply_b_dec_to_input=b_dec_at_input,
        scale_by_decoder_norm=rescale,
        normalize=NORMS[normalize],
        skip="skip" in architecture,
        **FORMS[form],
    )
    return theirs, InferenceSAE(cfg, dict(theirs.state_dict())), draw((3, 5, D))


def assert_a_choice_of_theirs(ours, theirs):
    """The same values in each token; where values tie at the boundary, any of those that tie."""
    assert torch.equal(ours.sort(-1).values, theirs.sort(-1).values)
    differ = ours != theirs
    smallest = torch.where(theirs > 0, theirs, INF).amin(-1, keepdim=True).expand_as(theirs)
    assert (torch.maximum(ours, theirs)[differ] == smallest[differ]).all()


def cases():
    for form in FORMS:
        for architecture in HELD:
            if form == "triton" and architecture not in ("jumprelu", "topk", "gated"):
                continue
            yield pytest.param(architecture, form, id=f"{architecture}-{form}")


@pytest.mark.parametrize(("architecture", "form"), [*cases()])
def test_the_same_codes_bit_for_bit(architecture, form):
    thresholds = ("drawn", "zero", "-inf", "inf", "huge", "mixed") if "jumprelu" in architecture else ("drawn",)
    if form == "triton":
        thresholds = thresholds[-1:]
    for kind in thresholds:
        theirs, ours, x = pair(architecture, form, whole=True, thresholds=kind)
        x = x[:1, :3] if form == "triton" else x
        with torch.no_grad():
            wanted, found = theirs.encode(x), ours.encode(x)
        listed = ours.encode_sparse(x).to_dense().view_as(found)
        assert torch.equal(listed, found)
        if architecture == "topk":
            assert_a_choice_of_theirs(found, wanted)
        else:
            assert torch.equal(found, wanted)
            assert torch.equal(ours(x).x_hat, theirs(x))
            assert torch.equal(ours.decode(found), theirs.decode(wanted))


@pytest.mark.parametrize("normalize", NORMS)
@pytest.mark.parametrize("architecture", HELD)
def test_the_same_outputs_with_every_convention(architecture, normalize):
    for rescale in (False, True) if architecture == "topk" else (False,):
        for b_dec_at_input in (False, True):
            theirs, ours, x = pair(
                architecture, "torch", False, normalize=normalize, rescale=rescale, b_dec_at_input=b_dec_at_input
            )
            with torch.no_grad():
                wanted, x_hat = theirs.encode(x), theirs(x)
            torch.testing.assert_close(ours.encode(x), wanted, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(ours(x).x_hat, x_hat, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", HELD)
def test_the_same_gradients_of_activations(architecture):
    found = []
    for which in (0, 1):
        theirs, ours, x = pair(architecture, "torch", False)
        x.requires_grad_()
        sae = (theirs, ours)[which]
        acts = sae.encode(x)
        acts.retain_grad()
        sae.decode(acts).square().sum().backward()
        found.append((x.grad, torch.where(acts > 0, acts.grad, 0)))
    for theirs, ours in zip(*found):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_every_architecture_is_held_or_known_not_to_be():
    ours = {name for name in SAE_CLASS_REGISTRY if name.startswith("sampled")}
    assert set(SAE_CLASS_REGISTRY) - ours == set(HELD) | NOT_HELD
