"""What the clock of a GPU counts; in this folder, because it needs the GPU for itself."""

import time

import pytest
import torch

from sampled_sae.support import timing

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def test_the_host_does_not_count_in_a_queued_call(monkeypatch):
    """The GPU is kept busy for a tenth of a second, so that a busy host too has launched the call by then."""
    monkeypatch.setattr(timing, "QUEUEING_CYCLES", 1 << 28)
    small = torch.ones(1024, device="cuda")

    def call():
        time.sleep(1e-3)
        small.mul_(1.0)

    call()
    assert timing.timed(call, "cuda") > 1e-3
    assert min(timing.timed(call, "cuda", queued=True) for _ in range(5)) < 1e-4
