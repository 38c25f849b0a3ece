"""One launch as its launcher makes it, compiled for an architecture without a GPU, and what the compiler made of it."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from benchmarks.replaced import replaced

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
MULTIPROCESSORS = 128
POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclass(frozen=True)
class Launch:
    """A kernel, its configuration, its run-time arguments by name (None for what is absent), and its constexprs."""

    kernel: Any
    config: triton.Config
    arguments: dict[str, Any]
    constexprs: dict[str, Any]

    def asked(self, arch: str) -> tuple[Any, Any, dict[str, Any]]:
        """Source, target and options of the first call with such arguments: what is a multiple of 16 is known to be
        one."""
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        target = GPUTarget("hip", arch, 64) if arch == "gfx942" else GPUTarget("cuda", int(arch[3:]), 32)
        given = {name: value for name, value in self.arguments.items() if value is not None}
        fixed = {name: value for name, value in given.items() if isinstance(value, int) and value == 1}
        absent = dict.fromkeys(self.arguments.keys() - given.keys())
        constexprs = {**absent, **fixed, **self.constexprs, **self.config.kwargs}
        types = {name: type_of(value) for name, value in given.items()} | dict.fromkeys(constexprs, "constexpr")
        names = self.kernel.arg_names
        aligned = [name for name in given.keys() - fixed.keys() if is_aligned(given[name])]
        attrs = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
        source = ASTSource(self.kernel, {name: types[name] for name in names}, constexprs, attrs)
        options = {"num_warps": self.config.num_warps, "num_stages": self.config.num_stages, "enable_fp_fusion": True}
        return source, target, options

    def compile(self, arch: str) -> Any:
        source, target, options = self.asked(arch)
        return triton.compile(source, target=target, options=options)

    def program(self, arch: str) -> str:
        """What the compiler is given, a second's part of its work: the kernel in Triton's own language, and options."""
        from triton._C.libtriton import ir
        from triton.compiler import make_backend

        source, target, options = self.asked(arch)
        backend = make_backend(target)
        parsed = backend.parse_options({**options, **source.parse_options()})
        context = ir.context()
        ir.load_dialects(context)
        backend.load_dialects(context)
        functions, modules = backend.get_codegen_implementation(parsed), backend.get_module_map()
        return f"{options} {source.make_ir(target, parsed, functions, modules, context).str_nodebug()}"

    def wants_matrix(self, arch: str) -> bool:
        """Whether it is a product in 16 bits, or in fp32 on AMD's matrix cores; NVIDIA has IEEE fp32 on FMA units."""
        has_product = {"x", "W", "D"} <= set(self.kernel.arg_names)
        return has_product and (arch == "gfx942" or tensor_of(self.arguments["x"]).dtype != torch.float32)


def tensor_of(value: Any) -> Any:
    """An argument, or the tensor that it describes."""
    return value.base if isinstance(value, TensorDescriptor) else value


def type_of(value: Any) -> str:
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{POINTERS[value.base.dtype][1:]}{list(value.block_shape)}>"
    if isinstance(value, torch.Tensor):
        return POINTERS[value.dtype]
    return "fp32" if isinstance(value, float) else "i32" if value < 2**31 else "i64"


def is_aligned(value: Any) -> bool:
    """Memory that torch allocates is."""
    return isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0)


def launches(call: Callable[[], Any], arch: str) -> list[Launch]:
    """What a call of a launcher with tensors on "meta" would launch on this architecture."""
    found: list[Launch] = []

    def note(kernel: Any, config: triton.Config, grid: Any, args: tuple[Any, ...], **constexprs: Any) -> None:
        found.append(Launch(kernel, config, dict(zip(kernel.arg_names, args)), constexprs))

    known = {"architecture": lambda device: arch, "multiprocessors": lambda device: MULTIPROCESSORS}
    with replaced(launch=note, FAST_LOG=arch != "gfx942", **known):
        call()
    return found


def resources(kernel: Any, arch: str) -> dict[str, int]:
    """What one compiled kernel takes: registers a thread, bytes spilled or on the stack, shared memory,
    threads a block, and counts of instructions (all, matrix, loads from and stores to global memory, and those that
    stand behind the last matrix instruction)."""
    if arch == "gfx942":
        assembly = kernel.asm["amdgcn"]
        # scalar registers spill into lanes of vector registers; what reaches memory is in the private segment
        names = ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")
        registers, *spills = (int(re.search(rf"\.{name}:\s+(\d+)", assembly)[1]) for name in names)
        lanes, line = 64, r"^\s+[vs]_|^\s+(?:global|buffer|flat|ds)_"
        load, store = (f"(?:global|buffer|flat)_{what}" for what in ("load", "store"))
    else:
        assembly = dumped(kernel.asm["cubin"])
        registers, *spills = (int(re.search(rf"{name}:(\d+)", assembly)[1]) for name in ("REG", "STACK", "LOCAL"))
        lanes, line = 32, r"^\s+/\*[0-9a-f]{4,}\*/"
        load, store = "(?:LDG|LDGSTS|UTMALDG)", "STG"

    def count(pattern: str) -> int:
        return len(re.findall(pattern, assembly, re.MULTILINE))

    lines = [m.start() for m in re.finditer(line, assembly, re.MULTILINE)]
    products = [m.start() for m in re.finditer(rf"\b{MATRIX[arch]}", assembly)]
    return {
        "registers": registers,
        "spilled": sum(spills),
        "shared": kernel.metadata.shared,
        "threads": lanes * kernel.metadata.num_warps,
        "instructions": len(lines),
        "behind products": sum(start > products[-1] for start in lines) if products else 0,
        "matrix": count(rf"\b{MATRIX[arch]}"),
        "loads": count(rf"\b{load}"),
        "stores": count(rf"\b{store}"),
    }


def dumped(cubin: bytes) -> str:
    """Resource usage and SASS of a cubin, by the tool inside the triton wheel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
