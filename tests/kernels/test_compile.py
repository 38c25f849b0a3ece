"""Every blessed configuration, compiled for its architecture without a GPU.

The compiler cannot run in a process whose Triton is in interpreter mode: this file, run as a script with an
architecture, compiles its kernels in a fresh process and writes what it found as JSON.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
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
# operand type, d, score, whether bias and scale are there
CASES = {
    "bf16 small d": ("bf16", 768, "entropy", True),
    "bf16 large d": ("bf16", 4096, "entropy", True),
    "fp16 tail of d": ("fp16", 500, "l2", False),
    "fp32 small d": ("fp32", 768, "entropy", True),
    "fp32 large d": ("fp32", 4096, "entropy", True),
}


def compile_kernel(arch, kernel, pointers, integers, config, **constexprs):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    target = GPUTarget("hip", arch, 64) if arch == "gfx942" else GPUTarget("cuda", int(arch[3:]), 32)
    constexprs |= config.kwargs
    # as at launch: None is a constexpr, aligned tensors and strides are known to be multiples of 16
    signature = pointers | dict.fromkeys(integers, "i32") | dict.fromkeys(constexprs, "constexpr")
    aligned = [name for name in kernel.arg_names if signature[name] != "constexpr" and name not in ("B", "T")]
    attrs = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(kernel, {name: signature[name] for name in kernel.arg_names}, constexprs, attrs)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True}
    return triton.compile(source, target=target, options=options)


def compile_partials(arch, operand, d, score, has_vectors):
    import torch

    from sampled_sae.kernels import column_scores, configs

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[operand]
    (config,) = configs.column_scores_configs(arch, dtype, d)
    return compile_kernel(
        arch,
        column_scores.column_partials_kernel,
        {"x": f"*{operand}", "W": f"*{operand}", "b": "*fp32", "scale": "*fp32", "partials": "*fp32"},
        ("B", "F", "stride_x", "stride_W"),
        config,
        D=d,
        SCORE=score,
        HAS_BIAS=has_vectors,
        HAS_SCALE=has_vectors,
        FAST_LOG=arch != "gfx942",
        **({} if has_vectors else {"b": None, "scale": None}),
    )


def compile_fold(arch):
    from sampled_sae.kernels import column_scores, configs

    pointers = {"partials": "*fp32", "statistics": "*fp32"}
    kernel = column_scores.fold_partials_kernel
    return compile_kernel(arch, kernel, pointers, ("T", "F"), configs.FOLD, CEIL_T=64)


def resources(kernel, arch):
    """Registers a thread, bytes spilled or on the stack, shared memory, threads, and matrix instructions."""
    if arch == "gfx942":
        assembly = kernel.asm["amdgcn"]
        names = ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size")
        registers, *spills = (int(re.search(rf"\.{name}:\s+(\d+)", assembly)[1]) for name in names)
        lanes = 64
    else:
        tool = triton.knobs.nvidia.cuobjdump.path
        with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
            cubin.write(kernel.asm["cubin"])
            cubin.flush()
            usage, assembly = (
                subprocess.run([tool, option, cubin.name], capture_output=True, text=True, check=True).stdout
                for option in ("-res-usage", "-sass")
            )
        registers, *spills = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL"))
        lanes = 32
    return {
        "registers": registers,
        "spilled": sum(spills),
        "shared": kernel.metadata.shared,
        "threads": lanes * kernel.metadata.num_warps,
        "matrix": len(re.findall(rf"\b{MATRIX[arch]}", assembly)),
    }


@pytest.fixture(scope="module", params=list(SHARED))
def compiled(request, tmp_path_factory):
    """The architecture, and the resources of each case compiled for it."""
    arch = request.param
    out = tmp_path_factory.mktemp("compiled") / f"{arch}.json"
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), env.get("PYTHONPATH")]))
    command = [sys.executable, __file__, arch, str(out)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return arch, json.loads(out.read_text())


@pytest.mark.parametrize("case", [*CASES, "fold"])
def test_nothing_spills_and_all_fits(case, compiled):
    arch, found = compiled
    usage = found[case]
    assert usage["spilled"] == 0
    assert usage["shared"] <= SHARED[arch][0]
    if arch != "gfx942":
        assert usage["registers"] * usage["threads"] <= SM_REGISTERS


@pytest.mark.parametrize("case", CASES)
def test_products_use_matrix_units(case, compiled):
    """All but IEEE fp32, which NVIDIA's tensor cores do not have."""
    arch, found = compiled
    has_matrix = CASES[case][0] != "fp32" or arch == "gfx942"
    assert (found[case]["matrix"] > 0) == has_matrix


def test_small_d_leaves_room_for_two_blocks(compiled):
    """What the table promises on NVIDIA: one block's products hide the other's epilogue."""
    arch, found = compiled
    if arch == "gfx942":
        pytest.skip("not promised on AMD")
    usage = found["bf16 small d"]
    assert 2 * (usage["shared"] + KB) <= SHARED[arch][1]
    assert 2 * usage["registers"] * usage["threads"] <= SM_REGISTERS


if __name__ == "__main__":
    arch, out = sys.argv[1:]
    kernels = {name: compile_partials(arch, *case) for name, case in CASES.items()} | {"fold": compile_fold(arch)}
    Path(out).write_text(json.dumps({name: resources(kernel, arch) for name, kernel in kernels.items()}))
