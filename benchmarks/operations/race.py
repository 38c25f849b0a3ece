"""One operation against its rivals and the machine's ceilings, in rounds that go over all of them in turn."""

from __future__ import annotations

import time

import torch

from benchmarks.measure import Row, product
from benchmarks.operations.operation import Inputs, Operation
from benchmarks.worker import one_line
from sampled_sae.support.timing import Call, free_memory, on_gpu, peak_memory, spread, timed

COPY_ELEMENTS = {"cpu": 1 << 24, "cuda": 1 << 28}
# columns of the product that measures the ceiling: enough for the full rate
PRODUCT_FEATURES = {"cpu": 4096, "cuda": 1 << 16}
# the same for a rehearsal
FEW_ELEMENTS, FEW_FEATURES = 1 << 12, 64
CEILINGS = ("copy", "product")
# of what is free, the share that the eager form may ask for
SHARE_OF_MEMORY = 0.8


class Race:
    """Times ours, eager PyTorch, torch.compile and other rivals of one operation, with a copy and a product.

    Args:
        name: of the operation.
        inputs, operation: what is computed.
        backend: of torch.compile; None leaves it out.
        small: for a rehearsal, ceilings of a few elements.

    Attributes:
        samples: milliseconds by name.
        left_out: why, by name, for those that could not run.
    """

    def __init__(
        self, name: str, inputs: Inputs, operation: Operation, backend: str | None = "inductor", small: bool = False
    ) -> None:
        self.name, self.inputs, self.operation = name, inputs, operation
        self.left_out: dict[str, str] = {}
        self.calls: dict[str, Call] = {"ours": operation.ours, **operation.rivals}
        if operation.eager_bytes > SHARE_OF_MEMORY * free_memory(inputs.device):
            self.left_out["eager"] = f"needs about {operation.eager_bytes / 1e9:.0f} GB"
        elif operation.eager is not None:
            self.calls |= eager_forms(operation, backend)
        kind = torch.device(inputs.device).type
        elements = FEW_ELEMENTS if small else COPY_ELEMENTS[kind]
        source, target = (torch.ones(elements, device=inputs.device) for _ in range(2))
        W = inputs.W[: FEW_FEATURES if small else PRODUCT_FEATURES[kind]]
        self.calls |= {"copy": lambda: target.copy_(source), "product": product(inputs.x, W)}
        self._least = {"copy": 2 * target.nbytes, "product": 2 * inputs.x.numel() * len(W)}
        self._warm_up()
        self.samples: dict[str, list[float]] = {call: [] for call in self.calls}

    def round(self, without: str | None = None) -> None:
        """One sample of each call, on a GPU of its kernels alone.

        But for one of them, if named, for which all is ready then, with the GPU at rest: its caller takes the time on
        the host, and the other samples count the host's work too.
        """
        device = self.inputs.device
        for name in self.calls:
            if name != without:
                self.operation.prepare()
                self.samples[name].append(1e3 * timed(self.calls[name], device, queued=without is None))
        if without is not None:
            self.operation.prepare()
            if on_gpu(device):
                torch.cuda.synchronize(device)

    def run(self, rounds: int, seconds: float) -> None:
        """Rounds until there are as many, or so much time has passed; at least one."""
        start = time.perf_counter()
        for _ in range(rounds):
            self.round()
            if time.perf_counter() - start > seconds:
                break

    def rounds_within(self, seconds: float, least: int, most: int) -> int:
        """How many rounds take about so long, judged by one."""
        start = time.perf_counter()
        self.round()
        took = time.perf_counter() - start
        self.samples = {call: [] for call in self.calls}
        return min(most, max(least, int(seconds / took)))

    def rows(self) -> list[Row]:
        """One row for ours, then one for each rival; a speedup only if the check on these inputs passes."""
        checked = verdict(self.operation)
        copy, rate = (self._least[name] / spread(self.samples[name]).ms for name in CEILINGS)
        dtype = str(self.inputs.dtype).removeprefix("torch.")
        same = {**self.inputs.workload.columns(), "dtype": dtype, "operation": self.name}
        rows = []
        for name in [name for name in self.samples if name not in CEILINGS]:
            times = spread(self.samples[name])
            bytes_a_ms, flops_a_ms = self.operation.bytes / times.ms, self.operation.flops / times.ms
            ratio = spread([theirs / ours for theirs, ours in zip(self.samples[name], self.samples["ours"])]).ms
            rows.append(
                {
                    **same,
                    "form": f"ours ({self.inputs.impl})" if name == "ours" else name,
                    **vars(times),
                    "bytes": self.operation.bytes,
                    "flops": self.operation.flops,
                    "GB/s": 1e-6 * bytes_a_ms,
                    "TFLOP/s": 1e-9 * flops_a_ms,
                    "of copy": bytes_a_ms / copy,
                    "of product": flops_a_ms / rate,
                    "peak bytes": self._peak(name),
                    "ours is faster by": ratio if name != "ours" and checked == "passed" else None,
                    "check": checked,
                }
            )
        rows[0] |= {"copy GB/s": 1e-6 * copy, "product TFLOP/s": 1e-9 * rate}
        return rows + [{**same, "form": name, "reason": why} for name, why in self.left_out.items()]

    @torch.no_grad()
    def _warm_up(self) -> None:
        for name in list(self.calls):
            try:
                self.operation.prepare()
                self.calls[name]()
            except Exception as error:
                if name in ("ours", *CEILINGS):
                    raise
                del self.calls[name]
                self.left_out[name] = one_line(error)[:200]

    def _peak(self, name: str) -> int | None:
        self.operation.prepare()
        try:
            return peak_memory(self.calls[name], self.inputs.device)
        except OSError:
            return None


def eager_forms(operation: Operation, backend: str | None) -> dict[str, Call]:
    """In eager PyTorch, and by torch.compile."""
    arguments, eager = operation.arguments(), operation.eager
    assert eager is not None
    calls: dict[str, Call] = {"eager": lambda: eager(*arguments)}
    if backend is not None:
        torch._dynamo.reset()
        form = torch.compile(operation.to_compile or eager, backend=backend, dynamic=False)
        name = "torch.compile" if backend == "inductor" else f"torch.compile, {backend}"
        calls[name] = lambda: form(*arguments)
    return calls


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
