"""The clock of a GPU, without one: what it waits for, on which device, and in which order."""

from contextlib import contextmanager

import pytest
import torch

from sampled_sae.support import timing


class Log(list):
    """Stands for torch.cuda: writes down what is asked of it, and of which device."""

    def patch(self, monkeypatch):
        @contextmanager
        def device(one):
            self.append(f"on {one}")
            yield
            self.append("off")

        def event(enable_timing):
            return type("Event", (), {"record": lambda _, stream: self.append(f"record on {stream}")} | elapsed)()

        elapsed = {"elapsed_time": lambda *_: 7.0}
        for name, fake in {
            "synchronize": lambda one: self.append(f"synchronize {one}"),
            "current_stream": lambda one: f"stream of {one}",
            "device": device,
            "Event": event,
            "_sleep": lambda cycles: self.append("wait"),
            "empty_cache": lambda: None,
            "mem_get_info": lambda one: {"cuda:1": (5, 9)}[one],
            "reset_peak_memory_stats": lambda one: self.append(f"reset {one}"),
            "memory_allocated": lambda one: {"cuda:1": 100}[one],
            "max_memory_allocated": lambda one: {"cuda:1": 140}[one],
        }.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        empty = torch.empty

        def allocate(size, dtype, device):
            self.append(f"overwrite {size >> 20} MB on {device}")
            return empty(1, dtype=dtype)

        monkeypatch.setattr(torch, "empty", allocate)
        return self


@pytest.fixture
def log(monkeypatch):
    return Log().patch(monkeypatch)


def test_a_queued_call_is_launched_while_the_device_is_busy(log):
    assert timing.timed(lambda: log.append("call"), "cuda:1", queued=True) == pytest.approx(7e-3)
    assert log == [
        "synchronize cuda:1",
        "overwrite 256 MB on cuda:1",
        "on cuda:1",
        "wait",
        "off",
        "record on stream of cuda:1",
        "call",
        "record on stream of cuda:1",
        "synchronize cuda:1",
    ]


def test_a_whole_step_starts_on_an_idle_device(log):
    timing.timed(lambda: log.append("call"), "cuda:1")
    record = "record on stream of cuda:1"
    assert log == ["synchronize cuda:1", record, "call", record, "synchronize cuda:1"]


def test_what_is_put_back_comes_before_the_wait(log):
    calls = {name: lambda name=name: log.append(name) for name in ("a", "b")}
    samples = timing.interleaved(calls, "cuda:1", 1, warm_up=False, queued=True, prepare=lambda: log.append("put back"))
    assert samples == {"a": [7.0], "b": [7.0]}
    steps = [entry for entry in log if entry in ("a", "b", "put back", "wait")]
    assert steps == ["put back", "wait", "a", "put back", "wait", "b"]


def test_memory_and_sections_are_those_of_the_device(log):
    assert timing.peak_memory(lambda: None, "cuda:1") == 40
    assert "reset cuda:1" in log
    assert timing.free_memory("cuda:1") == 5
    sections = timing.Sections("cuda:1")
    with sections.section("part"):
        log.append("call")
    assert sections.read() == {"part": [7.0]}
    assert log[-4:] == ["record on stream of cuda:1", "call", "record on stream of cuda:1", "synchronize cuda:1"]
