"""benchmarks/scale.py in small, and what its model takes from the rows that it has counted."""

import json
import sys

import pytest

from benchmarks import scale, scale_model
from benchmarks.scale_model import Calls, Hardware


@pytest.mark.slow
def test_the_benchmark_is_rehearsed(tmp_path, monkeypatch):
    command = ["scale.py", "--rehearse", "--out", str(tmp_path / "scale.json"), "--only"]
    monkeypatch.setattr(sys, "argv", [*command, "counted", "timed", "model"])
    scale.main()
    result = json.loads((tmp_path / "scale.json").read_text())
    counted = [row for row in result["rows"] if row["part"] == "counted"]
    assert [row["layout"] for row in counted if row["screen"] == "off"] == ["2 x 1", "1 x 2", "2 x 2"]
    assert min(row["calls"] for row in counted) >= 10
    assert all(row["speed"] > 0 for row in result["rows"] if row["part"] == "timed")
    monkeypatch.setattr(sys, "argv", [*command, "model"])
    monkeypatch.setattr(scale, "on_processes", None)
    scale.main()
    assert json.loads((tmp_path / "scale.json").read_text())["rows"] == result["rows"]
    assert "A model, no measurement" in (tmp_path / "scale.md").read_text()


def test_a_step_of_the_model_has_the_latency_of_each_counted_collective():
    free = Hardware(flops=1e30, memory_bandwidth=1e30, memory=1e30, nvlink=1e30, network=1e30)

    def seconds(data, shards, over_data=10):
        return scale_model.step(65536, 768, 1024, data, shards, Calls(over_data, 7), free)["ms"]

    assert seconds(1, 1) == pytest.approx(0, abs=1e-9)
    # nine between GPUs of one machine, and one ring of hosts
    assert seconds(8, 1) == pytest.approx(1e3 * (9 * 2 * 3 * 8e-6 + 7 * 3e-5))
    assert seconds(64, 1) == pytest.approx(1e3 * (9 * 2 * 6 * 2e-5 + 63 * 3e-5))
    assert seconds(8, 1, 11) - seconds(8, 1) == pytest.approx(1e3 * 2 * 3 * 8e-6)
    assert seconds(1, 4) == pytest.approx(1e3 * (6 * 2 * 2 * 8e-6 + 3 * 3e-5))
    assert seconds(2, 4) == pytest.approx(seconds(1, 4) + 1e3 * (9 * 2 * 8e-6 + 3e-5))


def test_the_model_needs_what_was_counted():
    with pytest.raises(ValueError, match=r"needs the counted rows of \['1 x 2'\]"):
        Calls.counted([{"part": "counted", "layout": "2 x 1", "calls": 10, "screen": "off"}, {"part": "model"}])
