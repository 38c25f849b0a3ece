"""Several layers of a model, or several models, over the same tokens, and a crosscoder trained on them."""

import json
import re
import shutil

import pytest
import torch
from tiny_models import CONTEXT, gpt2, llama, tiny

from sampled_sae import ActivationStore, PairedActivations, SampledSAEConfig, StackedActivations, TrainConfig, Trainer
from sampled_sae.cli import main
from sampled_sae.lm import capture, harvest, harvest_beside, harvest_mlp
from sampled_sae.training.opening import as_activations

QUIET = {"progress": False, "drop_tokens": ()}


def stream(model, rows, layer):
    with torch.no_grad(), capture(model, layer) as captured:
        model(input_ids=rows, use_cache=False)
    return captured.value


@pytest.mark.parametrize("make", [llama, gpt2], ids=lambda make: make.__name__)
def test_layers_of_a_model_in_one_pass(make, rows, tmp_path):
    torch.manual_seed(0)
    model, passes = make().eval(), []
    handle = model.get_input_embeddings().register_forward_hook(lambda *args: passes.append(1))
    stack = harvest_beside(model, rows, [2, 0], tmp_path, holdout_rows=3, rows_per_shard=5, batch_size=4, **QUIET)
    handle.remove()
    assert len(passes) == 1 + 2 + 1 + 1  # the first batch alone, then 5, 3 and 3 rows
    assert stack.tokens == [5 * (CONTEXT - 1), 3 * (CONTEXT - 1)]
    x = torch.cat([stack.shard(i) for i in range(2)]).view(-1, 2, stack.d_in)
    for i, layer in enumerate((2, 0)):
        torch.testing.assert_close(x[:, i], stream(model, rows[:8], layer)[:, 1:].flatten(0, 1))
    assert [each["layer"] for each in stack.manifest["layers"]] == [2, 0]
    assert as_activations(tmp_path).manifest == stack.manifest
    one = ActivationStore.open(tmp_path / "beside_1")
    assert one.manifest["layer"] == 0
    assert one.has_text


def test_models_over_the_same_texts(small_llama, rows, tmp_path):
    torch.manual_seed(1)
    other = llama().eval()
    models = [small_llama, other]
    how = {"drop_tokens": [int(rows[0, 3])], "max_norm_ratio": 1.0, "progress": False}
    stack = harvest_beside(models, rows, 1, tmp_path, model_names=["base", "tuned"], **how)
    x, y = (stream(model, rows, 1) for model in models)
    left = rows != how["drop_tokens"][0]
    left[:, 0] = False
    limits = [t[:8][left[:8]].norm(dim=-1).median() for t in (x, y)]
    for t, limit in zip((x, y), limits):
        left &= t.norm(dim=-1) <= limit
    assert 0 < left.sum() < left.numel() / 2
    torch.testing.assert_close(stack.shard(0), torch.cat([x[left], y[left]], dim=1))
    assert stack.manifest["model"] == "base, tuned"
    assert stack.manifest["layer"] == 1


def test_it_resumes_where_it_stopped(small_llama, rows, tmp_path):
    whole = harvest_beside(small_llama, rows, [0, 1], tmp_path / "whole", rows_per_shard=4, holdout_rows=2, **QUIET)
    how = {"rows_per_shard": 4, "holdout_rows": 2, **QUIET}
    harvest_beside(small_llama, rows, [0, 1], tmp_path / "part", **how)
    (tmp_path / "part" / "beside_1" / "shard_00001.safetensors").unlink()
    again = harvest_beside(small_llama, rows, [0, 1], tmp_path / "part", **how)
    assert again.manifest["shards"] == whole.manifest["shards"]
    with pytest.raises(ValueError, match="was harvested with layer=0, this call has layer=2"):
        harvest_beside(small_llama, rows, [2, 1], tmp_path / "part", **how)


def test_what_is_not_to_be_harvested_beside_is_refused(small_llama, rows, tmp_path):
    for models, layers, changes, said in (
        (small_llama, [1], {}, r"layers=\[1\]: must be at least 2"),
        (small_llama, 1, {}, "layers=1: must be at least 2"),
        (small_llama, [1, 1], {}, r"layers=\[1, 1\]: has layer 1 twice"),
        (small_llama, [0, 9], {}, "layer=9"),
        ([small_llama, llama()], [0, 1, 2], {}, "must be one number, or one for each of 2 models"),
        ([small_llama, llama()], 1, {"model_names": ["base"]}, "model_names=.*one for each of 2 models"),
        (small_llama, [0, 1], {"model_names": "base"}, "model_names='base'"),
        (small_llama, [0, 1], {"batch_size": 0}, "batch_size=0"),
    ):
        with pytest.raises(ValueError, match=said):
            harvest_beside(models, rows, layers, tmp_path / "new", **{**QUIET, **changes})
        assert not (tmp_path / "new").exists()
    with pytest.raises(TypeError, match="layer: unknown, options are"):
        harvest_beside(small_llama, rows, [0, 1], tmp_path / "new", layer=3)
    harvest(small_llama, rows, 1, tmp_path / "one", **QUIET)
    harvest_mlp(small_llama, rows, 1, tmp_path / "pair", **QUIET)
    harvest_beside(small_llama, rows, [0, 1], tmp_path / "stack", **QUIET)
    for folder, held in (("one", "one place"), ("pair", "two places")):
        with pytest.raises(ValueError, match=f"holds a harvest of {held}"):
            harvest_beside(small_llama, rows, [0, 1], tmp_path / folder, **QUIET)
    for write, held in (
        (lambda at: harvest(small_llama, rows, 1, at, **QUIET), "2 layers"),
        (lambda at: harvest_beside(small_llama, rows, [0, 1, 2], at, **QUIET), "2 layers"),
    ):
        with pytest.raises(ValueError, match=f"holds a harvest of {held}"):
            write(tmp_path / "stack")


def test_models_of_several_widths_are_refused_before_the_harvest(small_llama, rows, tmp_path):
    wide = tiny("Llama", "CausalLM", num_key_value_heads=1, hidden_size=24)
    with pytest.raises(ValueError, match=r"models: of widths \[16, 24\]"):
        harvest_beside([small_llama, wide], rows, 1, tmp_path, **QUIET)
    assert not list(tmp_path.rglob("*.*"))


def test_one_that_was_killed_as_it_began_goes_on(small_llama, rows, tmp_path):
    how = {"rows_per_shard": 4, **QUIET}
    whole = harvest_beside(small_llama, rows, [0, 1, 2], tmp_path, **how)
    first = tmp_path / "beside_0" / "manifest.json"
    new = {**json.loads(first.read_text()), "shards": [], "complete": False}
    for i in range(3):
        shutil.rmtree(tmp_path / f"beside_{i}")
    first.parent.mkdir()
    first.write_text(json.dumps(new))
    with pytest.raises(ValueError, match=r"layers: 1 given|has not finished"):
        as_activations(tmp_path)
    assert harvest_beside(small_llama, rows, [0, 1, 2], tmp_path, **how).manifest == whole.manifest


def test_harvests_of_other_tokens_do_not_belong_together(small_llama, rows, tmp_path):
    """Of the same number, in shards of the same sizes."""
    others = {"texts": rows.flip(0), "norms": rows, "same": rows}
    harvest(small_llama, rows, 1, tmp_path / "one", holdout_rows=2, **QUIET)
    for name, given in others.items():
        harvest(small_llama, given, 2, tmp_path / name, holdout_rows=2, **QUIET)
    manifest = tmp_path / "norms" / "manifest.json"
    left_out = json.loads(manifest.read_text())
    left_out["holdout"]["places_crc32"] = "0"  # as of a harvest that found another token too large
    manifest.write_text(json.dumps(left_out))
    together = {"layers[1]": lambda *each: StackedActivations(each), "target": PairedActivations}
    for argument, make in together.items():
        one, texts, norms, same = (str(tmp_path / name) for name in ("one", *others))
        make(one, same)
        with pytest.raises(ValueError, match=re.escape(argument) + ".*was harvested from other token rows"):
            make(one, texts)
        with pytest.raises(ValueError, match=re.escape(argument) + ".*has other tokens than .* in the held-out part"):
            make(one, norms)


def test_places_tell_which_tokens_were_left_out(small_llama, rows, tmp_path):
    """One token of each row is left out at either layer, and not the same."""
    a, b = (harvest(small_llama, rows, 1, tmp_path / str(i), drop_tokens=[i], progress=False) for i in (1, 2))
    again = harvest(small_llama, rows, 2, tmp_path / "again", drop_tokens=[1], progress=False)
    places = [[shard["places_crc32"] for shard in manifest["shards"]] for manifest in (a, b, again)]
    assert places[0] == places[2] != places[1]


def test_values_that_are_not_finite_name_layer_and_rows(small_llama, rows, tmp_path):
    with torch.no_grad():
        small_llama.get_input_embeddings().weight[rows[6, 2]] = torch.nan
    bad = [i for i, row in enumerate(rows.tolist()) if int(rows[6, 2]) in row]
    how = {"batch_size": 1, "rows_per_shard": 1, **QUIET}
    with pytest.raises(ValueError, match=rf"activations of layer 0 are not finite .* in rows \[{bad[0]}\]"):
        harvest_beside(small_llama, rows, [0, 1], tmp_path, **how)


def test_a_crosscoder_by_command(causal, texts, tmp_path, capsys):
    acts, run = str(tmp_path / "acts"), str(tmp_path / "run")
    ask = ["harvest", acts, "--model", str(causal), "--texts", str(texts), "--context", "8"]
    assert main([*ask, "--layer", "0", "--beside", "1", "2", "--holdout-rows", "4"]) == 0
    assert "Harvests layers 0, 1, 2 of" in capsys.readouterr().out
    small = ["--features", "64", "--k", "3", "--steps", "6", "--batch-size", "20", "--quiet"]
    assert main(["train", acts, run, *small]) == 0
    result = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert len(result["fvu_layers"]) == 3
    assert main(["evaluate", run, acts, "--quiet", "--splice-rows", "3"]) == 0
    result = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert result["predicted_tokens"] == 3 * 7
    assert len(result["loss_recovered_zero_layers"]) == 3
    capsys.readouterr()
    assert main([*ask, "--layer", "0", "--beside", "1", "--mlp"]) == 1
    assert "--beside 1: is of blocks" in capsys.readouterr().err
    assert main([*ask, "--layer", "0", "--beside", "1"]) == 1
    assert "holds a harvest of 3 layers" in capsys.readouterr().err


def test_of_models_side_by_side_no_loss_is_recovered(small_llama, causal, rows, tmp_path, capsys):
    """By command: refused by name where it is asked for, said where it is not."""
    names = {"model_names": ["base", "tuned"], "holdout_rows": 2}
    harvest_beside([small_llama, llama()], rows, 1, tmp_path / "acts", **names, **QUIET)
    small = ["--features", "32", "--k", "2", "--steps", "2", "--batch-size", "10", "--quiet"]
    acts, run = str(tmp_path / "acts"), str(tmp_path / "run")
    assert main(["train", acts, run, *small]) == 0
    capsys.readouterr()
    assert main(["evaluate", run, acts, "--model", str(causal)]) == 0
    assert "No loss recovered: " in (said := capsys.readouterr().err)
    assert "beside layer 1 of base" in said
    assert "one is of layer 1 of tuned" in said
    assert "ce_spliced" not in json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert main(["evaluate", run, acts, "--quiet", "--splice-rows", "1"]) == 1
    assert "--splice-rows 1: " in (said := capsys.readouterr().err)
    assert "so that no model gives both" in said


def test_a_crosscoder_in_python(small_llama, rows, tmp_path):
    stack = harvest_beside(small_llama, rows, [0, 2], tmp_path / "acts", **QUIET)
    config = SampledSAEConfig(d_in=stack.d_in, d_sae=32, k=2, layers=2)
    sae = Trainer(config, TrainConfig(steps=2, batch_size=10), str(tmp_path / "acts"), tmp_path / "run").run(False)
    assert sae.cfg.input_scale == stack.scale
