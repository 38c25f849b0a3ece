"""The memory checker: each fault that it looks for is planted and found, and what is right is not reported."""

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from memcheck.interpreter import POISON, checked  # noqa: E402
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

HALF, LONG = torch.bfloat16, torch.int64
pytestmark = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="needs Triton's interpreter")


@triton.jit
def copy_kernel(x, y, n, stride, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at * stride, mask=at < n), mask=at < n)


@triton.jit
def sum_kernel(x, y, ATOMIC: tl.constexpr):
    if ATOMIC:
        tl.atomic_add(y, tl.load(x + tl.program_id(0)))
    else:
        tl.store(y, tl.load(y) + tl.load(x + tl.program_id(0)))


@triton.jit
def shift_kernel(x, AFTER: tl.constexpr):
    """Reads what the program after or before it writes."""
    i = tl.program_id(0)
    value = tl.load(x + i + 1) if AFTER else tl.load(x + tl.maximum(i - 1, 0))
    tl.store(x + i, value)


@triton.jit
def claim_kernel(x):
    tl.atomic_cas(x + 1, 0, 1)


@triton.jit
def reverse_kernel(x, BARRIER: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(x + at, tl.load(x + at) + 1)
    if BARRIER:
        tl.debug_barrier()
    tl.store(x + at, tl.load(x + BLOCK - 1 - at))


@triton.jit
def scatter_kernel(x, y, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y + at // 2, tl.load(x + at))


@triton.jit
def halves_kernel(words, halves):
    """One program writes a word, the other its second half."""
    if tl.program_id(0) == 0:
        tl.store(words, 0)
    else:
        tl.store(halves + 1, 0)


@triton.jit
def last_kernel(x, y, READS: tl.constexpr):
    """All add, and the last one to come, which no barrier tells of the others' work, reads or writes."""
    if tl.atomic_add(x, 1) == 2:
        if READS:
            tl.store(y, tl.load(x))
        else:
            tl.store(x, 0)


@triton.jit
def described_kernel(x, y, BLOCK: tl.constexpr):
    tl.store(y + tl.arange(0, BLOCK), x.load([0]))


@triton.jit
def order_kernel(x, y):
    """Which program comes first."""
    place = tl.atomic_add(x, 1)
    tl.store(y + place, tl.program_id(0))


def copied(n, x, y, stride=1):
    copy_kernel[(triton.cdiv(n, 4),)](x, y, n, stride, BLOCK=4)


def described(x):
    """Copied by a descriptor of tiles of 8, with zeros for what is not there."""
    described_kernel[(1,)](TensorDescriptor.from_tensor(x, [8]), torch.zeros(8), BLOCK=8)


def halves(words):
    halves_kernel[(2,)](words, words.view(torch.int16))


def shared(memory):
    copied(8, torch.from_numpy(memory[1:]), torch.from_numpy(memory[:8]))


def last(reads):
    last_kernel[(3,)](*torch.zeros(2, 1, dtype=torch.int32), reads)


def kinds(findings):
    return {finding.kind.split(":")[0] for finding in findings.lanes}


def whole(n=8):
    return torch.arange(1.0, n + 1)


def zeros(dtype):
    return torch.zeros(4, dtype=dtype)


FAULTS = {
    "read past the end": ("out of bounds", lambda: copied(8, whole(7), torch.zeros(8))),
    "written past the end": ("out of bounds", lambda: copied(8, whole(), torch.zeros(7))),
    "read before the start": ("out of bounds", lambda: copied(2, whole(), torch.zeros(8), stride=-1)),
    "read in the holes of a view": ("out of bounds", lambda: copied(8, torch.zeros(4, 4)[:, :2], torch.zeros(8))),
    "read far away": ("out of bounds", lambda: copied(2, whole(), torch.zeros(8), stride=1 << 41)),
    "atomic past the end": ("out of bounds", lambda: sum_kernel[(1,)](whole(), torch.zeros(0), True)),
    "uninitialised": ("uninitialised read", lambda: copied(8, torch.empty(8), torch.zeros(8))),
    "uninitialised, 16 bits": ("uninitialised read", lambda: copied(4, torch.empty(4, dtype=HALF), zeros(HALF))),
    "uninitialised, 64 bits": ("uninitialised read", lambda: copied(4, whole().new_empty(4, dtype=LONG), zeros(LONG))),
    "uninitialised, by a descriptor": ("uninitialised read", lambda: described(torch.empty(8))),
    "uninitialised, by columns": (
        "uninitialised read",
        lambda: copied(8, torch.empty_like(torch.zeros(4, 2).t()), torch.zeros(8)),
    ),
    "sum without atomics": ("race", lambda: sum_kernel[(3,)](whole(), torch.zeros(1), False)),
    "read what the next writes": ("race", lambda: shift_kernel[(3,)](whole(), True)),
    "read what the last wrote": ("race", lambda: shift_kernel[(3,)](whole(), False)),
    "a word and its half": ("race", lambda: halves(torch.zeros(1, dtype=torch.int32))),
    "what numpy shares": ("race", lambda: shared(np.zeros(9, np.float32))),
    "read by the last that added": ("race", lambda: last(True)),
    "written by the last that added": ("race", lambda: last(False)),
    "two lanes, one address": ("duplicate", lambda: scatter_kernel[(1,)](whole(), torch.zeros(8), BLOCK=8)),
    "other lanes without barrier": ("same program", lambda: reverse_kernel[(1,)](whole(), False, BLOCK=8)),
}
RIGHT = {
    "copy": lambda: copied(7, whole(7), torch.zeros(7)),
    "copy by a descriptor": lambda: described(whole(7)),
    "copy of every second": lambda: copied(4, torch.zeros(8)[::2], torch.zeros(4), stride=2),
    "written, then read": lambda: (y := torch.empty(8), copied(8, whole(), y), copied(8, y, torch.zeros(8))),
    "sum by atomics": lambda: sum_kernel[(3,)](whole(), torch.zeros(1), True),
    "equal values to one address": lambda: scatter_kernel[(1,)](torch.ones(8), torch.zeros(8), BLOCK=8),
    "a word and the next one's half": lambda: halves_kernel[(2,)](
        (words := torch.zeros(2, dtype=torch.int32)), words[1:].view(torch.int16)
    ),
    "claim": lambda: claim_kernel[(3,)](torch.zeros(2, dtype=torch.int32)),
}


@pytest.mark.parametrize(("kind", "launch"), FAULTS.values(), ids=FAULTS.keys())
@pytest.mark.parametrize("order", ["forward", "reverse"])
def test_a_planted_fault_is_found_where_it_is(order, kind, launch):
    with checked(order) as findings:
        launch()
    assert kinds(findings) - {"same program"} <= {kind}
    found = [finding for finding in findings.lanes if finding.kind.startswith(kind)]
    assert found
    for finding in found:
        assert finding.site.startswith("test_memcheck.py:")
        assert finding.kernel.endswith("_kernel")
        assert (finding in findings.faults()) == (kind != "same program")


@pytest.mark.parametrize("launch", RIGHT.values(), ids=RIGHT.keys())
def test_what_is_right_is_not_reported(launch):
    with checked() as findings:
        launch()
    assert findings.faults() == []
    assert findings.kernels.total() > 0
    assert findings.accesses > 0


def test_the_barrier_of_a_program_is_seen():
    """What is left is the store after the load, with no barrier between."""
    found = []
    for barrier in (False, True):
        with checked() as findings:
            reverse_kernel[(1,)](whole(), barrier, BLOCK=8)
        found.append({finding.kind for finding in findings.lanes})
    assert "same program: read after write" in found[0] - found[1]


def test_out_of_bounds_is_left_undone():
    memory = torch.full((9,), 5.0)
    with checked():
        copied(8, whole(), memory[:7])
    assert memory[7:].tolist() == [5.0, 5.0]
    refused = pytest.raises(triton.runtime.errors.InterpreterError, match="claim_kernel: atomic_cas out of bounds")
    with checked(), refused:
        claim_kernel[(1,)](torch.zeros(1, dtype=torch.int32))


@pytest.mark.parametrize("order", ["forward", "reverse", "shuffle"])
def test_programs_run_in_the_order_asked_for(order):
    found = torch.zeros(16, dtype=torch.int32)
    with checked(order):
        order_kernel[(16,)](torch.zeros(1, dtype=torch.int32), found)
    assert (found.tolist() == [*range(16)]) == (order == "forward")
    assert (found.tolist() == [*reversed(range(16))]) == (order == "reverse")
    assert sorted(found.tolist()) == [*range(16)]


def test_another_order_is_an_error():
    with pytest.raises(ValueError, match="order='backward': must be one of"), checked("backward"):
        pass


def test_what_has_no_memory_of_its_own_is_left_alone():
    with checked():
        batched = torch.vmap(lambda x: torch.empty_like(x).copy_(x))(torch.ones(2, 3))
    assert torch.equal(batched, torch.ones(2, 3))


def test_everything_is_as_before_afterwards():
    with checked():
        assert torch.empty(3).view(torch.int32).tolist() == [POISON[4]] * 3
    with checked(poison=False) as findings:
        copied(4, torch.empty(4), torch.zeros(4))
    assert findings.lanes == {}
    copied(8, torch.empty(8), torch.zeros(8))
    assert findings.kernels.total() == 1


# of each kernel of this package some tests that are cheap in the interpreter: all arguments, tails, unused slots
