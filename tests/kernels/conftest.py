import pytest
import torch


def pytest_collection_modifyitems(items):
    """What takes a device also runs under `pytest -m gpu`."""
    for item in items:
        if "device" in item.fixturenames:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def poisoned(monkeypatch):
    """torch.empty full of NaN: a value that a kernel reads before it writes it shows in the result."""
    empty = torch.empty

    def poison(*args, **kwargs):
        out = empty(*args, **kwargs)
        return out.fill_(float("nan")) if out.is_floating_point() else out

    monkeypatch.setattr(torch, "empty", poison)
