"""benchmarks/study.py: rows come once, stay, and come out the same when their command is run again."""

import shlex

import pytest

from benchmarks import study
from benchmarks.ground_truth.synthetic import WORLDS
from benchmarks.study_parts import synthetic
from benchmarks.study_parts.report import table
from benchmarks.study_parts.rows import Rows, spread
from benchmarks.study_parts.variants import SAELENS, SYNTHETIC
from sampled_sae import SampledSAEConfig

NAMES = ["batchtopk", "sample-l2-l4", "topk"]
MADE_AT = ("seconds", "date")


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """(folder of rows, folder of activations) with a row each of three SAEs."""
    out, folder = tmp_path_factory.mktemp("out"), tmp_path_factory.mktemp("folder")
    run(places=(out, folder), only=NAMES)
    return out, folder


def run(*options, places, only, seeds=(0,)):
    out, folder = map(str, places)
    names = ["--only", *only, "--seeds", *map(str, seeds)]
    arguments = ["synthetic", "--world", "tiny", *names, "--out", out, "--folder", folder, "--threads", "1", *options]
    return study.main(arguments)


def rows_in(places):
    return Rows(places[0] / "synthetic_tiny.csv").rows


def test_each_run_is_a_row_with_all_measures(places):
    rows = rows_in(places)
    assert [row["name"] for row in rows] == NAMES
    for row in rows:
        modes = ["token"] if row["name"] == "topk" else ["threshold", "pool", "chosen", "batch"]
        for mode in modes:
            assert 0 <= row[f"{mode}_f1"] <= 1
            assert row[f"{mode}_r2"] < 1
            assert row[f"{mode}_dead"] == int(row[f"{mode}_dead"])
        assert 0 < row["mcc"] <= 1
    batch, drawn, topk = rows
    assert batch["pool_features"] == 64
    assert drawn["pool_features"] == 24
    assert drawn["chosen_features"] in (24, 48, 64)
    assert drawn["chosen_r2"] >= drawn["pool_r2"] - 0.05
    assert topk["token_l0"] == pytest.approx(6)
    assert batch["batch_l0"] == pytest.approx(6)
    assert batch["threshold_f1"] == batch["pool_f1"]


def test_what_is_there_is_not_run_again(places, monkeypatch, capsys):
    before = rows_in(places)
    with monkeypatch.context() as patched:
        patched.setattr(synthetic.SyntheticStudy, "run", lambda *_: pytest.fail("was run again"))
        run(places=places, only=NAMES)
    assert "3 of 3 rows" in capsys.readouterr().out
    assert rows_in(places) == before


def test_the_printed_command_makes_the_same_row(places, capsys):
    before = rows_in(places)
    command = shlex.split(before[1]["command"])
    assert command[:3] == [".venv/peers/bin/python", "-m", "benchmarks.study"]
    study.main([*command[3:], "--out", str(places[0]), "--folder", str(places[1]), "--threads", "1"])
    after = rows_in(places)
    for old, new in zip(before, after, strict=True):
        assert {k: v for k, v in new.items() if k not in MADE_AT} == {k: v for k, v in old.items() if k not in MADE_AT}
    assert "before: sample-l2-l4 seed 0" in capsys.readouterr().out


def test_another_seed_is_another_row(places):
    run(places=places, only=["batchtopk"], seeds=(1,))
    zero, one = Rows(places[0] / "synthetic_tiny.csv").of(["batchtopk"])["batchtopk"]
    assert (zero["seed"], one["seed"]) == (0, 1)
    assert zero["mcc"] != one["mcc"]


def test_time_that_is_over_begins_no_run(places, capsys):
    run("--within", "0", places=places, only=["top-l2-l4"])
    assert "goes on from here" in capsys.readouterr().out
    assert "top-l2-l4" not in [row["name"] for row in rows_in(places)]


def test_the_list_runs_nothing(tmp_path, capsys):
    run("--list", places=(tmp_path, tmp_path / "no"), only=NAMES, seeds=(0, 1))
    assert len(capsys.readouterr().out.splitlines()) == 6
    assert not list(tmp_path.iterdir())


def test_saelens_and_ours_learn_alike(places):
    """The same weights, tokens and rates: what they reconstruct in the end differs by their optimizers' small print."""
    run(places=places, only=[SAELENS])
    found = Rows(places[0] / "synthetic_tiny.csv").of(["batchtopk", SAELENS])
    ours, theirs = (rows[0] for rows in found.values())
    for name in ("mcc", "threshold_r2", "threshold_f1"):
        assert ours[name] == pytest.approx(theirs[name], abs=0.02)


@pytest.mark.parametrize("world", WORLDS)
def test_every_variant_is_a_valid_config_of_every_world(world):
    w = WORLDS[world]
    configs = {name: SampledSAEConfig(w.d, w.F, w.k, **variant.rule_of(w.F)) for name, variant in SYNTHETIC.items()}
    rules = {(c.l, c.score, c.pool, c.select, c.groups) for name, c in configs.items() if name != SAELENS}
    assert len(rules) == len(configs) - 1


def test_rows_survive_commas_empty_cells_and_new_columns(tmp_path):
    rows = Rows(tmp_path / "rows.csv")
    rows.put({"name": "a, b", "seed": 0, "tokens": 5, "l": None, "x": 0.1})
    rows.put({"name": "c", "seed": 0, "tokens": 5, "l": 4.0, "y": 1e-9})
    rows.put({"name": "a, b", "seed": 0, "tokens": 5, "l": None, "x": 0.25})
    again = Rows(rows.path)
    assert [row["name"] for row in again.rows] == ["a, b", "c"]
    assert again.find(name="a, b", seed=0, tokens=5)["x"] == 0.25
    assert again.rows[0]["l"] is again.rows[0]["y"] is None
    assert again.rows[1]["y"] == 1e-9
    assert again.find(name="c", seed=0, tokens=6) is None


def test_the_table_has_means_and_half_ranges(places):
    run(places=places, only=["batchtopk"], seeds=(0, 1))
    rows = Rows(places[0] / "synthetic_tiny.csv")
    text = table(rows)
    of = rows.of(["batchtopk"])["batchtopk"]
    mean, least, greatest = spread(of, "mcc")
    assert f"| batchtopk | {len(of)} | {mean:.3f} ±{(greatest - least) / 2:.3f} |" in text
    assert text.count("| topk |") == 1
    assert spread(of, "token_f1") is None
