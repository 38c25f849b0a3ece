"""A crosscoder's reconstructions in the places of all its layers, and the language model's loss with them."""

from contextlib import ExitStack

import pytest
import torch
from makers import make_sae
from tiny_models import CONTEXT, D, llama, mpnet

from sampled_sae.lm import (
    HookPoint,
    LayersSplice,
    PointSplice,
    SpliceEvaluator,
    capture,
    harvest,
    harvest_beside,
    replace,
    weights_digest,
)
from sampled_sae.training.evaluation import reconstruct_with
from sampled_sae.training.joined_activations import StackedActivations
from sampled_sae.training.same_settings import identity, is_same_kind

QUIET = {"progress": False, "drop_tokens": ()}


def cross_entropy(model, rows):
    with torch.no_grad():
        logits = model(input_ids=rows).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).item()


def clean(model, rows, layers):
    """[N, T, layers, d]"""
    found = []
    for layer in layers:
        with torch.no_grad(), capture(model, layer) as captured:
            model(input_ids=rows, use_cache=False)
        found.append(captured.value)
    return torch.stack(found, dim=2)


def mixed(x):
    """What no layer alone can tell: of each the tanh of it and half of the mean of all."""
    return (x + 0.5 * x.mean(-2, keepdim=True)).tanh()


def test_what_is_the_same_loses_nothing_and_zeros_all(model, rows):
    splice = LayersSplice(model, rows, [0, 2], batch_size=3)
    assert splice.ce_clean == pytest.approx(cross_entropy(model, rows), rel=1e-5)
    about = {"model": model.name_or_path, "weights_sha256": weights_digest(model), "layer": "0, 2", "rows": 11}
    assert splice.about == about
    same = splice.evaluate(lambda x: x)
    assert same["ce_spliced"] == pytest.approx(same["ce_clean"], abs=1e-6)
    assert same["ce_spliced_layers"] == pytest.approx([same["ce_clean"]] * 2, abs=1e-6)
    for ablation in ("zero", "mean"):
        recovered = [same[f"loss_recovered_{ablation}"], *same[f"loss_recovered_{ablation}_layers"]]
        assert recovered == pytest.approx([1] * 3, abs=1e-4)
    assert same["predicted_tokens"] == same["spliced_tokens"] == 11 * (CONTEXT - 1)
    nothing = splice.evaluate(torch.zeros_like)
    assert nothing["ce_spliced"] == nothing["ce_zero"]
    assert nothing["loss_recovered_zero"] == 0
    assert nothing["loss_recovered_zero_layers"] == [0, 0]


@pytest.mark.parametrize("layers", [[0, 2], [3, 1, 0]], ids=str)
def test_it_is_the_model_with_these_layers_replaced(model, rows, layers):
    x = clean(model, rows, layers)
    found = LayersSplice(model, rows, layers, batch_size=4).evaluate(mixed)

    def at(i):
        return lambda now: torch.cat([now[:, :1], mixed(x)[:, 1:, i]], dim=1)

    for i, layer in enumerate(layers):
        with replace(model, layer, at(i)):
            assert found["ce_spliced_layers"][i] == pytest.approx(cross_entropy(model, rows), rel=1e-5)
    with ExitStack() as stack:
        for i, layer in enumerate(layers):
            stack.enter_context(replace(model, layer, at(i)))
        assert found["ce_spliced"] == pytest.approx(cross_entropy(model, rows), rel=1e-5)
    means = x[:, 1:].mean((0, 1)).expand_as(x)
    with replace(model, layers[0], lambda now: torch.cat([now[:, :1], means[:, 1:, 0]], dim=1)):
        assert found["ce_mean_layers"][0] == pytest.approx(cross_entropy(model, rows), rel=1e-5)


def test_the_last_layer_takes_the_place_of_the_earlier_ones(small_llama, rows):
    """All but what reaches it through tokens that are left as they are."""
    everywhere = LayersSplice(small_llama, rows, [2, 0], drop_first=False).evaluate(mixed)
    assert everywhere["ce_spliced"] == pytest.approx(everywhere["ce_spliced_layers"][0], rel=1e-6)
    assert abs(everywhere["ce_spliced"] - everywhere["ce_spliced_layers"][1]) > 1e-3
    special = [int(rows[0, 3])]
    some = LayersSplice(small_llama, rows, [2, 0], drop_tokens=special).evaluate(mixed)
    assert abs(some["ce_spliced"] - some["ce_spliced_layers"][0]) > 1e-5


def test_what_mlps_write_adds_up(small_llama, rows):
    points = [HookPoint(f"model.layers.{layer}.mlp", "out") for layer in (0, 2)]
    splice = LayersSplice(small_llama, rows, points)
    assert splice.about["point"] == "model.layers.0.mlp:out, model.layers.2.mlp:out"
    found = splice.evaluate(mixed)
    assert len({round(ce, 4) for ce in (found["ce_spliced"], *found["ce_spliced_layers"])}) == 3
    alone = PointSplice(small_llama, rows, points[1], points[1])
    assert splice.ce_zero_layers[1] == pytest.approx(alone.ce_zero, rel=1e-6)
    assert LayersSplice(small_llama, rows, [0, points[1]]).about.keys() == {"model", "weights_sha256", "rows"}


def test_what_the_harvest_leaves_out_is_left(small_llama, rows, tmp_path):
    how = {"drop_tokens": [int(rows[0, 3])], "max_norm_ratio": 1.0, "holdout_rows": 4, "progress": False}
    stack = harvest_beside(small_llama, rows, [2, 0], tmp_path, **how)
    held = stack.holdout_rows()
    splice = LayersSplice.of_harvest(small_llama, held, stack.manifest)
    assert 0 < splice.spliced_tokens == len(stack.holdout()[0]) < held.numel() / 2
    seen = []
    splice.evaluate(lambda x: seen.append(x) or x)
    torch.testing.assert_close(torch.cat(seen).flatten(1), stack.holdout()[0])
    assert is_same_kind(splice.about, identity(stack.manifest))


def test_a_crosscoder_in_the_units_of_the_model(small_llama, rows, tmp_path):
    stack = harvest_beside(small_llama, rows, [2, 0], tmp_path, holdout_rows=4, **QUIET)
    sae = make_sae(torch.float32, d_in=D, layers=2, input_scale=stack.scale).eval()
    sae.calibrate(stack.shard(0), 4)
    splice = LayersSplice.of_harvest(small_llama, stack.holdout_rows(), stack.manifest)
    found = splice.evaluate(reconstruct_with(sae))
    assert found == splice.evaluate(lambda x: sae.decode(sae.encode_sparse(x)))
    assert found["ce_spliced"] != found["ce_clean"]
    one, three = (make_sae(torch.float32, d_in=D, layers=n) for n in (1, 3))
    for other, said in ((one, "is of an SAE with layers=1"), (three, "is of a crosscoder with layers=3")):
        with pytest.raises(ValueError, match=f"{said}; into 2 layers goes a crosscoder of as many"):
            splice.evaluate(reconstruct_with(other))
    with pytest.raises(ValueError, match=r"is of a crosscoder, which makes no residual .*: LayersSplice"):
        SpliceEvaluator(small_llama, rows, 1).evaluate(reconstruct_with(sae))
    point = HookPoint("model.layers.0", "out")
    with pytest.raises(ValueError, match="goes an SAE"):
        PointSplice(small_llama, rows, point, point).evaluate(reconstruct_with(sae))
    for wrong, said in ((lambda x: x[:, 0], "reconstruct returned"), (lambda x: x / 0, "not finite"), (id, "int")):
        with pytest.raises((ValueError, TypeError), match=said):
            splice.evaluate(wrong)


def test_models_side_by_side_are_refused(small_llama, rows, tmp_path):
    torch.manual_seed(1)
    other = llama().eval()
    names = {"model_names": ["base", "tuned"], "holdout_rows": 2}
    several = harvest_beside([small_llama, other], rows, 1, tmp_path / "models", **names, **QUIET)
    with pytest.raises(ValueError, match=r"of several models, layer 1 of base .* beside layer 1 of tuned"):
        LayersSplice.of_harvest(small_llama, rows, several.manifest, insist=True)
    stack = harvest_beside(small_llama, rows, [0, 1], tmp_path / "layers", holdout_rows=2, **QUIET)
    with pytest.raises(ValueError, match="take the model that was harvested"):
        LayersSplice.of_harvest(other, rows, stack.manifest)
    assert LayersSplice.of_harvest(other, rows, stack.manifest, insist=True).spliced_tokens > 0
    for evaluator in (SpliceEvaluator, PointSplice):
        with pytest.raises(ValueError, match="manifest is of 2 layers side by side: LayersSplice is for it"):
            evaluator.of_harvest(small_llama, rows, stack.manifest)
    one = harvest(small_llama, rows, 1, tmp_path / "one", **QUIET)
    made = StackedActivations([torch.randn(9, D), torch.randn(9, D)])
    for manifest, said in ((one, "not of layers side by side"), (made.manifest, "that no harvest wrote")):
        with pytest.raises(ValueError, match=said):
            LayersSplice.of_harvest(small_llama, rows, manifest)


@pytest.mark.parametrize(
    ("layers", "changes", "said"),
    [
        ([1], {}, r"layers=\[1\]: must be at least 2, none twice; SpliceEvaluator is for one"),
        ([1, 1], {}, r"layers=\[1, 1\]: must be one or more blocks, none twice"),
        ([1, HookPoint("model.layers.1", "out")], {}, r"layers=\[1, model\.layers\.1:out\]: .* none twice"),
        ([0, 9], {}, "layer=9"),
        ([0, HookPoint("model.layers.1.mlp.up_proj", "out")], {}, r"of widths \[16, 24\]"),
        ([0, 1], {"max_norms": [1.0]}, r"max_norms=\[1.0\]: must be one above 0 for each of 2 layers"),
        ([0, 1], {"max_norms": [1.0, 0.0]}, "max_norms="),
        ([0, 1], {"max_norms": [1e-9, 1e-9]}, "no token would be replaced"),
        ([0, 1], {"batch_size": 0}, "batch_size=0"),
        ([0, 1], {"drop_tokens": [-1]}, "drop_tokens=-1"),
    ],
)
def test_bad_arguments_are_named(small_llama, rows, layers, changes, said):
    with pytest.raises(ValueError, match=said):
        LayersSplice(small_llama, rows, layers, **changes)


def test_an_encoder_has_no_loss(rows):
    with pytest.raises(ValueError, match="MPNetForMaskedLM has no head"):
        LayersSplice(mpnet(), rows, [0, 1])
