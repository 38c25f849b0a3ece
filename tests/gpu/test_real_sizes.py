"""What only a GPU can show: real sizes, memory, no host synchronisation, CUDA graphs, the memory checker."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sampled_sae import RowAdam, SampledSAE, SampledSAEConfig
from sampled_sae import functional as F

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

ROOT = Path(__file__).parents[2]
RULES = [
    {"l": 1.0},
    {"l": 4.0},
    {"l": 4.0, "score": "entropy", "select": "token"},
    {"l": None},
    {"l": None, "select": "token"},
]


def data(B, d, seed=0):
    g = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(B, d, device="cuda", generator=g) * torch.logspace(0, -1, d, device="cuda")


def make(B, d, n_features, **settings):
    sae = SampledSAE(SampledSAEConfig(d_in=d, d_sae=n_features, impl="triton", **settings), device="cuda")
    assert sae.impl_in_use == "triton"
    return sae, data(B, d)


def step(sae, x):
    with torch.autocast("cuda", torch.bfloat16):
        out = sae(x)
    out.loss.backward()
    return out


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("size", [(8192, 768, 65536, 64), (2048, 2304, 65536, 64), (8192, 512, 300_000, 32)], ids=str)
def test_selection_at_real_sizes(size, rule):
    """Against torch.topk on the whole matrix, but for entries within rounding of the cut."""
    B, d, n_features, k = size
    sae, x = make(B, d, n_features, k=k, **rule)
    out = step(sae, x)
    codes = out.codes
    values, tokens, features = (t.detach() for t in codes.entries())
    W = sae.W_enc.detach().t().bfloat16()
    a_kept = (x.bfloat16()[tokens].float() * W[features].float()).sum(1)
    torch.testing.assert_close(values, a_kept, rtol=1e-4, atol=1e-4)
    assert (torch.diff(tokens * n_features + features) > 0).all()
    members = None
    if rule["l"] is not None:
        assert len(codes.pool) == round(k * rule["l"])
        members = codes.pool
        scores = F.column_scores(
            x.bfloat16(), sae.W_enc.detach().bfloat16(), sae.b_enc.detach().bfloat16(), sae.cfg.score
        )
        cut = scores.sort(descending=True).values[len(members) - 1]
        assert (scores[members] >= cut * (1 - 1e-5)).all()
    a = torch.mm(x.bfloat16(), (W if members is None else W[members]).t(), out_dtype=torch.float32).relu_()
    if sae.cfg.select == "batch":
        assert len(values) == min(B * k, int((a > 0).sum()))
        # counted: kthvalue of torch 2.11 is wrong beyond 2^31 elements
        smallest = values.min()
        assert int((a > smallest * (1 + 1e-4)).sum()) <= len(values) <= int((a >= smallest * (1 - 1e-4)).sum())
    else:
        cut = a.topk(min(k, a.shape[1]), 1).values[:, -1]
        assert (torch.bincount(tokens, minlength=B) == (a > 0).sum(1).clamp(max=k)).all()
        assert (values >= cut[tokens] * (1 - 1e-4)).all()


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_gradients_at_a_real_size(rule):
    """Against dense products in float32 with the same kept entries."""
    B, d, n_features, k = 1024, 768, 16384, 32
    sae, x = make(B, d, n_features, k=k, aux_coefficient=0.0, **rule)
    out = sae(x)
    out.loss.backward()
    c = out.codes.to_dense().detach()
    g = 2 * (c @ sae.W_dec + sae.b_dec - x).detach() / B
    dc = torch.where(c > 0, g @ sae.W_dec.t(), 0).detach()
    expected = {"W_dec": c.t() @ g, "W_enc": (x - sae.b_dec).t() @ dc, "b_enc": dc.sum(0)}
    for name, value in expected.items():
        error = (sae.get_parameter(name).grad - value).norm() / value.norm()
        assert error < 1e-3, (name, float(error))


@pytest.mark.parametrize("rule", RULES[1:], ids=str)
def test_peak_memory(rule):
    """Beyond parameters and their gradients, in units of one float32 [B, F]."""
    B, d, n_features = 8192, 768, 65536
    sae, x = make(B, d, n_features, k=64, **rule)
    step(sae, x)
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step(sae, x)
    extra = (torch.cuda.max_memory_allocated() - held) / (4 * B * n_features)
    assert extra < 0.35, extra


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("dead_after", [1000, 10**9])
@pytest.mark.parametrize("mode", [None, "dense", "decayed"])
def test_no_host_synchronisation(mode, rule, dead_after):
    sae, x = make(1024, 768, 16384, k=32, dead_after=dead_after, row_grads=mode is not None, **rule)
    if mode is None:
        optimizer = torch.optim.Adam(sae.parameters(), lr=1e-3, fused=True)
    else:
        optimizer = RowAdam(sae, mode=mode)
    for warm in (True, True, False):
        torch.cuda.set_sync_debug_mode("default" if warm else "error")
        try:
            optimizer.zero_grad()
            step(sae, x)
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_cuda_graph_replays_the_step(rule):
    sae, x = make(1024, 256, 8192, k=32, aux_coefficient=0.0, **rule)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            sae.zero_grad(set_to_none=False)
            step(sae, x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sae.zero_grad(set_to_none=False)
        out = step(sae, x)
    for seed in (5, 6):
        x.copy_(data(1024, 256, seed))
        graph.replay()
        torch.cuda.synchronize()
        captured = {name: p.grad.clone() for name, p in sae.named_parameters()}
        loss = out.loss.clone()
        sae.zero_grad(set_to_none=False)
        again = step(sae, x)
        torch.testing.assert_close(loss, again.loss)
        for name, p in sae.named_parameters():
            torch.testing.assert_close(captured[name], p.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("rule", [{"l": 4.0}, {"l": None}], ids=str)
def test_a_million_features(rule):
    """B * F is beyond 2^31, and so is F * d."""
    sae, x = make(4096, 2304 if rule["l"] else 1024, 1 << 20, k=32, aux_coefficient=0.0, **rule)
    assert 4096 * (1 << 20) > 2**31
    out = step(sae, x)
    assert torch.isfinite(out.loss)
    assert out.codes.count() == 4096 * 32
    assert int(out.codes.features.max()) > 1 << 19


def test_nan_is_reported_with_the_call_it_came_in():
    sae, x = make(512, 64, 1024, k=8)
    bad = x.clone()
    bad[3, 4] = float("nan")
    sae(x)
    sae(bad)
    torch.cuda.synchronize()
    with pytest.raises(ValueError, match="NaN or inf among the values of call 2"):
        sae(x)


@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="compute-sanitizer is not on this machine")
def test_the_memory_checker_finds_nothing():
    script = (
        "from tests.gpu.test_real_sizes import RULES, make, step\n"
        "for rule in RULES: step(*make(300, 64, 2000, k=8, **rule))"
    )
    command = ["compute-sanitizer", "--error-exitcode", "9", sys.executable, "-c", script]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
