"""One kernel in one configuration, compiled for an architecture without a GPU, and what the compiler made of it."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import triton

KB = 1024
# shared memory a block may take, and an SM has
SHARED = {
    "sm_80": (163 * KB, 164 * KB),
    "sm_89": (99 * KB, 100 * KB),
    "sm_90": (227 * KB, 228 * KB),
    "sm_100": (227 * KB, 228 * KB),
    "gfx942": (64 * KB, 64 * KB),
}
MATRIX = {"sm_80": "HMMA", "sm_89": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma"}
SM_REGISTERS = 65536
GLOBAL_LOAD = {"gfx942": r"(?:global|buffer|flat)_load"}
GLOBAL_STORE = {"gfx942": r"(?:global|buffer|flat)_store"}


@dataclass(frozen=True)
class Case:
    """A kernel as its launcher calls it.

    Attributes:
        kernel: the @triton.jit function.
        config: blocks, warps and stages.
        pointers: element type of each tensor argument, such as {"x": "*bf16"}.
        integers: names of the run-time integers, or their types; "i32" unless told.
        constexprs: the other arguments; an optional tensor that is absent is None here.
        matrix: whether tensor-core instructions must be there.
        unaligned: arguments that are not known to be multiples of 16.
        floats: names of run-time floats.
    """

    kernel: Any
    config: triton.Config
    pointers: Mapping[str, str]
    integers: tuple[str, ...] | Mapping[str, str] = ()
    constexprs: Mapping[str, Any] = field(default_factory=dict)
    matrix: bool = False
    unaligned: tuple[str, ...] = ()
    floats: tuple[str, ...] = ()

    def compile(self, arch: str) -> Any:
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        target = GPUTarget("hip", arch, 64) if arch == "gfx942" else GPUTarget("cuda", int(arch[3:]), 32)
        integers = self.integers if isinstance(self.integers, Mapping) else dict.fromkeys(self.integers, "i32")
        constexprs = {**self.constexprs, **self.config.kwargs}
        types = {
            **self.pointers,
            **integers,
            **dict.fromkeys(self.floats, "fp32"),
            **dict.fromkeys(constexprs, "constexpr"),
        }
        names = self.kernel.arg_names
        aligned = [n for n in names if n in self.pointers or n in integers]
        aligned = [n for n in aligned if types[n] != "constexpr" and n not in self.unaligned]
        attrs = {(names.index(n),): [["tt.divisibility", 16]] for n in aligned}
        source = ASTSource(self.kernel, {n: types[n] for n in names}, constexprs, attrs)
        options = {"num_warps": self.config.num_warps, "num_stages": self.config.num_stages, "enable_fp_fusion": True}
        return triton.compile(source, target=target, options=options)


def resources(kernel: Any, arch: str) -> dict[str, int]:
    """What one compiled kernel takes: registers a thread, bytes spilled or on the stack, shared memory,
    threads a block, and counts of instructions (all, matrix, loads from and stores to global memory)."""
    if arch == "gfx942":
        assembly = kernel.asm["amdgcn"]
        # scalar registers spill into lanes of vector registers; what reaches memory is in the private segment
        names = ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")
        registers, *spills = (int(re.search(rf"\.{name}:\s+(\d+)", assembly)[1]) for name in names)
        lanes, line = 64, r"^\s+[vs]_|^\s+(?:global|buffer|flat|ds)_"
    else:
        usage, assembly = dumped(kernel.asm["cubin"])
        registers, *spills = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL"))
        lanes, line = 32, r"^\s+/\*[0-9a-f]{4,}\*/"

    def count(pattern: str) -> int:
        return len(re.findall(pattern, assembly, re.MULTILINE))

    return {
        "registers": registers,
        "spilled": sum(spills),
        "shared": kernel.metadata.shared,
        "threads": lanes * kernel.metadata.num_warps,
        "instructions": count(line),
        "matrix": count(rf"\b{MATRIX[arch]}"),
        "loads": count(rf"\b{GLOBAL_LOAD.get(arch, '(?:LDG|LDGSTS|UTMALDG)')}"),
        "stores": count(rf"\b{GLOBAL_STORE.get(arch, 'STG')}"),
    }


def dumped(cubin: bytes) -> tuple[str, str]:
    """(resource usage, SASS) of a cubin, by the tool inside the triton wheel."""
    tool = triton.knobs.nvidia.cuobjdump.path
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, sass = (
            subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    return usage, sass
