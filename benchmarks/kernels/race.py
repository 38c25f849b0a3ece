"""One operation against its rivals and the machine's ceilings, in rounds that go over all of them in turn."""

from __future__ import annotations

import time
from typing import Any

import torch

from benchmarks.kernels.operation import Inputs, Operation
from sampled_sae.support.timing import Call, free_memory, on_gpu, peak_memory, spread, timed

Row = dict[str, Any]

COPY_ELEMENTS = {"cpu": 1 << 24, "cuda": 1 << 28}
# columns of the product that measures the ceiling: enough for the full rate
PRODUCT_FEATURES = {"cpu": 4096, "cuda": 1 << 16}
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
        kind = torch.device(inputs.device).type
        ceilings = self._ceilings(1 << 12 if small else COPY_ELEMENTS[kind], 64 if small else PRODUCT_FEATURES[kind])
        self.calls: dict[str, Call] = {"ours": operation.ours, **operation.rivals}
        needed = operation.eager_bytes
        if needed > SHARE_OF_MEMORY * free_memory(inputs.device):
            self.left_out["eager"] = f"needs about {needed / 1e9:.0f} GB"
        else:
            self._rivals(backend)
        self.calls |= ceilings
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
        verdict = self._verdict()
        ceilings = {name: spread(self.samples[name]).ms for name in ("copy", "product")}
        copy = 1e-6 * self._copy_bytes / ceilings["copy"]
        product = 1e-9 * self._product_flops / ceilings["product"]
        w = self.inputs.workload
        same = {**w.columns(), "dtype": str(self.inputs.dtype).removeprefix("torch."), "operation": self.name}
        least = {"bytes": self.operation.bytes, "flops": self.operation.flops}
        rows = []
        for name, samples in self.samples.items():
            if name in ceilings:
                continue
            times = spread(samples)
            rates = {"GB/s": 1e-6 * least["bytes"] / times.ms, "TFLOP/s": 1e-9 * least["flops"] / times.ms}
            ratio = spread([theirs / ours for theirs, ours in zip(samples, self.samples["ours"])]).ms
            rows.append(
                {
                    **same,
                    "form": f"ours ({self.inputs.impl})" if name == "ours" else name,
                    **vars(times),
                    **least,
                    **rates,
                    "of copy": rates["GB/s"] / copy,
                    "of product": rates["TFLOP/s"] / product,
                    "peak bytes": self._peak(name),
                    "ours is faster by": ratio if name != "ours" and verdict == "passed" else None,
                    "check": verdict,
                }
            )
        rows += [{**same, "form": name, "left out": why} for name, why in self.left_out.items()]
        ours = rows[0]
        ours |= {"copy GB/s": copy, "product TFLOP/s": product}
        return rows

    def _ceilings(self, elements: int, features: int) -> dict[str, Call]:
        """A copy, and a product with some of the features."""
        inputs = self.inputs
        source, target = (torch.ones(elements, device=inputs.device) for _ in range(2))
        x, W = inputs.x, inputs.W[:features]
        out = torch.empty(len(x), len(W), dtype=inputs.dtype, device=inputs.device)
        self._copy_bytes, self._product_flops = 2 * target.nbytes, 2 * out.numel() * x.shape[1]
        # closures without self: a cycle would hold the memory until the next garbage collection
        return {"copy": lambda: target.copy_(source), "product": lambda: torch.mm(x, W.t(), out=out)}

    def _rivals(self, backend: str | None) -> None:
        operation = self.operation
        arguments = operation.arguments()
        self.calls["eager"] = lambda: operation.eager(*arguments)
        if backend is not None:
            torch._dynamo.reset()
            form = torch.compile(operation.to_compile or operation.eager, backend=backend, dynamic=False)
            self.calls["torch.compile" if backend == "inductor" else f"torch.compile, {backend}"] = lambda: form(
                *arguments
            )

    @torch.no_grad()
    def _warm_up(self) -> None:
        for name in list(self.calls):
            try:
                self.operation.prepare()
                self.calls[name]()
            except Exception as error:
                if name in ("ours", "copy", "product"):
                    raise
                del self.calls[name]
                self.left_out[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]

    def _verdict(self) -> str:
        """ "passed", or what is wrong."""
        self.operation.prepare()
        try:
            comparisons = self.operation.check()
        except AssertionError as error:
            return str(error)
        for c in comparisons:
            if not c.passed:
                return (
                    f"{c.name}: error {c.error:.2g}, eager PyTorch has {c.eager_error:.2g}, allowed are {c.allowed:.2g}"
                )
        return "passed"

    def _peak(self, name: str) -> int | None:
        self.operation.prepare()
        try:
            return peak_memory(self.calls[name], self.inputs.device)
        except OSError:
            return None
