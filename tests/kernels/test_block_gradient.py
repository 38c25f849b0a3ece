import pytest
import torch
from kernel_makers import NEEDS_VIRTUAL_MEMORY, assert_runs_alone

pytest.importorskip("triton")

from sampled_sae.kernels.block_gradient import block_gradient

pytestmark = pytest.mark.usefixtures("poisoned")

# [B, P]; the interpreter's programs walk over 2 tiles of 4 tokens x 16 columns
SHAPES = [
    pytest.param((1, 1), id="one of each"),
    pytest.param((8, 16), id="one program"),
    pytest.param((67, 45), id="tails"),
    pytest.param((300, 3), id="fold loops"),
]


def blocks(shape, device, seed=0):
    """A gradient in small whole numbers, a block of which half is kept, and powers of two as scale."""
    make = torch.Generator().manual_seed(seed)
    grad, block = (torch.randint(-8, 9, shape, generator=make).float() for _ in range(2))
    scale = 2.0 ** torch.randint(-2, 3, shape[1:], generator=make)
    return grad.to(device), block.clamp(min=0).to(device), scale.to(device)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("has_scale", [True, False])
def test_is_what_pytorch_makes(has_scale, dtype, shape, device):
    grad, block, scale = blocks(shape, device)
    found, sums = block_gradient(grad, block, scale if has_scale else None, dtype)
    expected = torch.where(block > 0, grad * (scale if has_scale else 1), 0)
    assert found.dtype == dtype
    assert torch.equal(found, expected.to(dtype))
    assert torch.equal(sums, expected.sum(0))


def test_rounds_to_nearest_and_sums_what_was_not_rounded(device):
    grad = torch.tensor([[1 + 2**-9 + 2**-20], [1 - 2**-9 + 2**-20], [1 + 2**-8]], device=device)
    found, sums = block_gradient(grad, torch.ones_like(grad), None, torch.bfloat16)
    assert torch.equal(found, grad.bfloat16())
    assert torch.equal(sums, grad.sum(0))


def test_nan_goes_on_where_it_is_kept_and_nowhere_else(device):
    grad, block, _ = blocks((9, 20), device)
    block[0, 0], block[1, 1], block[2, 2] = 1, 0, float("nan")
    grad[0, 0] = grad[1, 1] = float("nan")
    for dtype in (torch.float32, torch.bfloat16):
        found, sums = block_gradient(grad, block, None, dtype)
        assert found.isnan().nonzero().tolist() == [[0, 0]]
        assert sums.isnan().nonzero().tolist() == [[0]]
        assert found[2, 2] == 0


def test_gradients_of_any_layout(device):
    grad, block, scale = blocks((67, 45), device)
    expected = block_gradient(grad, block, scale, torch.bfloat16)
    for other in (grad.t().contiguous().t(), torch.nn.functional.pad(grad, (0, 3), value=float("nan"))[:, :45]):
        found = block_gradient(other, block, scale, torch.bfloat16)
        assert all(torch.equal(a, b) for a, b in zip(found, expected))
    one = torch.tensor(2.0, device=device).expand(67, 45)
    assert torch.equal(block_gradient(one, block, None, torch.float32)[0], torch.where(block > 0, 2.0, 0.0))


@pytest.mark.parametrize("shape", [(0, 5), (5, 0)])
def test_nothing(shape, device):
    block = torch.zeros(shape, device=device)
    found, sums = block_gradient(block, block, None, torch.bfloat16)
    assert (found.shape, found.dtype) == (shape, torch.bfloat16)
    assert torch.equal(sums, torch.zeros(shape[1], device=device))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grad": torch.ones(4, 6)}, r"grad must be fp32 \[4, 5\] as block"),
        ({"grad": torch.ones(4, 5).half()}, "grad must be fp32"),
        ({"block": torch.ones(5, 4).t()}, "block must be contiguous"),
        ({"scale": torch.ones(4)}, "scale must be"),
    ],
)
def test_wrong_arguments(change, message):
    arguments = {"grad": torch.ones(4, 5), "block": torch.ones(4, 5), "scale": None, "dtype": torch.float32}
    with pytest.raises(ValueError, match=message):
        block_gradient(**(arguments | change))


FAR_ROWS = """
import torch
from sampled_sae.kernels.block_gradient import block_gradient
far = torch.empty_strided((3, 8), (2**30 + 16, 1))  # untouched pages cost nothing
far.copy_(torch.arange(24).reshape(3, 8))
found, sums = block_gradient(far, torch.ones(3, 8), None, torch.float32)
assert torch.equal(found, far)
assert torch.equal(sums, found.sum(0))
"""


@NEEDS_VIRTUAL_MEMORY
def test_offsets_beyond_32_bits(tmp_path):
    assert_runs_alone(FAR_ROWS, tmp_path)
