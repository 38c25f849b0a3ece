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


@pytest.fixture
def small_chunks(monkeypatch):
    """Several chunks on a GPU too, and lists without room to spare, so that they overflow."""
    from sampled_sae.impl.triton import products, stream

    monkeypatch.setattr(products, "NARROWEST", 64)
    monkeypatch.setattr(products, "WIDEST", 64)
    monkeypatch.setattr(stream, "SLACK", 0)
    monkeypatch.setattr(stream, "FEWEST_TOKENS", 8)


@pytest.fixture
def repairs(monkeypatch):
    """Whether each screened selection of a batch, of tokens, or of a matrix had to be done again in full."""
    from sampled_sae.impl.triton import screen_entries, stream

    seen, refill, product_if_ = [], stream.refill_exactly_, screen_entries.product_if_

    def refilling(x, W, b, scale, members, n, tau, values, keys, count):
        seen.append(bool(count > len(values)) or bool((count < n) & ~(tau <= 0)))
        refill(x, W, b, scale, members, n, tau, values, keys, count)

    def multiplying(needed, *rest):
        seen.append(bool(needed))
        product_if_(needed, *rest)

    monkeypatch.setattr(stream, "refill_exactly_", refilling)
    monkeypatch.setattr(screen_entries, "product_if_", multiplying)
    return seen
