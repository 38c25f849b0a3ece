"""Which products take their operands by tensor descriptors, and how programs walk over their tiles."""

import pytest
import torch
from kernel_makers import integers

pytest.importorskip("triton")

from benchmarks.compiled.launch import launches
from sampled_sae.kernels import column_scores, descriptors
from sampled_sae.kernels.column_scores import column_statistics

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize(("B", "F", "tiles"), [(64, 48, 6), (65, 33, 9), (7, 16, 1), (32, 64, 4)])
def test_programs_walk_over_all_tiles(B, F, tiles, device, monkeypatch):
    """Three programs in the interpreter: full rounds, a last one that is not, and fewer tiles than programs."""
    assert tiles == -(-B // 32) * -(-F // 16)
    x, W, b, scale = integers((B, 16, F), torch.bfloat16, device)
    found = column_statistics(x, W, b, "l2", scale)
    monkeypatch.setattr(descriptors, "DESCRIBED", {})
    assert torch.equal(found, column_statistics(x, W, b, "l2", scale))


@pytest.mark.parametrize("arch", ["interpreter", "sm_90", "sm_80"])
@pytest.mark.parametrize("pad", [0, 1])
def test_which_kernel_is_launched(arch, pad):
    x, W = (torch.empty(n, 64 + pad, dtype=torch.bfloat16, device="meta")[:, :64] for n in (300, 500))
    first, _ = launches(lambda: column_statistics(x, W, None, "l2"), arch)
    by_descriptors = pad == 0 and arch != "sm_80"
    kernels = column_scores.column_partials_kernel, column_scores.described_partials_kernel
    assert first.kernel is kernels[by_descriptors]
    if arch == "sm_90":
        assert first.constexprs.get("HAS_TAIL", True)
        assert first.arguments.get("rounds", 1) == 1


WHOLE = torch.empty(64, 4096, dtype=torch.bfloat16, device="meta")


@pytest.mark.parametrize(
    ("matrix", "fits"),
    [
        (WHOLE, True),
        (WHOLE[:, :500], True),
        (WHOLE[:, 8:], True),
        (WHOLE[::2], True),
        (WHOLE[:, 4:], False),
        (WHOLE[:, ::2], False),
        (WHOLE[:0], False),
        (WHOLE[:, :0], False),
        (WHOLE[:1].expand(64, 4096), False),
        (WHOLE.as_strided((64, 16), (8, 1)), False),
        (WHOLE.as_strided((32, 100), (100, 1)), False),
        (WHOLE.as_strided((32, 104), (104, 1)), True),
    ],
)
def test_which_matrices_descriptors_hold(matrix, fits):
    """Rows of multiples of 16 bytes that do not overlap: 8 elements here."""
    here = torch.empty(64 * 4096, dtype=matrix.dtype).as_strided(matrix.shape, matrix.stride(), matrix.storage_offset())
    assert descriptors.is_describable(here) == fits


@pytest.mark.parametrize(
    ("arch", "dtype", "d", "stride", "fused"),
    [
        ("sm_90", torch.bfloat16, 4096, 4096, True),
        ("sm_90", torch.bfloat16, 4104, 4104, False),
        ("sm_90", torch.bfloat16, 1024, 1025, True),
        ("sm_90", torch.bfloat16, 1032, 1033, False),
        ("sm_90", torch.float32, 2304, 2304, False),
        ("sm_100", torch.float16, 2304, 2304, True),
        ("sm_80", torch.bfloat16, 2304, 2304, False),
        ("sm_80", torch.bfloat16, 768, 768, True),
    ],
)
def test_up_to_which_d_scores_are_one_kernel(arch, dtype, d, stride, fused, monkeypatch):
    monkeypatch.setattr(column_scores, "architecture", lambda device: arch)
    x = torch.empty(3, stride, dtype=dtype)[:, :d]
    assert column_scores.is_fused(x, x) == fused
