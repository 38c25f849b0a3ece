"""`sampled-sae bench` and the clocks under it, at sizes of a moment."""

import json
import time
from dataclasses import replace

import pytest
import torch

from sampled_sae import bench
from sampled_sae.cli import main
from sampled_sae.support.timing import Sections, free_memory, interleaved, peak_memory, spread, timed

SMALL = {"d": 24, "features": 512, "batch": 64, "k": 4, "rounds": 3, "seconds": 1e9}
PARTS = {"- scores", "- pool", "- select", "- decode", "- backward", "- optimizer", "- loss, threshold, counts"}


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    "rule", [{"l": 4.0}, {"l": 4.0, "score": "entropy", "adam": "decayed"}, {"l": None}, {"l": None, "select": "token"}]
)
def test_rows(rule):
    rows = {row.name: row for row in bench.run(bench.Settings(**SMALL, **rule))}
    ours, eager = rows.pop("our step (torch)"), rows.pop("eager PyTorch step")
    floor = rows.pop("product x W_enc, the floor")
    scored = rule["l"] is not None
    assert set(rows) == {name for name in PARTS if scored or name not in ("- scores", "- pool")}
    assert eager.time is not None, eager.note
    assert floor.of_floor == 1
    assert ours.memory is not None
    assert ours.memory >= 0
    for row in (ours, eager, *rows.values()):
        assert row.time.rounds == 3
        assert row.time.p20 <= row.time.ms <= row.time.p80


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    ("rule", "kinds"),
    [({"l": 4.0}, {"columns"}), ({"l": None}, {"entries"}), ({"l": None, "select": "token"}, {"entries"})],
)
def test_what_the_screen_leaves_open_is_shown(rule, kinds):
    settings = bench.Settings(**SMALL, **rule, screen="bf16")
    (row,) = (row for row in bench.run(settings) if "screen" in row.name)
    assert set(row.open) == kinds
    assert all(0 < share < 1 for share in row.open.values())
    assert f"% of the {kinds.pop()}" in bench.line(row)
    assert not any("screen" in row.name for row in bench.run(replace(settings, screen="off")))


def test_the_parts_lie_within_the_step():
    settings = bench.Settings(**SMALL, l=4.0)
    ours = bench.OurStep(settings)
    x = bench.activations(64, 24, 0)
    took = 1e3 * timed(lambda: ours(x))
    parts = ours.read()
    assert {f"- {name}" for name in parts} == PARTS - {"- loss, threshold, counts"}
    assert 0 < sum(sum(samples) for samples in parts.values()) <= took


def test_the_eager_step_is_the_same_step():
    """Losses and weights over three steps: what is timed side by side computes the same."""
    for rule in ({"l": 4.0}, {"l": None}, {"l": None, "select": "token"}, {"l": 2.0, "score": "entropy"}):
        settings = bench.Settings(**SMALL, **rule)
        ours = bench.OurStep(settings)
        eager = bench.EagerStep(settings, ours.sae)
        for seed in range(3):
            x = bench.activations(64, 24, seed)
            torch.testing.assert_close(eager(x), ours(x), rtol=1e-4, atol=0)
        for name, p in ours.sae.named_parameters():
            torch.testing.assert_close(eager.weights[name], p, rtol=1e-3, atol=1e-4)


def test_a_wrong_step_gets_no_comparison(monkeypatch):
    monkeypatch.setattr(bench.EagerStep, "encode", lambda self, x, W, b: 0.9 * torch.relu(x @ W + b))
    *_, row = bench.run(bench.Settings(**SMALL))
    assert row.time is None
    assert row.note.startswith("no comparison: its first loss is")
    assert "| no comparison" in bench.line(row)


def test_the_eager_step_is_left_out_for_memory_and_for_time(monkeypatch):
    *_, row = bench.run(bench.Settings(**{**SMALL, "seconds": 0}))
    assert row.note == "left out: 64 tokens may take more than the 0 s that are left"
    monkeypatch.setattr(bench, "free_memory", lambda device: 1000)
    *_, row = bench.run(bench.Settings(**SMALL))
    assert row.note.startswith("left out: 64 tokens need about 0.0012 GB")


def test_fewer_tokens_where_the_eager_step_of_all_does_not_fit(monkeypatch):
    """By memory for half of them, by time for an eighth."""
    settings = bench.Settings(**{**SMALL, "batch": 2048})
    half = bench.eager_bytes(replace(settings, batch=1024))
    monkeypatch.setattr(bench, "free_memory", lambda device: half / 0.9 + 1)
    for floor_ms, tokens in ((0.1, 1024), (1e3, 256)):
        ours, eager = bench.eager_rows(settings, floor_ms, left=1.01 * 16 * 3 * floor_ms / 1e3 * tokens / 2048)
        assert ours.name == f"our step (torch), {tokens} tokens"
        assert eager.name == f"eager PyTorch step, {tokens} tokens"
        assert eager.time.rounds == ours.time.rounds >= 1
        assert eager.memory > ours.memory
    (row,) = bench.eager_rows(settings, 1e3, left=0.1)
    assert row.note.startswith("left out: 256 tokens may take")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"batch": 0}, "batch=0"),
        ({"rounds": 0}, "rounds=0"),
        ({"dtype": "float16"}, "dtype='float16'"),
        ({"dtype": "bfloat16"}, "without a GPU the layer computes in float32"),
        ({"k": 600}, "k=600"),
        ({"l": 0.5}, "l=0.5"),
        ({"seconds": -1}, "seconds=-1"),
    ],
)
def test_bad_settings(wrong, message):
    with pytest.raises(ValueError, match=message):
        bench.Settings(**{**SMALL, **wrong}).config()


def test_command(tmp_path, capsys):
    sizes = "--d 24 --features 512 --batch 64 --k 4 --l none --select token --rounds 2 --seconds 1e9 --threads 1"
    assert main(["bench", *sizes.split(), "--json", str(tmp_path / "bench.json")]) == 0
    shown = capsys.readouterr().out
    assert "F=512, k=4, l=None, l2, token, Adam dense" in shown
    assert shown.count(bench.HEADING) == 1
    assert "| our step (torch) |" in shown
    result = json.loads((tmp_path / "bench.json").read_text())
    assert result["features"] == 512
    assert [row["name"] for row in result["rows"]][-1] == "eager PyTorch step"
    assert main(["bench", "--k", "0"]) == 1
    assert "--k 0.0: must be in" in capsys.readouterr().err


class Clock:
    """Stands for time.perf_counter; time passes only where a call says so."""

    now = 0.0

    def __call__(self):
        return self.now

    def passes(self, seconds):
        self.now += seconds


def test_sections_of_one_sample_add_up(monkeypatch):
    monkeypatch.setattr(time, "perf_counter", clock := Clock())
    sections = Sections("cpu")
    for seconds in ((1.0, 2.0), (0.5,)):
        for took in seconds:
            sections.timed("part", clock.passes)(took)
        sections.next_sample()
    sections.timed("other", clock.passes)(4.0)
    assert sections.read() == {"part": [3000.0, 500.0, 0.0], "other": [0.0, 0.0, 4000.0]}
    assert sections.read() == {}


def test_clocks(monkeypatch):
    monkeypatch.setattr(time, "perf_counter", clock := Clock())
    assert timed(lambda: clock.passes(0.5)) == 0.5
    calls = []
    samples = interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, "cpu", 3)
    assert calls == ["a", "b"] * 4
    assert [len(own) for own in samples.values()] == [3, 3]
    assert interleaved({"a": lambda: clock.passes(0.5)}, "cpu", 50, seconds=1.25) == {"a": [500.0] * 3}
    found = spread([5.0, 1.0, 2.0, 4.0, 3.0, 100.0])
    assert (found.ms, found.p20, found.p80, found.rounds) == (3.5, 2.0, 5.0, 6)


def test_peak_memory():
    size = 1 << 26

    def call():
        torch.ones(size // 4)

    assert 0.9 * size <= peak_memory(call) < 1.2 * size
    assert peak_memory(lambda: None) < size / 10
    assert free_memory() > size
