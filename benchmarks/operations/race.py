"""One operation against its rivals and the machine's ceilings, in rounds that go over all of them in turn."""

from __future__ import annotations

import torch

from benchmarks.measure import Row, product
from benchmarks.operations.operation import Inputs, Operation
from benchmarks.record import SIZE
from benchmarks.worker import one_line
from sampled_sae.bench import peak_of
from sampled_sae.support.timing import Call, free_memory, interleaved, spread

RIVALS = ("eager", "torch.compile", "torch.topk", "embedding_bag")
COPY_ELEMENTS = {"cpu": 1 << 24, "cuda": 1 << 28}
# columns of the product that measures the ceiling: enough for the full rate
PRODUCT_FEATURES = {"cpu": 4096, "cuda": 1 << 16}
# the same for a rehearsal
FEW_ELEMENTS, FEW_FEATURES = 1 << 12, 64
COLUMNS = {
    **SIZE,
    "operation": "{operation}",
    "ours, ms": "{ms:.3g}",
    "p20–p80": "{p20:.3g}–{p80:.3g}",
    "rounds": "{rounds}",
    "GB/s (of copy)": "{GB/s:.3g} ({of copy:.2f})",
    "TFLOP/s (of product)": "{TFLOP/s:.2g} ({of product:.2f})",
    **{f"times as fast as {name}": f"{{rivals[{name}][factor]:.2f}}" for name in RIVALS},
    "peak MB, ours / eager": "{peak MB:.0f} / {rivals[eager][peak MB]:.0f}",
    "check": "{check}",
}
# of what is free, the share that the eager form may ask for
SHARE_OF_MEMORY = 0.8


def race(
    name: str,
    inputs: Inputs,
    operation: Operation,
    rounds: int = 7,
    seconds: float = 25.0,
    backend: str | None = "inductor",
    small: bool = False,
) -> Row:
    """Ours, its rivals, a copy and a product in rounds, on a GPU of the kernels alone: the row of all of them.

    How many times faster ours is stands there only if the check on these inputs passes.

    Args:
        name: of the operation.
        inputs, operation: what is computed.
        rounds, seconds: as many rounds, or fewer that take so long; at least one.
        backend: of torch.compile; None leaves it out.
        small: for a rehearsal, ceilings of a few elements.
    """
    device, kind = inputs.device, torch.device(inputs.device).type
    source, target = (torch.ones(FEW_ELEMENTS if small else COPY_ELEMENTS[kind], device=device) for _ in range(2))
    W = inputs.W[: FEW_FEATURES if small else PRODUCT_FEATURES[kind]]
    ceilings = {"copy": lambda: target.copy_(source), "product": product(inputs.x, W)}
    calls: dict[str, Call] = {"ours": operation.ours, **ceilings}
    operation.prepare()
    for call in calls.values():
        call()
    others, left_out = rivals_of(operation, device, backend)
    samples = interleaved(calls | others, device, rounds, seconds, False, queued=True, prepare=operation.prepare)
    times, checked = spread(samples["ours"]), verdict(operation)
    copy = 2 * target.nbytes / spread(samples["copy"]).ms
    rate = 2 * inputs.x.numel() * len(W) / spread(samples["product"]).ms
    rivals: dict[str, Row] = {rival: {"reason": why} for rival, why in left_out.items()}
    for rival, call in others.items():
        ratios = [theirs / own for theirs, own in zip(samples[rival], samples["ours"])]
        factor = spread(ratios).ms if checked == "passed" else None
        rivals[rival] = {**vars(spread(samples[rival])), "peak MB": peak(operation, call, device), "factor": factor}
    return {
        **inputs.workload.columns(),
        "dtype": str(inputs.dtype).removeprefix("torch."),
        "operation": name,
        "impl": inputs.impl,
        **vars(times),
        "bytes": operation.bytes,
        "flops": operation.flops,
        "GB/s": 1e-6 * operation.bytes / times.ms,
        "TFLOP/s": 1e-9 * operation.flops / times.ms,
        "of copy": operation.bytes / times.ms / copy,
        "of product": operation.flops / times.ms / rate,
        "check": checked,
        "copy GB/s": 1e-6 * copy,
        "product TFLOP/s": 1e-9 * rate,
        "peak MB": peak(operation, operation.ours, device),
        "rivals": rivals,
    }


@torch.no_grad()
def rivals_of(operation: Operation, device: str, backend: str | None) -> tuple[dict[str, Call], dict[str, str]]:
    """Those that ran once: eager PyTorch, torch.compile and the operation's own; and why others did not."""
    calls: dict[str, Call] = dict(operation.rivals)
    found: dict[str, Call] = {}
    left_out: dict[str, str] = {}
    if operation.eager_bytes > SHARE_OF_MEMORY * free_memory(device):
        left_out["eager"] = f"needs about {operation.eager_bytes / 1e9:.0f} GB"
    elif operation.eager is not None:
        arguments, eager = operation.arguments(), operation.eager
        calls["eager"] = lambda: eager(*arguments)
        if backend is not None:
            torch._dynamo.reset()
            form = torch.compile(operation.to_compile or eager, backend=backend, dynamic=False)
            name = "torch.compile" if backend == "inductor" else f"torch.compile, {backend}"
            calls[name] = lambda: form(*arguments)
    for name, call in calls.items():
        try:
            operation.prepare()
            call()
            found[name] = call
        except Exception as error:
            left_out[name] = one_line(error)[:200]
    return found, left_out


def peak(operation: Operation, call: Call, device: str) -> float | None:
    """MB at the peak of a call; None where the system does not tell."""
    operation.prepare()
    found = peak_of(call, device)
    return None if found is None else 1e-6 * found


def verdict(operation: Operation) -> str:
    """ "passed", or what is wrong."""
    operation.prepare()
    try:
        wrong = [c for c in operation.check() if not c.passed]
    except Exception as error:
        return str(error) if isinstance(error, AssertionError) else one_line(error)
    reasons = (
        f"{c.name}: error {c.error:.2g}, eager PyTorch has {c.eager_error:.2g}, allowed are {c.allowed:.2g}"
        for c in wrong
    )
    return next(reasons, "passed")
