"""`python -m benchmarks.study real`: rows on a store of activations."""

import shlex

import pytest
from makers import write_store

from benchmarks import study
from benchmarks.study_parts.rows import Rows
from benchmarks.study_parts.variants import REAL
from sampled_sae import SampledSAEConfig

MADE_AT = ("seconds", "date")


def test_rows_on_a_store_come_once_and_come_out_the_same_again(tmp_path, capsys):
    store = write_store(tmp_path / "acts", n=(3000,), n_holdout=300)
    options = ["--features", "64", "--k", "4", "--tokens", "4096", "--threads", "1", "--seeds", "0"]
    places = ["--out", str(tmp_path / "out"), "--folder", str(tmp_path / "lock")]
    begin = ["real", str(store), "--name", "made", *options, *places, "--only"]
    study.main([*begin, "batchtopk", "sample-l2-l4", "topk"])
    batch, drawn, topk = before = Rows(tmp_path / "out" / "real_made.csv").rows
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
    study.main([*command[3:], "--threads", "1", *places])
    for old, new in zip(before, Rows(tmp_path / "out" / "real_made.csv").rows, strict=True):
        assert {k: v for k, v in new.items() if k not in MADE_AT} == {k: v for k, v in old.items() if k not in MADE_AT}


def test_an_unknown_sae_is_named(tmp_path):
    with pytest.raises(SystemExit, match=r"--only none: must be of batchtopk, topk"):
        study.main(["real", str(tmp_path), "--name", "x", "--only", "none"])


def test_every_rule_is_there_once():
    configs = [SampledSAEConfig(576, 8192, 32, **variant.rule) for variant in REAL.values()]
    assert len({(c.l, c.score, c.pool, c.select) for c in configs}) == len(REAL)
