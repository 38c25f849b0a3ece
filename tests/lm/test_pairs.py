"""Two places of a model in one pass, a transcoder trained on them, and spliced in the place of what it reconstructs."""

import copy
import json

import pytest
import torch
from makers import make_sae, tokens
from tiny_models import CONTEXT, D, gpt2, gpt_neox, llama, mpnet

from sampled_sae import ActivationStore, SampledSAEConfig, TrainConfig, Trainer
from sampled_sae.lm import (
    HookPoint,
    PointSplice,
    SpliceEvaluator,
    capture,
    harvest,
    harvest_mlp,
    harvest_pair,
    transcode_with,
    transcoded_cross_entropy,
)
from sampled_sae.lm.passes import batches_at
from sampled_sae.residual_stream.hook_points import layer_point, mlp_of, mlp_points, replaced_point
from sampled_sae.training.evaluation import reconstruct_with
from sampled_sae.training.opening import as_activations

MLP = "model.layers.1.mlp"
QUIET = {"progress": False, "drop_tokens": ()}


def activations(model, rows, layer, batch_size=8):
    """(rows, input, output) of an MLP, batch by batch."""
    return (
        (batch, *found)
        for batch, found in batches_at([(model, point) for point in mlp_points(model, layer)], rows, batch_size)
    )


@pytest.mark.parametrize("make", [llama, gpt_neox, gpt2], ids=lambda make: make.__name__)
def test_what_is_stored_is_what_the_mlp_reads_and_writes(make, rows, tmp_path):
    torch.manual_seed(0)
    model = make().eval()
    pair = harvest_mlp(model, rows, 2, tmp_path, holdout_rows=3, rows_per_shard=5, batch_size=4, **QUIET)
    x, y = (torch.cat([store.shard(i) for i in range(2)]) for store in (pair.x, pair.target))
    assert pair.tokens == [5 * (CONTEXT - 1), 3 * (CONTEXT - 1)]
    assert len(pair.holdout()[0]) == 3 * (CONTEXT - 1)
    with torch.no_grad():
        torch.testing.assert_close(mlp_of(model, 2)(x), y)
        seen = [(a, b) for _, a, b in activations(model, rows[:8], 2)]
    torch.testing.assert_close(torch.cat([a[:, 1:].flatten(0, 1) for a, _ in seen]), x)
    assert ActivationStore.open(tmp_path / "inputs").manifest["point"] == str(mlp_points(model, 2)[0])
    assert not mlp_of(model, 2)._forward_hooks
    assert as_activations(tmp_path).manifest == pair.manifest
    with pytest.raises(ValueError, match="holds the stores inputs, outputs; name the one to read"):
        ActivationStore.open(tmp_path)


def test_tokens_are_left_out_of_both(small_llama, rows, tmp_path):
    id_, most = int(rows[0, 3]), 1.0
    how = {"drop_tokens": [id_], "drop_first": False, "max_norm_ratio": most, "progress": False}
    pair = harvest_mlp(small_llama, rows, 1, tmp_path, **how)
    _, x, y = next(activations(small_llama, rows, 1, len(rows)))
    left = rows != id_
    limits = [most * t[:8][left[:8]].norm(dim=-1).median() for t in (x, y)]
    for t, limit in zip((x, y), limits):
        left &= t.norm(dim=-1) <= limit
    assert 0 < left.sum() < left.numel() / 2
    counts = pair.x.manifest["dropped"]
    assert counts == pair.target.manifest["dropped"]
    assert sum(counts.values()) == int((~left).sum())
    torch.testing.assert_close(pair.x.shard(0), x[left])
    torch.testing.assert_close(pair.target.shard(0), y[left])


def test_the_mlp_itself_loses_nothing_and_zeros_all(small_llama, rows):
    same = transcoded_cross_entropy(small_llama, rows, 1, copy.deepcopy(mlp_of(small_llama, 1)))
    logits = small_llama(input_ids=rows).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
    assert same["ce_clean"] == pytest.approx(float(expected.detach()), rel=1e-5)
    assert same["ce_spliced"] == pytest.approx(same["ce_clean"], abs=1e-5)
    assert same["loss_recovered_zero"] == pytest.approx(1, abs=1e-3)
    nothing = transcoded_cross_entropy(small_llama, rows, 1, torch.zeros_like)
    assert nothing["ce_spliced"] == nothing["ce_zero"] != nothing["ce_clean"]
    assert nothing["loss_recovered_zero"] == 0


def test_a_transcoder_of_an_mlp(small_llama, rows, tmp_path):
    pair = harvest_mlp(small_llama, rows.repeat(6, 1), 1, tmp_path / "acts", holdout_rows=4, **QUIET)
    config = SampledSAEConfig(d_in=D, d_sae=64, k=12, l=None, d_out=D, skip=True)
    sae = Trainer(config, TrainConfig(steps=150, batch_size=60, lr=1e-2), pair, tmp_path / "run").run(progress=False)
    found = transcoded_cross_entropy(small_llama, rows, 1, transcode_with(sae))
    assert found["loss_recovered_mean"] > 0.5
    x = tokens(9, D, dtype=torch.float32)
    torch.testing.assert_close(transcode_with(sae)(x), sae(x, x).x_hat)


def test_any_two_places(model, rows, tmp_path):
    read, target = layer_point(model, 0), layer_point(model, 2)
    pair = harvest_pair(model, rows, str(read), target, tmp_path, batch_size=11, drop_first=False, **QUIET)
    for store, layer in ((pair.x, 0), (pair.target, 2)):
        with torch.no_grad(), capture(model, layer) as captured:
            model(input_ids=rows, use_cache=False)
        torch.testing.assert_close(store.shard(0), captured.value.flatten(0, 1))
    with torch.no_grad(), replaced_point(model, read, target, lambda x, y: y + 2 * x):
        moved = model(input_ids=rows, use_cache=False).logits
    block = target.of(model)
    handle = block.register_forward_hook(lambda _, args, out: block_with(out, pair, rows))
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=rows, use_cache=False).logits, moved)
    handle.remove()


def block_with(out, pair, rows):
    after = (pair.target.shard(0) + 2 * pair.x.shard(0)).view(*rows.shape, -1)
    return (after, *out[1:]) if isinstance(out, tuple) else after


def test_a_harvest_goes_on_where_it_was_killed(small_llama, rows, tmp_path):
    how = {"holdout_rows": 2, "rows_per_shard": 3, **QUIET}
    for name in ("whole", "killed"):
        harvest_mlp(small_llama, rows, 1, tmp_path / name, **how)
    of_whole = {file.relative_to(tmp_path / "whole"): file.read_bytes() for file in (tmp_path / "whole").rglob("*.*")}
    killed = tmp_path / "killed"
    (killed / "outputs" / "shard_00001.safetensors").unlink()
    manifest = json.loads((killed / "inputs" / "manifest.json").read_text())
    manifest |= {"complete": False, "shards": manifest["shards"][:2]}
    (killed / "inputs" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="the harvest has not finished"):
        as_activations(killed)
    harvest_mlp(small_llama, rows, 1, killed, **how)
    assert {file.relative_to(killed): file.read_bytes() for file in killed.rglob("*.*")} == of_whole
    with pytest.raises(ValueError, match="rows_per_shard=3, this call has rows_per_shard=4"):
        harvest_mlp(small_llama, rows, 1, killed, **{**how, "rows_per_shard": 4})
    with pytest.raises(ValueError, match=r"point='model\.layers\.1\.mlp:in', this call has point='model\.layers\.2"):
        harvest_mlp(small_llama, rows, 2, killed, **how)
    with pytest.raises(ValueError, match="holds a harvest of two places"):
        harvest(small_llama, rows, 1, killed, progress=False)
    harvest(small_llama, rows, 1, tmp_path / "one", progress=False)
    with pytest.raises(ValueError, match="holds a harvest of one place"):
        harvest_mlp(small_llama, rows, 1, tmp_path / "one", **how)


def test_spliced_at_a_layer_it_is_the_splice_of_the_residual_stream(small_llama, rows):
    point = layer_point(small_llama, 1)
    most, special = 6.0, [int(rows[0, 3])]
    at_point = PointSplice(small_llama, rows, point, point, max_norms=(most, most), drop_tokens=special)
    of_layer = SpliceEvaluator(small_llama, rows, 1, max_norm=most, drop_tokens=special)
    ours, theirs = (one.evaluate(lambda x: 0.7 * x) for one in (at_point, of_layer))
    assert 0 < ours["spliced_tokens"] < rows.numel()
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_splices_know_what_they_are_of(small_llama, rows, tmp_path):
    pair = harvest_mlp(small_llama, rows, 1, tmp_path / "acts", holdout_rows=4, **QUIET)
    held = pair.holdout_rows()
    transcoder = make_sae(d_in=D, d_out=D, dtype=torch.float32)
    plain = make_sae(d_in=D, dtype=torch.float32)
    for sae in (transcoder, plain):
        sae.eval().calibrate(pair.x.shard(0), 4)
    of_pair = PointSplice.of_harvest(small_llama, held, pair.manifest)
    of_one = PointSplice.of_harvest(small_llama, held, pair.target.manifest)
    assert (
        of_pair.evaluate(reconstruct_with(transcoder))["ce_zero"] == of_one.evaluate(reconstruct_with(plain))["ce_zero"]
    )
    with pytest.raises(ValueError, match=r"mlp:in to model\.layers\.1\.mlp:out goes a transcoder"):
        of_pair.evaluate(reconstruct_with(plain))
    with pytest.raises(ValueError, match=r"mlp:out to model\.layers\.1\.mlp:out goes an SAE"):
        of_one.evaluate(reconstruct_with(transcoder))
    with pytest.raises(ValueError, match="is of a transcoder, which makes no residual stream"):
        SpliceEvaluator(small_llama, rows, 1).evaluate(reconstruct_with(transcoder))
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp:out of .*, which is no residual stream"):
        SpliceEvaluator.of_harvest(small_llama, held, pair.target.manifest)
    with pytest.raises(ValueError, match="reconstruct returned"):
        of_pair.evaluate(lambda x: x[:, :-1])
    other = llama().eval()
    with pytest.raises(ValueError, match="take the model that was harvested"):
        PointSplice.of_harvest(other, held, pair.manifest)
    assert PointSplice.of_harvest(other, held, pair.manifest, insist=True).spliced_tokens > 0


def test_what_cannot_be_is_named(small_llama, rows, tmp_path):
    with pytest.raises(ValueError, match="sae: is no transcoder"):
        transcode_with(make_sae())
    encoder = mpnet()
    with pytest.raises(ValueError, match="must predict the next token: MPNetForMaskedLM has no head"):
        PointSplice(encoder, rows, layer_point(encoder, 0), layer_point(encoder, 1))
    with pytest.raises(ValueError, match=r"layer=9"):
        harvest_mlp(small_llama, rows, 9, tmp_path)
    small_llama.model.layers[1].mlp.down_proj.weight.data.fill_(torch.inf)
    with pytest.raises(
        ValueError, match=r"at model\.layers\.1\.mlp:out are not finite \(NaN or inf\) in rows \[0, 1, 2"
    ):
        harvest_mlp(small_llama, rows, 1, tmp_path, progress=False)
    assert not (tmp_path / "inputs" / "manifest.json").exists()
    del small_llama.model.layers[1]._modules["mlp"]
    with pytest.raises(ValueError, match="has no MLP by the name of mlp"):
        mlp_of(small_llama, 1)


def test_places_that_are_none_are_named(small_llama, rows, tmp_path):
    inputs = HookPoint(MLP, "in")
    for points, said in (
        ((inputs, inputs), r"target=.*mlp:in: is what is read"),
        ((MLP, inputs), "hook point 'model.layers.1.mlp': must be MODULE:in or MODULE:out"),
        ((inputs, "model.layers.1.mpl:out"), r"no module of this name, as model\.layers\.1\.mlp"),
        ((inputs, "model.rotary_emb:out"), r"hook point model\.rotary_emb:out: has .*, must be \[2, T, d\]"),
        ((inputs, "model.layers:out"), "is reached never in a pass"),
    ):
        with pytest.raises(ValueError, match=said):
            harvest_pair(small_llama, rows, *points, tmp_path, **QUIET)
    with pytest.raises(TypeError, match="layer: unknown, options are source"):
        harvest_pair(small_llama, rows, inputs, f"{MLP}:out", tmp_path, layer=1)
    small_llama.model.layers[2] = small_llama.model.layers[1]
    with pytest.raises(ValueError, match="is reached 2 times in a pass"):
        harvest_pair(small_llama, rows, inputs, f"{MLP}:out", tmp_path, **QUIET)
    later, earlier = HookPoint("model.layers.3", "out"), HookPoint("model.layers.0", "out")
    with pytest.raises(ValueError, match=r"model\.layers\.3:out: comes after model\.layers\.0:out"):
        PointSplice(llama().eval(), rows, later, earlier)
    assert not list(tmp_path.rglob("manifest.json"))
