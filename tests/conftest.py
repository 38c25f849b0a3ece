import pytest
import torch


@pytest.fixture
def poisoned_memory():
    """Every torch.empty holds NaN, so that a read before a write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
