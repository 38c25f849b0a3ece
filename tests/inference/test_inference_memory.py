"""What a search above thresholds holds beside the weights, and in which dtype."""

import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch

from sampled_sae.impl import rounded_tokens
from sampled_sae.impl.torch import screen
from sampled_sae.inference.config import InferenceConfig
from sampled_sae.inference.inference_sae import InferenceSAE
from sampled_sae.support.reused_memory import forget_scratch
from sampled_sae.support.timing import peak_memory

CHOSEN = torch.arange(0, 1 << 16, 1 << 11)


def sae_of(n_features, d, dtype, above):
    """A JumpReLU that lets through what lies so many deviations above; few weights, again and again."""
    W = torch.nn.functional.normalize(torch.randn(1024, d, generator=torch.Generator().manual_seed(0)), dim=1)
    W = W.to(dtype).repeat(n_features // 1024, 1)
    zeros = torch.zeros(n_features)
    tensors = {"W_enc": W.t(), "b_enc": zeros, "W_dec": W, "b_dec": torch.zeros(d), "threshold": zeros + above}
    return InferenceSAE(InferenceConfig(d, n_features, "jumprelu", impl="torch"), tensors)


def peaks(d, dtype):
    """Of a search through 65,536 features and of 32 chosen ones, in units of a float32 [B, F]; and how many fire."""
    screen.fast_bfloat16 = lambda: True
    sae = sae_of(1 << 16, d, dtype, 3.4)
    x = torch.randn(1024, d, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = []
    with torch.no_grad():
        for call in (lambda: sae.encode_sparse(x), lambda: sae.encode(x, features=CHOSEN)):
            call()  # what a first call of a product keeps
            forget_scratch()
            found.append(peak_memory(call) / (4 * 1024 * (1 << 16)))
        return *found, sae.encode_sparse(x).l0()


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory from /proc")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("d", "most"), [(768, 0.04), (2304, 0.11)])
def test_a_small_part_of_the_activations(dtype, d, most):
    """In a process of its own: what other tests have left in the heap moves the peak."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        search, chosen, l0 = pool.submit(peaks, d, dtype).result()
    assert search <= most
    assert chosen <= 0.03
    assert 10 < l0 < 40


@pytest.mark.parametrize("screened", [True, False], ids=["screened", "full"])
def test_tokens_and_weights_of_16_bits_are_not_raised_as_a_whole(screened, monkeypatch):
    """And give what the same tokens in float32 give."""
    monkeypatch.setattr(screen, "fast_bfloat16", lambda: screened)
    monkeypatch.setattr(rounded_tokens, "FEWEST_ACTIVATIONS", 0)
    sae = sae_of(2048, 64, torch.bfloat16, 3.0)
    x = torch.randn(300, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    given = []
    rounded = screen.RoundedTokens.__init__
    monkeypatch.setattr(
        screen.RoundedTokens, "__init__", lambda self, t, *args: given.append(t.dtype) or rounded(self, t, *args)
    )
    found, chosen = sae.encode_sparse(x), sae.encode(x, features=[5, 3])
    assert set(given) == ({torch.bfloat16} if screened else set())
    expected = sae.encode_sparse(x.float())
    assert found.values.dtype == torch.float32
    assert found.count() > 100
    for ours, theirs in zip(found.entries()[1:], expected.entries()[1:]):
        assert torch.equal(ours, theirs)
    torch.testing.assert_close(found.values, expected.values)
    assert chosen.dtype == torch.bfloat16
    torch.testing.assert_close(chosen, expected.to_dense()[:, [5, 3]].bfloat16())
