"""benchmarks/inference.py at a tiny size: who gets figures, and who the reason why not."""

import importlib.util
import json
import sys

import pytest
import torch

from benchmarks import inference

HAS_SAELENS = importlib.util.find_spec("sae_lens") is not None


@pytest.fixture
def rows(tmp_path, monkeypatch):
    def run():
        out = tmp_path / "inference.json"
        monkeypatch.setattr(sys, "argv", ["inference.py", "--out", str(out), "--rehearse", "--rounds", "1"])
        inference.main()
        return {(row["candidate"], row["dtype"]): row for row in json.loads(out.read_text())["rows"]}

    return run


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory from /proc")
def test_everybody_gets_figures(rows, tmp_path):
    found = rows()
    names = {"ours", "ours, no screen", "ours, 32 features", "SAELens", "eager PyTorch"}
    assert set(found) == {(name, dtype) for name in names for dtype in ("float32", "bfloat16")}
    for (name, _), row in found.items():
        if name == "SAELens" and not HAS_SAELENS:
            assert "No module named" in row["reason"]
        else:
            assert row["ratio"] > 0
            assert row["peak_extra_memory"] >= 0
    ours, eager = found["ours", "float32"], found["eager PyTorch", "bfloat16"]
    assert ours["l0"] > 0
    assert ours["codes_memory"] == pytest.approx(20 * ours["l0"] / (4 * 70))  # a float32 and two int64 each
    assert eager["codes_memory"] == 0.5
    assert (tmp_path / "inference.md").read_text().startswith("| (B, d, F, k) | dtype | candidate |")


def test_wrong_codes_get_no_figure(rows, monkeypatch):
    original = inference.eager
    monkeypatch.setattr(inference, "eager", lambda *args: original(*args).roll(1, 1))
    row = rows()["eager PyTorch", "float32"]
    assert "codes are not those of the rule" in row["reason"]
    assert "ratio" not in row


def test_sizes():
    everything = inference.sizes("cpu")
    assert {w.F for w in everything} == {1 << 14, 1 << 16, 1 << 18, 1 << 20}
    assert {w.d for w in everything} == {768, 2304}
    assert {w.k for w in everything} == {20, 100}
    assert all(max(inference.MOST_ENTRIES, inference.FEWEST_TOKENS * w.F) >= w.B * w.F for w in everything)


def test_the_thresholds_give_about_the_l0_that_is_asked_for():
    w = inference.Workload("w", 512, 32, 2000, 40)
    s = inference.setup(w, torch.float32, "cpu")
    active = int((inference.eager(*s) != 0).sum())
    assert 0.4 * 40 < active / 512 < 2.5 * 40
