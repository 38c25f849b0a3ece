"""The page of several runs: what it takes from a sweep or a CSV file, and what it refuses."""

import json

import pytest
from page_makers import command, data_of

from sampled_sae.cli import main
from sampled_sae.pages.runs_page import Runs, best, read_runs, runs_page


def row(name, l, seed, fvu, **more):
    return {"name": name, "l": l, "seed": seed, "fvu": fvu, **more}


def made(rows, folder, settings=None):
    return data_of(runs_page("runs", Runs(rows, settings or {}), folder))[0]


def test_the_page_of_a_sweep_links_to_that_of_its_best_sae(root, tmp_path):
    sweep, acts = tmp_path / "sweep", root / "acts"
    size = "--features 32 --k 4 --steps 4 --batch-size 64 --log-every 1 --splice-rows 0"
    command("sweep", acts, sweep, size, "--ls 2,none --scores l2 --seeds 0,1")
    (data, _) = data_of((sweep / "look.html").read_text(encoding="utf-8"))
    rows = json.loads((sweep / "sweep.json").read_text())["rows"]
    assert [run["name"] for run in data["runs"]] == [one["name"] for one in rows]
    assert [run["values"]["fvu"] for run in data["runs"]] == [one["fvu"] for one in rows]
    assert {run["series"] for run in data["runs"]} == {"l2", "batchtopk", "topk"}
    assert [len(run["curves"]["tokens"]) for run in data["runs"]] == [4] * 6
    assert [run["histogram"] for run in data["runs"]] == [one["frequency_histogram"] for one in rows]
    assert {run["link"] for run in data["runs"]} == {None}
    command("look", sweep, acts, "--features top:4 --contexts 2")
    lowest = min(rows, key=lambda one: one["fvu"])["name"]
    (again, _) = data_of((sweep / "look.html").read_text(encoding="utf-8"))
    assert {run["name"]: run["link"] for run in again["runs"] if run["link"]} == {lowest: f"./{lowest}/look.html"}
    assert {**again, "runs": None} == {**data, "runs": None}
    assert data_of((sweep / lowest / "look.html").read_text(encoding="utf-8"))[0]["name"] == f"sweep/{lowest}"


def test_series_are_what_runs_of_all_l_and_seeds_share(tmp_path):
    rows = [
        row("a-l1", 1, 0, 0.5, pool="top", select="batch", k=8, command="one"),
        row("b-l1", 1, 0, 0.4, pool="sample", select="batch", k=8, command="two"),
        row("topk_seed3", None, 3, 0.3, pool="top", select="token", k=8, command="three"),
    ]
    assert [run["series"] for run in made(rows, tmp_path)["runs"]] == ["top", "sample", "topk"]
    assert [run["series"] for run in made(rows[:1], tmp_path)["runs"]] == ["runs"]
    rows[1] |= {"pool": "top", "k": 16}
    assert [run["series"] for run in made(rows, tmp_path)["runs"]] == ["k=8", "k=16", "topk"]


def test_runs_that_differ_in_something_unknown_share_no_mean(tmp_path):
    rows = [row("short_seed0", 1, 0, 0.5, tokens=10), row("long_seed0", 1, 0, 0.4, tokens=20)]
    assert [run["series"] for run in made(rows, tmp_path)["runs"]] == ["short", "long"]


def test_what_was_not_measured_is_left_open(tmp_path):
    rows = [row("a", 1.0, 0, 0.5, mcc=0.1, ok=True), row("b", 2.0, 0, float("nan"), note="x")]
    data = made(rows, tmp_path)
    assert [name for name, _ in data["metrics"]] == ["fvu", "mcc"]
    assert [run["values"] for run in data["runs"]] == [{"fvu": 0.5, "mcc": 0.1}, {}]


def test_a_csv_file_of_runs(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text("name,l,seed,pool,mcc,note\na,2,0,top,0.5,\nb,,1,top,0.25,said\n", encoding="utf-8")
    command("look", file)
    data, _ = data_of((tmp_path / "rows.html").read_text(encoding="utf-8"))
    assert [(run["name"], run["l"], run["seed"], run["values"]) for run in data["runs"]] == [
        ("a", 2, 0, {"mcc": 0.5}),
        ("b", None, 1, {"mcc": 0.25}),
    ]


@pytest.mark.parametrize("name", ["..", "../other", "a/b", "a\\b"])
def test_a_name_that_leads_elsewhere_is_no_link(tmp_path, name):
    for folder in (tmp_path / "other", tmp_path / "sweep" / "a" / "b", tmp_path / "sweep" / "a\\b"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "look.html").touch()
    (tmp_path / "look.html").touch()
    (run,) = made([row(name, 1.0, 0, 0.5)], tmp_path / "sweep")["runs"]
    assert run["link"] is None


def test_a_link_is_a_path_whatever_its_name(tmp_path):
    (tmp_path / "javascript:alert(1)").mkdir()
    (tmp_path / "javascript:alert(1)" / "look.html").touch()
    (run,) = made([row("javascript:alert(1)", 1.0, 0, 0.5)], tmp_path)["runs"]
    assert run["link"] == "./javascript%3Aalert%281%29/look.html"


def test_the_best_run():
    rows = [row("a", 1.0, 0, 0.5, loss_recovered_zero=0.9), row("b", 1.0, 0, 0.4, loss_recovered_zero=0.8)]
    assert best(rows)["name"] == "a"
    assert best([{**one, "loss_recovered_zero": None} for one in rows])["name"] == "b"
    with pytest.raises(ValueError, match="neither loss_recovered_zero nor fvu"):
        best([row("a", 1.0, 0, None)])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name,l,seed\n", "has no runs"),
        ("name,l\na,2\n", "rows[0]: seed=None: must be of type int"),
        ("name,l,seed\na,two,0\n", "rows[0]: l='two': must be of type float or null"),
        ("name,l,seed\n,2,0\n", "rows[0]: name=None: must be of type str"),
    ],
)
def test_rows_that_are_none_are_named(tmp_path, capsys, text, said):
    file = tmp_path / "rows.csv"
    file.write_text(text)
    assert main(["look", str(file)]) == 1
    assert f"{file}: {said}" in capsys.readouterr().err
    assert not (tmp_path / "rows.html").exists()


def test_what_does_not_go_together_is_refused(root, tmp_path, capsys):
    file = tmp_path / "rows.csv"
    file.write_text("name,l,seed,fvu\na,2,0,1\n")
    assert main(["look", str(file), str(root / "acts")]) == 1
    assert "holds no SAEs to look at" in capsys.readouterr().err
    assert main(["look", str(root / "run")]) == 1
    assert "an SAE is looked at on activations, name some" in capsys.readouterr().err


def test_a_sweep_keeps_what_it_shares(tmp_path):
    (tmp_path / "sweep.json").write_text(json.dumps({"rows": [row("a", 1.0, 0, 0.5)], "train": {"lr": 0.1}}))
    found = read_runs(tmp_path)
    assert found.settings == {"lr": 0.1}
    assert made(found.rows, tmp_path, found.settings)["about"] == {"lr": 0.1}
