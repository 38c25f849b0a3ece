"""benchmarks/equal_time.py on tiny activations, with the candidates that are installed."""

import json
import sys

import pytest
import torch

from benchmarks import equal_time
from benchmarks.equal_time import lines, markdown_table
from sampled_sae import ActivationStore

SMALL = ["--features", "64", "--k", "3", "--batch-size", "16", "--threads", "1", "--model", "none"]


def write(folder, seed=0):
    return ActivationStore.write(
        folder, torch.randn(400, 12, generator=torch.Generator().manual_seed(seed)), holdout=80
    )


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs the command; its rows by candidate, without those that have none, and its table."""
    for i, part in enumerate(("one", "pair/inputs", "pair/outputs", "stack/beside_0", "stack/beside_1")):
        write(tmp_path / part, i)

    def run(*arguments):
        words = [equal_time.__file__, "--out", tmp_path / "out.json", *SMALL, *arguments]
        monkeypatch.setattr(sys, "argv", [*map(str, words)])
        equal_time.main()
        rows = json.loads((tmp_path / "out.json").read_text())["rows"]
        return [row for row in rows if "reason" not in row], (tmp_path / "out.md").read_text()

    return run


@pytest.mark.slow
@pytest.mark.usefixtures("forked_workers")
def test_marks_steps_and_seeds_of_several_kinds(run, tmp_path):
    folders = {"matryoshka": tmp_path / "one", "crosscoder": tmp_path / "stack", "transcoder": tmp_path / "pair"}
    given = [word for kind, folder in folders.items() for word in (f"--{kind}", folder)]
    rows, table = run(*given, "--steps", 6, "--marks", 0.02, "--seeds", 0, 1)
    for kind in folders:
        ours = [row for row in rows if row["kind"] == kind and row["candidate"] == "ours, l=None (BatchTopK)"]
        assert [(row["seed"], row["at"]) for row in ours] == [(0, "0.02 s"), (0, "6 steps"), (1, "6 steps")]
        assert all(0 < row["fvu"] < 10 and "weights" not in row for row in ours)
        assert [("ratio" in row) for row in ours] == [False, True, False]
        assert ours[1]["steps"] == ours[2]["steps"] == 6
        assert ours[1]["fvu"] != ours[2]["fvu"]
        assert f"**{kind.capitalize()}**" in table


@pytest.mark.slow
@pytest.mark.usefixtures("forked_workers")
def test_marks_of_saes(run, tmp_path):
    names = ["ours, l=None (BatchTopK)", "SAELens BatchTopK", "ours, l=4, decayed, pool_every=4"]
    rows, table = run("--sae", tmp_path / "one", "--marks", 0.1, 0.05, "--candidates", *names)
    found = [row["candidate"] for row in rows]
    assert found == sorted(found, key=found.index)
    assert {names[0], names[2]} <= set(found) <= set(names)
    assert [row["at"] for row in rows] == ["0.05 s", "0.1 s"] * (len(rows) // 2)
    assert all(row["steps"] > 0 and 0 < row["fvu"] < 10 for row in rows)
    assert table.startswith("| candidate | steps in 0.1 s | FVU, 0.05 s | FVU, 0.1 s |")


def row(candidate, seed, at, **figures):
    size = {"B": 16, "d": 12, "F": 64, "k": 3, "layers": 2}
    return {"kind": "crosscoder", "candidate": candidate, "seed": seed, "at": at, "steps": 6, **size, **figures}


def test_a_line_of_several_seeds():
    alone = {"loss_recovered_layers": [0.5, 0.25]}
    rows = [
        row("a", 0, "2 s", fvu=0.5, **alone),
        row("a", 0, "6 steps", fvu=0.25, ratio=1.5, ratio_p20=1.0, ratio_p80=2.0),
        row("a", 1, "6 steps", fvu=0.75, loss_recovered=None),
        {"kind": "crosscoder", "candidate": "b", "seed": 0, "reason": "not installed", "layers": 2},
    ]
    a, b = lines(rows, ["2 s", "6 steps"])
    assert b == {"candidate": "b", "reason": "not installed"}
    assert (a["fvu 0"], a["fvu 1"], a["steps 0"]) == ("0.500", "0.500 (0.250–0.750)", 6)
    assert (a["loss_recovered_layers 1 0"], "loss_recovered 1" in a) == ("0.250", False)
    about = {"model": "m", "layer": "0, 1", "weights_sha256": None, "tokens": 320}
    result = {"rows": rows, "setup": {"marks": [2.0], "steps": 6}, "activations": {"crosscoder": about}}
    table = markdown_table(result)
    assert "| a | 1.50 | 1.00–2.00 | 6 | 0.500 | 0.500 (0.250–0.750) | – | – | 0.500 | – | 0.250 | – |" in table
    assert "| b | – (not installed) |" in table
    assert "| layer 0 alone, 2 s | layer 0 alone, 6 steps | layer 1 alone, 2 s |" in table
    assert "**" not in table
    result["activations"]["sae"] = about
    both = markdown_table({**result, "rows": [*rows, {**rows[0], "kind": "sae"}]})
    assert "**Crosscoder**: layer 0, 1 of m, 320 tokens; B=16, d=12, F=64, k=3" in both
