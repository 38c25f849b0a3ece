"""The harvest: what it stores, and that a kill loses nothing."""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from makers import contents
from safetensors.torch import load_file
from tiny_models import CONTEXT, VOCABULARY, D, llama

from sampled_sae.lm import capture, harvest
from sampled_sae.training.activation_store import ActivationStore


def run_harvest(model, rows, folder, **changes):
    settings = {
        "batch_size": 2,
        "rows_per_shard": 3,
        "holdout_rows": 2,
        "source": "random",
        "progress": False,
    }
    return harvest(model, rows, 1, folder, **{**settings, **changes})


def test_harvest_holds_the_activations(model, rows, tmp_path):
    manifest = run_harvest(model, rows, tmp_path)
    assert manifest == json.loads((tmp_path / "manifest.json").read_text())
    assert (manifest["format"], manifest["version"]) == ("sampled-sae activations", 1)
    assert (manifest["d_in"], manifest["layer"], manifest["context"]) == (D, 1, CONTEXT)
    assert manifest["complete"] is True
    assert [shard["file"] for shard in manifest["shards"]] == [f"shard_0000{i}.safetensors" for i in range(3)]

    with capture(model, 1) as captured:
        model(input_ids=rows)
    want = captured.value.detach()[:, 1:]
    train, held = want[:9].flatten(0, 1), want[9:].flatten(0, 1)
    got = torch.cat([load_file(tmp_path / shard["file"])["activations"] for shard in manifest["shards"]])
    torch.testing.assert_close(got, train)
    holdout = load_file(tmp_path / "holdout.safetensors")
    torch.testing.assert_close(holdout["activations"], held)
    assert torch.equal(holdout["rows"], rows[9:])
    assert manifest["holdout"]["tokens"] == len(held)
    assert manifest["holdout"]["rows"] == 2
    assert (got * manifest["scale"]).square().sum(dim=1).mean().item() == pytest.approx(D, rel=1e-5)
    for entry in [*manifest["shards"], manifest["holdout"]]:
        assert (tmp_path / entry["file"]).stat().st_size == entry["bytes"]
    assert sum(shard["tokens"] for shard in manifest["shards"]) == len(got)


def test_harvest_drops_large_norms(small_llama, rows, tmp_path):
    small_llama.model.embed_tokens.weight.data[5] *= 1000
    manifest = run_harvest(small_llama, rows, tmp_path, max_norm_ratio=5.0, dtype="float16", drop_first=False)
    with capture(small_llama, 1) as captured:
        small_llama(input_ids=rows[:9])
    flat = captured.value.detach().flatten(0, 1)
    kept = flat[flat.norm(dim=1) <= manifest["max_norm"]]
    assert 0 < len(kept) < len(flat)
    assert manifest["max_norm"] == pytest.approx(5 * flat[: 2 * CONTEXT].norm(dim=1).median().item(), rel=1e-5)
    got = torch.cat([load_file(tmp_path / shard["file"])["activations"] for shard in manifest["shards"]])
    assert got.dtype == torch.float16
    torch.testing.assert_close(got.float(), kept, rtol=2e-3, atol=1e-3)


def test_harvest_in_bfloat16_is_close(small_llama, rows, tmp_path):
    run_harvest(small_llama, rows, tmp_path / "exact")
    run_harvest(small_llama, rows, tmp_path / "fast", compute_dtype="bfloat16")
    exact, fast = (load_file(tmp_path / name / "shard_00000.safetensors")["activations"] for name in ("exact", "fast"))
    assert not torch.equal(exact, fast)
    assert (exact - fast).norm() < 0.05 * exact.norm()


class Killed(BaseException):
    pass


@pytest.mark.one_in(5)
@pytest.mark.parametrize("moment", range(6))  # 5 files replaced before the last shard is listed
@pytest.mark.parametrize("before", [True, False])
def test_harvest_resumes_byte_for_byte(small_llama, rows, tmp_path, monkeypatch, moment, before):
    run_harvest(small_llama, rows, tmp_path / "whole")
    real, calls = os.replace, []

    def kill(source, target):
        calls.append(target)
        if len(calls) == moment + 1 and before:
            raise Killed
        real(source, target)
        if len(calls) == moment + 1:
            raise Killed

    monkeypatch.setattr(os, "replace", kill)
    with pytest.raises(Killed):
        run_harvest(small_llama, rows, tmp_path / "killed")
    monkeypatch.setattr(os, "replace", real)
    run_harvest(small_llama, rows, tmp_path / "killed")
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_harvest_skips_whole_shards_and_repairs_others(small_llama, rows, tmp_path):
    run_harvest(small_llama, rows, tmp_path)
    before = contents(tmp_path)
    passes = []
    handle = small_llama.model.register_forward_pre_hook(lambda *_: passes.append(1))
    run_harvest(small_llama, rows, tmp_path)
    assert (contents(tmp_path), passes) == (before, [])
    (tmp_path / "shard_00001.safetensors").write_bytes(b"short")
    (tmp_path / "holdout.safetensors").unlink()
    (tmp_path / ".shard_00001.safetensors.tmp").write_bytes(b"left by a kill")
    run_harvest(small_llama, rows, tmp_path)
    handle.remove()
    assert contents(tmp_path) == before
    assert len(passes) == 2 + 1  # 3 rows and 2 rows, by 2


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("batch_size", 3),
        ("source", "other"),
        ("dtype", "float16"),
        ("holdout_rows", 1),
        ("max_norm_ratio", 7.0),
    ],
)
def test_harvest_with_other_settings(small_llama, rows, tmp_path, field, value):
    run_harvest(small_llama, rows, tmp_path)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=f"was harvested with {field}="):
        run_harvest(small_llama, rows, tmp_path, **{field: value})
    assert contents(tmp_path) == before


def test_harvest_with_another_model_or_other_rows(small_llama, rows, tmp_path):
    run_harvest(small_llama, rows, tmp_path)
    with pytest.raises(ValueError, match="rows_sha256"):
        run_harvest(small_llama, rows.flip(0), tmp_path)
    with pytest.raises(ValueError, match="weights_sha256"):
        run_harvest(llama(), rows, tmp_path)
    (tmp_path / "manifest.json").write_text("[]")
    with pytest.raises(ValueError, match="must hold a JSON object"):
        run_harvest(small_llama, rows, tmp_path)


def test_harvest_of_activations_that_are_not_finite(small_llama, rows, tmp_path):
    rows[rows == 60] = 0
    rows[7, 3] = 60
    run_harvest(small_llama, rows, tmp_path / "good")
    small_llama.model.embed_tokens.weight.data[60] = float("nan")
    with pytest.raises(ValueError, match=r"not finite .* in rows \[7\]"):
        run_harvest(small_llama, rows, tmp_path / "bad")
    manifest = json.loads((tmp_path / "bad" / "manifest.json").read_text())
    assert (len(manifest["shards"]), manifest["complete"]) == (2, False)
    for shard in manifest["shards"]:
        assert (tmp_path / "bad" / shard["file"]).read_bytes() == (tmp_path / "good" / shard["file"]).read_bytes()


@pytest.mark.parametrize(
    "changes",
    [
        {"batch_size": 0},
        {"rows_per_shard": 0},
        {"dtype": "int8"},
        {"compute_dtype": "float16"},
        {"max_norm_ratio": 0.5},
        {"max_norm_ratio": math.nan},
        {"holdout_rows": 11},
        {"max_norm_ratio": "10"},
        {"drop_first": "no"},
        {"drop_tokens": "special"},
        {"drop_tokens": 5},
    ],
)
def test_harvest_bad_arguments(small_llama, rows, tmp_path, changes):
    with pytest.raises((ValueError, TypeError), match=f"{next(iter(changes))}="):
        run_harvest(small_llama, rows, tmp_path / "new", **changes)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("bad", [torch.zeros(3, 4), torch.zeros(5, dtype=torch.int64), torch.full((2, 4), VOCABULARY)])
def test_harvest_bad_rows(small_llama, tmp_path, bad):
    with pytest.raises(ValueError, match="rows"):
        run_harvest(small_llama, bad, tmp_path)


@pytest.mark.parametrize("bad", [[[1, 2, 3]], np.ones((2, 3), np.int64)])
def test_harvest_rows_that_are_no_tensor(small_llama, tmp_path, bad):
    with pytest.raises(TypeError, match="rows must be a tensor, int64"):
        harvest(small_llama, bad, 1, tmp_path)


def test_harvest_takes_paths_and_dtypes_of_torch(small_llama, rows, tmp_path):
    manifest = run_harvest(small_llama, rows, tmp_path / "a", dtype=torch.float16, source=Path("texts"))
    assert (manifest["dtype"], manifest["source"]) == ("float16", "texts")


def test_a_harvest_does_not_go_on_in_a_written_store(small_llama, rows, tmp_path):
    store = ActivationStore.write(tmp_path, torch.ones(3, D))
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="activations that no harvest wrote"):
        run_harvest(small_llama, rows, store.folder)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("number", [np.int64(2), torch.tensor(2)])
def test_harvest_takes_numbers_of_other_libraries(small_llama, rows, tmp_path, number):
    run_harvest(small_llama, rows, tmp_path / "a")
    run_harvest(small_llama, rows, tmp_path / "b", batch_size=number, holdout_rows=number)
    assert contents(tmp_path / "b") == contents(tmp_path / "a")
