"""benchmarks/family.py on tiny activations: in two calls, with the candidates that are installed."""

import json
import sys

import pytest
import torch

from benchmarks import family
from benchmarks.family import check_same, described, lines, markdown_table
from sampled_sae import ActivationStore
from sampled_sae.training.opening import as_activations

SMALL = ["--features", "64", "--k", "3", "--batch-size", "16", "--steps", "6", "--marks", "0.02", "--threads", "1"]


def write(folder, seed=0):
    return ActivationStore.write(
        folder, torch.randn(400, 12, generator=torch.Generator().manual_seed(seed)), holdout=80
    )


@pytest.fixture(scope="module")
def activations(tmp_path_factory):
    root = tmp_path_factory.mktemp("acts")
    write(root / "one")
    for i, part in enumerate(("pair/inputs", "pair/outputs", "stack/beside_0", "stack/beside_1")):
        write(root / part, i)
    return {"matryoshka": root / "one", "transcoder": root / "pair", "crosscoder": root / "stack"}


@pytest.mark.slow
@pytest.mark.usefixtures("forked_workers")
def test_family_in_two_calls(activations, tmp_path, monkeypatch, capsys):
    """The first has all that is timed; the second trains other seeds and evaluates."""

    def run(*arguments):
        words = [family.__file__, "--out", tmp_path / "out.json", "--weights", tmp_path / "w", "--model", "none"]
        monkeypatch.setattr(sys, "argv", [*map(str, [*words, *SMALL, *arguments])])
        family.main()

    kinds = ("matryoshka", "crosscoder")
    given = [word for kind in kinds for word in (f"--{kind}", activations[kind])]
    run(*given, "--timed")
    timed = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert {row["at"] for row in timed if "reason" not in row} == {"0.02 s", "6 steps"}
    assert all("weights" in row and "fvu" not in row for row in timed if "reason" not in row)
    run(*given, "--seeds", 0, 1)
    result = json.loads((tmp_path / "out.json").read_text())
    rows = [row for row in result["rows"] if "reason" not in row]
    for kind in kinds:
        ours = [row for row in rows if row["kind"] == kind and row["candidate"] == "ours, l=None (BatchTopK)"]
        assert [(row["seed"], row["at"]) for row in ours] == [(0, "0.02 s"), (0, "6 steps"), (1, "6 steps")]
        assert all(0 < row["fvu"] < 10 for row in ours)
        assert [("ratio" in row) for row in ours] == [False, True, False]
        assert ours[1]["steps"] == ours[2]["steps"] == 6
        assert ours[1]["fvu"] != ours[2]["fvu"]
    again = [row for row in timed if "reason" not in row and "ratio" in row]
    assert [row["ratio"] for row in again] == [row["ratio"] for row in rows if "ratio" in row]
    assert not list((tmp_path / "w").iterdir())
    table = (tmp_path / "out.md").read_text()
    assert all(f"**{kind.capitalize()}**" in table for kind in kinds)
    for more, said in (
        (("--matryoshka", activations["crosscoder"] / "beside_1"), "has results of"),
        ((*given, "--k", 4), r"k was 3, is 4"),
    ):
        with pytest.raises(SystemExit):
            run(*more)
        assert said in capsys.readouterr().err


def test_results_are_not_mixed(activations, tmp_path):
    about = {kind: described(as_activations(folder)) for kind, folder in activations.items()}
    assert about["matryoshka"]["tokens"] == 320
    assert about["matryoshka"]["held_out"] == 80
    setup, out = {"k": 3, "marks": [1.0]}, tmp_path / "out.json"
    check_same(out, {}, setup, about)
    before = {"setup": setup, "activations": json.loads(json.dumps(about))}
    check_same(out, before, setup, {"crosscoder": about["crosscoder"]})
    with pytest.raises(ValueError, match=r"out\.json: was made with other settings \(k was 3, is 4\); give another"):
        check_same(out, before, {**setup, "k": 4}, about)
    other = described(as_activations(activations["crosscoder"] / "beside_1"))
    with pytest.raises(ValueError, match=r"--matryoshka: .* has results of .*, 320 tokens, checksum .* give another"):
        check_same(out, before, setup, {"matryoshka": other})
    of_a_model = {**about["transcoder"], "model": "m", "weights_sha256": "ab"}
    with pytest.raises(ValueError, match=r"of several models: .* for --crosscoder"):
        check_same(out, {}, setup, {"crosscoder": about["crosscoder"], "transcoder": of_a_model})
    with pytest.raises(ValueError, match="held-out"):
        described(as_activations(torch.randn(9, 2)))


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
    about = {"model": "m", "layer": "0, 1", "weights_sha256": None, "tokens": 320, "crc32": "0"}
    result = {"rows": rows, "setup": {"marks": [2.0], "steps": 6}, "activations": {"crosscoder": about}}
    table = markdown_table(result)
    assert "**Crosscoder**: layer 0, 1 of m, 320 tokens; B=16, d=12, F=64, k=3" in table
    assert "| a | 1.50 | 1.00–2.00 | 6 | 0.500 | – | 0.500 | 0.250 | 0.500 (0.250–0.750) | – |" in table
    assert "| b | – (not installed) |" in table
    assert "| loss recovered, 2 s | layer 0 alone, 2 s | layer 1 alone, 2 s |" in table
    assert "matryoshka" not in table.lower()
