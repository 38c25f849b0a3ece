"""Special tokens are left out by id wherever they stand, are counted by reason, and stay as they are in a splice."""

import json
import os

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_models import CONTEXT, VOCABULARY, bert, llama

from sampled_sae.lm import SpliceEvaluator, capture, harvest, special_tokens

BOS, EOS = 7, 9


def with_special_ids(**ids):
    torch.manual_seed(0)
    model = llama()
    for name, token in ids.items():
        setattr(model.config, name, token)
    return model


def stored(folder, manifest):
    return torch.cat([load_file(folder / shard["file"])["activations"] for shard in manifest["shards"]])


def residual(model, rows, layer=1):
    with torch.no_grad(), capture(model, layer) as captured:
        model(input_ids=rows)
    return captured.value


def expected(model, rows, tokens):
    keep = torch.ones_like(rows, dtype=torch.bool)
    keep[:, 0] = False
    for token in tokens:
        keep &= rows != token
    return residual(model, rows)[keep]


@pytest.mark.parametrize(
    ("ids", "given", "dropped"),
    [
        ({"bos_token_id": BOS}, None, [BOS]),
        ({"bos_token_id": BOS, "eos_token_id": [EOS, 11], "pad_token_id": 0}, None, [0, BOS, EOS, 11]),
        ({"bos_token_id": BOS}, (), []),
        ({"bos_token_id": BOS}, [np.int64(3), torch.tensor(20), 3], [3, 20]),
        ({"eos_token_id": VOCABULARY + 5}, None, []),
    ],
)
def test_tokens_left_out_by_id(rows, tmp_path, ids, given, dropped):
    model = with_special_ids(**ids)
    rows[:, 5] = BOS
    rows[2, 7:9] = EOS
    manifest = harvest(
        model, rows, 1, tmp_path, drop_tokens=given, holdout_rows=3, batch_size=2, rows_per_shard=3, progress=False
    )
    assert manifest["settings"]["drop_tokens"] == dropped
    torch.testing.assert_close(stored(tmp_path, manifest), expected(model, rows[:8], dropped))
    held = load_file(tmp_path / "holdout.safetensors")
    torch.testing.assert_close(held["activations"], expected(model, rows[8:], dropped))
    for entry, part in zip([*manifest["shards"], manifest["holdout"]], (rows[:3], rows[3:6], rows[6:8], rows[8:])):
        special = int(torch.isin(part[:, 1:], torch.tensor(dropped)).sum())
        assert entry["dropped"] == {"first_position": len(part), "special_token": special, "norm": 0}
        assert entry["tokens"] + sum(entry["dropped"].values()) == part.numel()
    assert manifest["dropped"]["special_token"] == sum(
        shard["dropped"]["special_token"] for shard in manifest["shards"]
    )


def test_each_vector_is_counted_once_and_sinks_do_not_move_the_limit(rows, tmp_path):
    model = with_special_ids(bos_token_id=BOS)
    with torch.no_grad():
        model.model.embed_tokens.weight[BOS] *= 1000
        model.model.embed_tokens.weight[EOS] *= 1000
    rows[rows == BOS] = 0
    rows[rows == EOS] = 0
    rows[:, ::2] = BOS  # most of the first batch
    rows[4, 3] = EOS  # an outlier that no set names
    manifest = harvest(model, rows, 0, tmp_path, max_norm_ratio=5.0, progress=False)
    assert manifest["dropped"] == {"first_position": 11, "special_token": 11 * (CONTEXT // 2 - 1), "norm": 1}
    keep = (rows != BOS) & (rows != EOS)
    torch.testing.assert_close(stored(tmp_path, manifest), residual(model, rows, 0)[keep])


def test_first_positions_that_stay_are_dropped_by_id(rows, tmp_path):
    model = with_special_ids(bos_token_id=BOS)
    rows[rows == BOS] = 0
    rows[:3, 0] = BOS
    manifest = harvest(model, rows, 1, tmp_path, drop_first=False, progress=False)
    assert manifest["dropped"] == {"first_position": 0, "special_token": 3, "norm": 0}


def test_a_resumed_harvest_counts_the_same(rows, tmp_path, monkeypatch):
    model = with_special_ids(bos_token_id=BOS)
    rows[:, 4] = BOS
    whole = harvest(model, rows, 1, tmp_path / "whole", rows_per_shard=3, holdout_rows=2, progress=False)
    real, calls = os.replace, []

    def kill(source, target):
        calls.append(target)
        if len(calls) == 4:
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "replace", kill)
    with pytest.raises(KeyboardInterrupt):
        harvest(model, rows, 1, tmp_path / "killed", rows_per_shard=3, holdout_rows=2, progress=False)
    monkeypatch.undo()
    again = harvest(model, rows, 1, tmp_path / "killed", rows_per_shard=3, holdout_rows=2, progress=False)
    assert again == whole
    (tmp_path / "killed" / "shard_00001.safetensors").unlink()
    assert harvest(model, rows, 1, tmp_path / "killed", rows_per_shard=3, holdout_rows=2, progress=False) == whole


def test_a_harvest_of_an_earlier_version_goes_on_as_it_began(rows, tmp_path):
    model = with_special_ids(bos_token_id=BOS)
    rows[:, 4] = BOS
    harvest(model, rows, 1, tmp_path, drop_tokens=(), rows_per_shard=3, progress=False)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    del manifest["settings"]["drop_tokens"], manifest["dropped"]
    for shard in manifest["shards"]:
        del shard["dropped"]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "shard_00001.safetensors").unlink()
    with pytest.warns(UserWarning, match="goes on without: special tokens stay in it"):
        again = harvest(model, rows, 1, tmp_path, rows_per_shard=3, progress=False)
    assert [shard["tokens"] for shard in again["shards"]] == [shard["tokens"] for shard in manifest["shards"]]
    assert "drop_tokens" not in again["settings"]


@pytest.mark.parametrize("other", [[3], []])
def test_another_set_is_another_harvest(rows, tmp_path, other):
    model = with_special_ids(bos_token_id=BOS)
    harvest(model, rows, 1, tmp_path, progress=False)
    with pytest.raises(ValueError, match=r"was harvested with drop_tokens=\[7\], this call has drop_tokens="):
        harvest(model, rows, 1, tmp_path, drop_tokens=other, progress=False)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([VOCABULARY], f"drop_tokens={VOCABULARY}: must be a token id from 0 to {VOCABULARY - 1}"),
        ([-1], "drop_tokens=-1"),
        (["<s>"], "drop_tokens='<s>'"),
        (range(VOCABULARY), "leaves nothing of"),
    ],
)
def test_wrong_sets(small_llama, rows, tmp_path, given, message):
    with pytest.raises((ValueError, TypeError), match=message):
        harvest(small_llama, rows, 1, tmp_path / "new", drop_tokens=given, progress=False)
    assert not (tmp_path / "new").exists()


def test_held_out_rows_of_special_tokens_alone(small_llama, rows, tmp_path):
    rows[-1] = 5
    with pytest.raises(ValueError, match=r"drop_tokens=\[5\] leaves nothing of 1 rows"):
        harvest(small_llama, rows, 1, tmp_path / "new", drop_tokens=[5], holdout_rows=1, progress=False)


@pytest.mark.parametrize("drop_first", [True, False])
def test_a_splice_replaces_what_was_trained_on(rows, tmp_path, drop_first):
    model = with_special_ids(bos_token_id=BOS)
    rows[:, 6] = BOS
    manifest = harvest(model, rows, 1, tmp_path, drop_first=drop_first, holdout_rows=4, progress=False)
    evaluator = SpliceEvaluator.of_harvest(model, rows[7:], manifest, scale=2.0)
    assert evaluator.spliced_tokens == manifest["holdout"]["tokens"]
    held = load_file(tmp_path / "holdout.safetensors")["activations"]
    seen = []
    evaluator.evaluate(lambda x: seen.append(x) or x)
    torch.testing.assert_close(torch.cat(seen), held * 2)


def test_a_splice_of_special_tokens_alone(small_llama, rows):
    with pytest.raises(ValueError, match="no token would be replaced"):
        SpliceEvaluator(small_llama, rows, 1, scale=1.0, drop_tokens=range(VOCABULARY))


def test_an_encoders_special_tokens(rows, tmp_path):
    torch.manual_seed(0)
    model = bert().bert
    model.config.cls_token_id, model.config.sep_token_id = 4, 5
    rows[:, 0], rows[:, 6], rows[:, -1] = 4, 4, 5
    manifest = harvest(model, rows, 1, tmp_path, progress=False)
    assert manifest["settings"]["drop_tokens"] == [4, 5]
    torch.testing.assert_close(stored(tmp_path, manifest), expected(model, rows, [4, 5]))


class Tokenizer:
    bos_token_id = eos_token_id = 3
    cls_token_id, pad_token_id, mask_token_id, unk_token_id = 11, None, 12, 2

    def get_vocab(self):
        return {"<|endoftext|>": 0, "a": 1}


def test_special_tokens_of_a_tokenizer():
    assert special_tokens(Tokenizer()) == [0, 3, 11, 12]
    assert special_tokens(Tokenizer(), with_special_ids(vocab_size=12)) == [0, 3, 11]
