"""The row-Adam kernel: strides, copies, bits that repeat, empty and wrong arguments, offsets beyond 32 bits."""

import pytest
import torch
from kernel_makers import NEEDS_VIRTUAL_MEMORY, assert_runs_alone

pytest.importorskip("triton")

from row_adam_steps import DECODER, MODES, RULE, gradients, ours, start

from sampled_sae.kernels.row_adam import row_adam_

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("d", [None, 20])
def test_copy(d, dtype, device):
    weight, *moments, _ = start(21, d, device)
    copy = torch.zeros_like(weight, dtype=dtype)
    features, rows = gradients((21, d, 6), 1, device)[0]
    step = torch.ones(1, device=device)
    row_adam_(weight, *moments, rows, features, step, mode="dense", copy=copy, **RULE)
    assert torch.equal(copy, weight.to(dtype))


@pytest.mark.parametrize("mode", ["dense", "decayed"])
def test_a_rate_on_the_device_is_that_number(mode, device):
    state, grads = start(9, 20, device), gradients((9, 20, 4), 2, device)
    rates = (0.3, torch.tensor(0.3, device=device))
    number, on_device = (ours(state, grads, mode, **{**DECODER, "lr": lr}) for lr in rates)
    assert all(torch.equal(a, b) for a, b in zip(number, on_device))


@pytest.mark.parametrize("layout", ["rows apart", "unaligned", "transposed"])
def test_strided_rows(layout, device):
    shape = (21, 20, 6)
    state, ((features, rows),) = start(*shape[:2], device), gradients(shape, 1, device)
    expected = ours(state, [(features, rows)], "dense")[0]
    wide = torch.full((21, 27), float("nan"), device=device)
    weight = wide[:, 1:21] if layout == "unaligned" else wide[:, :20]
    weight.copy_(state[0])
    copy = torch.zeros(21, 33, dtype=torch.bfloat16, device=device)[:, 3:23]
    if layout == "transposed":
        rows = rows.t().contiguous().t()
    else:
        rows = torch.nn.functional.pad(rows, (1, 60), value=float("nan"))[:, 1:21]
    step = torch.ones(1, device=device)
    row_adam_(weight, *state[1:3], rows, features, step, mode="dense", copy=copy, **RULE)
    assert torch.equal(weight, expected)
    assert torch.equal(copy, expected.bfloat16())
    assert wide.isnan().sum() == 21 * 7


@pytest.mark.one_in(4)
@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_same_bits_in_any_order(mode, moments, device):
    """Of the list, and in every run: what is random follows seed, step and place alone."""
    shape = (23, 20, 9)
    state, grads = start(*shape[:2], device, moments), gradients(shape, 3, device)
    turned = [(features.flip(0), rows.flip(0)) for features, rows in grads]
    first = ours(state, grads, mode, seed=2**40 + 1, **DECODER)
    for other in (grads, turned):
        for found, expected in zip(ours(state, other, mode, seed=2**40 + 1, **DECODER), first):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0)])
@pytest.mark.parametrize("mode", ["dense", "lazy"])
def test_nothing(mode, shape, device):
    weight, exp_avg, exp_avg_sq, grad = (torch.zeros(shape, device=device) for _ in range(4))
    row_adam_(weight, exp_avg, exp_avg_sq, grad, None, torch.ones(1, device=device), mode=mode, **RULE)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="what the host waits for shows on a GPU")
@pytest.mark.parametrize("mode", MODES)
def test_host_never_waits(mode, device):
    weight, *moments, last = start(21, 20, device)
    features, rows = gradients((21, 20, 6), 1, device)[0]
    given = {"last": last if mode == "decayed" else None, **RULE, **DECODER, "factor": torch.ones(1, device=device)}
    step = torch.ones(1, device=device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        row_adam_(weight, *moments, rows, features, step, mode=mode, **given)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "sparse"}, "mode must be one of dense, lazy, decayed"),
        ({"weight": torch.ones(4, 6, dtype=torch.float16)}, "weight must be fp32"),
        ({"weight": torch.ones(6, 4).t()}, "weight must be fp32.*contiguous rows"),
        ({"weight": torch.ones(4, 16385)}, "weight must have rows of at most 16384"),
        ({"exp_avg": torch.ones(4, 5)}, "exp_avg must be"),
        ({"exp_avg_sq": torch.ones(4, 6, dtype=torch.float16)}, "exp_avg_sq must be"),
        ({"exp_avg_sq": torch.ones(6, 4).t()}, "exp_avg_sq must be contiguous"),
        ({"grad": torch.ones(2)}, "grad must be"),
        ({"grad": torch.ones(2, 7)}, "grad must be"),
        ({"grad": torch.ones(2, 6, dtype=torch.float64)}, "grad must be"),
        ({"features": None}, "features must be given where grad has 2 of 4 rows"),
        ({"features": torch.tensor([1])}, "features must be"),
        ({"features": torch.tensor([1, 2], dtype=torch.int32)}, "features must be"),
        ({"step": torch.ones(2)}, "step must be"),
        ({"step": torch.ones(1, dtype=torch.int64)}, "step must be"),
        ({"factor": torch.ones(2)}, "factor must be"),
        ({"lr": torch.ones((), dtype=torch.float64)}, "lr must be fp32 with one element"),
        ({"mode": "decayed"}, "last must be given"),
        ({"last": torch.zeros(4, dtype=torch.int32)}, "last must be given in mode 'decayed' and in no other"),
        ({"mode": "decayed", "last": torch.zeros(4)}, "last must be"),
        ({"copy": torch.ones(4, 6)}, "copy must be bf16 or fp16"),
        ({"copy": torch.ones(4, 5, dtype=torch.bfloat16)}, "copy must be bf16 or fp16"),
        ({"step": torch.ones(1, device="meta")}, "step must be on cpu as weight, got meta"),
    ],
)
def test_wrong_arguments(change, message):
    arguments = {name: torch.ones(4, 6) for name in ("weight", "exp_avg", "exp_avg_sq")}
    arguments |= {"grad": torch.ones(2, 6), "features": torch.tensor([3, 0]), "step": torch.ones(()), "mode": "lazy"}
    with pytest.raises(ValueError, match=message):
        row_adam_(**(arguments | RULE | change))


FAR_ROWS = """
import torch
from sampled_sae.kernels.row_adam import row_adam_
rule = dict(factor=None, lr=0.1, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0)
one = torch.ones(1)
# untouched pages cost nothing
far, grad = (torch.empty_strided((3, 8), (2**30 + 16, 1)) for _ in range(2))
copy = torch.empty_strided((3, 8), (2**30 + 16, 1), dtype=torch.bfloat16)
near, slope = torch.ones(3, 8), torch.arange(1.0, 25).reshape(3, 8)
far.copy_(near), grad.copy_(slope)
row_adam_(near, torch.zeros(3, 8), torch.zeros(3, 8), slope, None, one, mode="dense", **rule)
row_adam_(far, torch.zeros(3, 8), torch.zeros(3, 8), grad, None, one, mode="dense", copy=copy, **rule)
assert torch.equal(far, near) and torch.equal(copy, near.bfloat16()) and (near < 1).all()
F, d = 2**18 + 2, 8192
moments = [torch.empty(F, d, dtype=torch.bfloat16) for _ in range(2)]
for moment in moments:
    moment[F - 1] = 0
row_adam_(torch.ones(1, d).expand(F, d), *moments, torch.ones(1, d), torch.tensor([F - 1]), one, mode="lazy", **rule)
assert (moments[0][F - 1] > 0.09).all()
"""


@NEEDS_VIRTUAL_MEMORY
def test_offsets_beyond_32_bits(tmp_path):
    assert_runs_alone(FAR_ROWS, tmp_path)
