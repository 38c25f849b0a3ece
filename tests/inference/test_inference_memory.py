"""What a search above thresholds holds beside the weights, and in which dtype."""

import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
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
CENTRED = {"apply_b_dec_to_input": True, "normalize": "layer_norm", "input_scale": 2.0}
# (dtype of weights and tokens, whether it is screened, conventions)
CASES = {
    "float32": (torch.float32, True, {}),
    "float32, centred": (torch.float32, True, CENTRED),
    "float32, centred, in full": (torch.float32, False, CENTRED),
    "bfloat16": (torch.bfloat16, True, {}),
    "bfloat16, centred": (torch.bfloat16, True, CENTRED),
}
# of a search, by width; at d = 2304 the rounded tokens of a screen alone take 0.018
MOST = {
    768: dict(zip(CASES, (0.03, 0.035, 0.035, 0.035, 0.045), strict=True)),
    2304: {"float32": 0.045, "bfloat16": 0.045},
}


def sae_of(n_features, d, dtype, above, **conventions):
    """A JumpReLU that lets through what lies so many deviations above; few weights, again and again."""
    W = torch.nn.functional.normalize(torch.randn(1024, d, generator=torch.Generator().manual_seed(0)), dim=1)
    W = W.to(dtype).repeat(n_features // 1024, 1)
    zeros = torch.zeros(n_features)
    tensors = {"W_enc": W.t(), "b_enc": zeros, "W_dec": W, "b_dec": torch.zeros(d), "threshold": zeros + above}
    return InferenceSAE(InferenceConfig(d, n_features, "jumprelu", impl="torch", **conventions), tensors)


@torch.no_grad()
def peaks(d):
    """By case: of a search through 65,536 features and of 32 chosen ones, in units of a float32 [B, F]; and how many
    features fire."""
    found = {}
    for name in MOST[d]:
        dtype, screened, conventions = CASES[name]
        screen.fast_bfloat16 = lambda screened=screened: screened
        sae = sae_of(1 << 16, d, dtype, 3.4, **conventions)
        x = torch.randn(1024, d, generator=torch.Generator().manual_seed(1)).to(dtype)
        shares = []
        for call in (partial(sae.encode_sparse, x), partial(sae.encode, x, features=CHOSEN)):
            call()  # what a first call of a product keeps
            bytes_held = []
            for _ in range(2):  # pages of libraries that come back count too
                forget_scratch()
                bytes_held.append(peak_memory(call))
            shares.append(min(bytes_held) / (4 * 1024 * (1 << 16)))
        found[name] = *shares, sae.encode_sparse(x).l0()
    return found


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory from /proc")
@pytest.mark.parametrize("d", [768, 2304])
def test_a_small_part_of_the_activations(d):
    """Beside the weights and the tokens as given; the codes that come out are among it.

    In a process of its own: what other tests have left in the heap moves the peak.
    """
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        found = pool.submit(peaks, d).result()
    for name, (search, chosen, l0) in found.items():
        assert search <= MOST[d][name], name
        assert chosen <= 0.03, name
        assert 10 < l0 < 40, name


@pytest.mark.parametrize("screened", [True, False], ids=["screened", "full"])
def test_tokens_and_weights_of_16_bits_are_not_raised_as_a_whole(screened, monkeypatch):
    """And give what the same tokens in float32 give."""
    monkeypatch.setattr(screen, "fast_bfloat16", lambda: screened)
    monkeypatch.setattr(rounded_tokens, "FEWEST_ACTIVATIONS", 0)
    sae = sae_of(2048, 64, torch.bfloat16, 3.0)
    x = torch.randn(300, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    given = []
    rounded = screen.RoundedTokens.__init__

    def noted(self, tokens, *args, **how):
        given.append(tokens.dtype)
        rounded(self, tokens, *args, **how)

    monkeypatch.setattr(screen.RoundedTokens, "__init__", noted)
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
