"""What travels in a step is counted, and held to the table of docs/scale.md; memory falls with the features here."""

from functools import partial

import pytest
import torch
from cases import mesh_of
from torch.distributed.tensor import DTensor

from sampled_sae import RowAdam, SampledSAE, SampledSAEConfig
from sampled_sae.distributed import parallelize


def bytes_of_a_step(shape, n_features, d, n_tokens=2, **settings):
    """By purpose: (collectives, bytes) of the second step, and of its update with a clipped gradient."""
    settings = {"k": 32, "l": 4.0, "impl": "torch", "row_grads": True, "screen": "off", **settings}
    sae, generator = SampledSAE(SampledSAEConfig(d, n_features, **settings)), torch.Generator().manual_seed(1)
    sae = parallelize(sae, mesh_of(shape))
    optimizer, traffic, found = RowAdam(sae, mode="lazy"), sae.layout.mesh.traffic, []
    for _ in range(2):
        traffic.clear()
        sae(torch.randn(n_tokens, d, generator=generator)).loss.backward()
        found.append({purpose: (sent.calls, sent.size) for (_, purpose), sent in traffic.sent.items()})
        traffic.clear()
        optimizer.step()
        optimizer.zero_grad()
        found.append({purpose: (sent.calls, sent.size) for (_, purpose), sent in traffic.sent.items()})
    return found[2:]


def counted(workers, shape, *sizes, **settings):
    """Of each process what `bytes_of_a_step` counts in the step."""
    found = workers.run(shape[0] * shape[1], partial(bytes_of_a_step, shape, *sizes, **settings))
    for _, update in found:
        assert update == ({"gradient norm": (1, 4)} if shape[1] > 1 else {})
    return [step for step, _ in found]


def expected_bytes(n_features, d, P, screen="off"):
    """Of the data dimension with a pool: statistics, radix counts, ties, rows of the pool, and single numbers.

    With a screen, in the Triton form: bounds in 16 bits with four numbers of the tokens, and the sums that are open.
    """
    bounds = 0 if screen == "off" else 2 * (n_features + 4)
    return {
        "batch sizes": (1, 16),
        "column statistics": (1 + bool(bounds), bounds + 4 * n_features),
        "radix counts": (3, 3 * 2048 * 8),
        "ties": (1, 16),
        "loss": (1, 4),
        "active features": (1, P),
        "threshold": (1, 4),
        "gradients": (1, 4 * (2 * P * d + P + d)),
    }


@pytest.mark.parametrize(("n_features", "d"), [(65536, 12), (4096, 768), (1 << 20, 2)], ids=str)
def test_with_a_pool_bytes_do_not_grow_with_the_dictionary(workers, n_features, d):
    for found in counted(workers, (2, 1), n_features, d):
        assert found == expected_bytes(n_features, d, 128)


def test_what_a_rule_adds_and_leaves_out(workers):
    n_features, d, P = 1024, 6, 128
    expected = expected_bytes(n_features, d, P)
    for found in counted(workers, (2, 1), n_features, d, score="entropy"):
        assert found == {**expected, "column statistics": (1, 2 * 4 * n_features)}
    for found in counted(workers, (2, 1), n_features, d, select="token"):
        assert found == {name: sent for name, sent in expected.items() if name not in ("radix counts", "ties")}
    for found in counted(workers, (1, 2), n_features, d, select="token"):
        assert found["largest of tokens"] == (1, 2 * 2 * 32 * 4)
        assert not found.keys() & {"radix counts", "ties", "gradients"}


def test_without_a_pool_the_touched_rows_travel(workers):
    n_features, d, kept = 1024, 6, 2 * 2 * 32
    for found in counted(workers, (2, 1), n_features, d, l=None):
        assert "column statistics" not in found
        assert found["touched features"] == (1, n_features)
        assert found["gradients"][0] == 1
        assert found["gradients"][1] <= 4 * (2 * kept * d + kept + d)


def test_rows_of_dead_features_join_the_others(workers):
    n_features, d, P, B = 1024, 6, 128, 2
    dead = {"dead_after": 1, "aux_pool": 7}
    for found in counted(workers, (2, 1), n_features, d, **dead):
        assert found["gradients"] == (1, 4 * (2 * (P + 7) * d + (P + 7) + d))
        assert found["column statistics"] == (1, 4 * n_features)
    for found in counted(workers, (1, 2), n_features, d, **dead):
        assert found["decode"] == (2, 2 * B * d * 4), "their part of the reconstruction is one more"
        assert "gradients" not in found


@pytest.mark.parametrize(("n_features", "d"), [(256, 24), (1024, 8)], ids=str)
def test_a_screen_of_the_triton_form_has_places_for_all_columns(workers, n_features, d):
    """So that their number does not depend on how many are open."""
    pytest.importorskip("triton")
    for found in counted(workers, (2, 1), n_features, d, 8, k=2, screen="bf16", impl="triton"):
        assert found == expected_bytes(n_features, d, 8, "bf16")


def test_the_bytes_at_full_size():
    """By the formula that the tests above hold in both sizes."""

    def total(n_features, d, screen):
        return sum(size for _, size in expected_bytes(n_features, d, 128, screen).values())

    for screen, of_feature in (("off", 4), ("bf16", 6)):
        assert total(65536, 768, screen) <= 1.3e6
        assert total(1 << 20, 768, screen) - total(65536, 768, screen) == of_feature * ((1 << 20) - 65536)


@pytest.mark.slow
@pytest.mark.parametrize("screen", ["off", "bf16"])
def test_the_bytes_at_full_size_are_counted(workers, screen):
    for found in counted(workers, (2, 1), 65536, 768, 2 if screen == "off" else 64, screen=screen):
        assert sum(size for _, size in found.values()) <= 1.3e6


@pytest.mark.parametrize(("score", "of_feature", "more"), [("l2", 2, 4), ("uniform", 1, 0)])
def test_a_screen_sends_what_it_leaves_open(workers, score, of_feature, more):
    """The squares of the columns' norms as they are seen and four numbers, or flags; and some columns again."""
    n_features, d = 8192, 24
    for found in counted(workers, (2, 1), n_features, d, 64, screen="bf16", score=score):
        calls, size = found.pop("column statistics")
        assert calls == 2
        bounds = of_feature * (n_features + more)
        assert bounds <= size < bounds + 0.2 * 4 * n_features
        expected = expected_bytes(n_features, d, 128)
        assert found == {name: sent for name, sent in expected.items() if name != "column statistics"}


def test_a_screen_over_features_sends_candidates(workers):
    P = 128
    for found in counted(workers, (1, 2), 8192, 24, 64, screen="bf16"):
        calls, size = found.pop("pool")
        assert calls == 3
        assert size <= 2 * (2 * (P + 2) * 4 + 4 * 8 + P * 4)
        assert "column statistics" not in found


def test_a_larger_pool_sends_no_more_than_its_rows(workers):
    P = 2048
    for found in counted(workers, (2, 1), 65536, 8, l=64.0):
        assert found["touched features"] == (1, P)
        assert found["gradients"][1] <= 4 * (2 * P * 8 + P + 8)


def test_over_features_nothing_of_the_dictionary_travels(workers):
    P, B, d = 128, 2, 12
    for found in counted(workers, (1, 2), 65536, d):
        assert found == {
            "batch sizes": (1, 16),
            "pool": (1, 2 * P * 4),
            "radix counts": (3, 3 * 2048 * 8),
            "ties": (1, 2 * B * 4),
            "decode": (1, B * d * 4),
            "b_dec": (1, d * 4),
            "threshold": (1, 4),
        }


def elements(t):
    return t.to_local().numel() if isinstance(t, DTensor) else t.numel()


def held(shape):
    sae = parallelize(SampledSAE(SampledSAEConfig(16, 2400, 4, 3.0, impl="torch")), mesh_of(shape))
    optimizer = RowAdam(sae)
    sae(torch.randn(6, 16)).loss.backward()
    optimizer.step()
    parameters = list(sae.parameters())
    moments = [t for state in optimizer.state.values() for name, t in state.items() if name != "step"]
    return [sum(map(elements, tensors)) for tensors in (parameters, [p.grad for p in parameters], moments)]


@pytest.mark.parametrize("ranks", [2, 3])
def test_over_features_memory_falls(workers, ranks):
    whole = 2 * 16 * 2400 + 2400 + 16
    for parameters, gradients, moments in workers.run(ranks, held, (1, ranks)):
        for found, of_one in ((parameters, whole), (gradients, whole), (moments, 2 * whole)):
            assert found == pytest.approx(of_one / ranks, rel=0.01)
