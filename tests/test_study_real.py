"""`python -m benchmarks.study real`: rows on a store of activations."""

import shlex

import pytest
import torch
from makers import D, write_store
from safetensors.torch import save_file

from benchmarks import study
from benchmarks.study_parts.rows import Rows
from benchmarks.study_parts.variants import BATCHES, DEAD, DENSE, REAL
from sampled_sae import SampledSAEConfig

MADE_AT = ("cpu_seconds", "date")


def options_of(folder, *more):
    store = folder / "acts"
    if not store.exists():
        write_store(store, n=(3000,), n_holdout=300)
    small = ["--features", "64", "--k", "4", "--tokens", "4096", "--threads", "1"]
    return ["real", str(store), "--name", "made", *small, *places(folder), *more]


def places(folder):
    return ["--out", str(folder / "out"), "--folder", str(folder / "kept")]


def rows_of(folder, part=""):
    return Rows(folder / "out" / f"real_made{part}.csv").rows


def without(row, *names):
    return {name: value for name, value in row.items() if name not in (*MADE_AT, *names)}


def test_rows_on_a_store_come_once_and_come_out_the_same_again(tmp_path, capsys):
    begin = options_of(tmp_path, "--seeds", "0", "--only")
    study.main([*begin, "batchtopk", "sample-l2-l4", "topk"])
    batch, drawn, topk = before = rows_of(tmp_path)
    assert [row["tokens"] for row in before] == [4096] * 3
    assert batch["fvu"] == batch["threshold_fvu"] == batch["pool_fvu"]
    assert drawn["pool_features"] == 16
    assert 0 < drawn["threshold_fvu"] != drawn["batch_fvu"]
    assert topk["inference"] == "token"
    assert topk["threshold_fvu"] is None
    study.main([*begin, "batchtopk", "topk"])
    assert "2 of 2 rows" in capsys.readouterr().out
    command = shlex.split(drawn["command"])
    assert command[:3] == ["python", "-m", "benchmarks.study"]
    study.main([*command[3:], "--threads", "1", *places(tmp_path)])
    for old, new in zip(before, rows_of(tmp_path), strict=True):
        assert without(new) == without(old)


def test_stages_make_the_row_of_both(tmp_path):
    begin = options_of(tmp_path, "--seeds", "1", "--only", "top-l2-l2")
    study.main([*begin, "--stage", "measure"])
    assert not rows_of(tmp_path)
    study.main([*begin, "--stage", "train"])
    assert not rows_of(tmp_path)
    study.main([*begin, "--stage", "measure"])
    [measured] = rows_of(tmp_path)
    study.main([*begin, "--again"])
    assert without(measured) == without(rows_of(tmp_path)[0])
    assert measured["cpu_seconds"] >= 0


def test_probes_of_labelled_activations(tmp_path):
    torch.manual_seed(0)
    options = options_of(tmp_path, "--seeds", "0", "--only")
    # a class of the first task is told by a direction of its own, those of the second by nothing
    labels = torch.arange(80) % 2
    x = torch.randn(80, 3, D)
    told = x + 9 * labels[:, None, None] * torch.nn.functional.one_hot(torch.tensor(3), D)
    folder = tmp_path / "kept" / "real_made"
    folder.mkdir(parents=True)
    tasks = {"topic.x": told, "topic.labels": labels, "void.x": x, "void.labels": labels.clone()}
    save_file({name: t.contiguous() for name, t in tasks.items()}, folder / "labelled.safetensors")
    study.main([*options, DENSE, "batchtopk"])
    dense, row = rows_of(tmp_path)
    assert dense["probe_topic"] > 0.99 > 0.75 > dense["probe_void"]
    for mode in ("threshold", "batch"):
        assert row[f"{mode}_probe_topic_20"] > 0.99 > 0.75 > row[f"{mode}_probe_void_20"]
        assert row[f"{mode}_probe_5"] == (row[f"{mode}_probe_topic_5"] + row[f"{mode}_probe_void_5"]) / 2
        assert 0 < row[f"{mode}_topics_jaccard"] < 1


def test_an_unknown_sae_is_named(tmp_path):
    with pytest.raises(SystemExit, match=r"--only none: must be of activations, batchtopk"):
        study.main(["real", str(tmp_path), "--name", "x", "--only", "none"])


def test_every_rule_is_there_once():
    configs = [SampledSAEConfig(576, 8192, 32, **v.rule) for v in REAL.values() if v.name != DENSE and not v.nested]
    assert len({(c.l, c.score, c.pool, c.select) for c in configs}) == len(configs)


def test_parts_hold_different_saes():
    names = [name for part in (REAL, BATCHES, DEAD) for name in part]
    assert len(set(names)) == len(names)
