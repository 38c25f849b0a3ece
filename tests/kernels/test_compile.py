"""Every kernel in every blessed configuration, compiled for its architectures without a GPU.

The compiler cannot run in a process whose Triton is in interpreter mode, hence the process of its own.
"""

import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

pytest.importorskip("triton")

import torch
import triton

from benchmarks.compiled.cases import CASES
from benchmarks.compiled.launch import KB, SHARED, SM_REGISTERS, is_aligned, launches
from benchmarks.compiled.table import TABLES, committed, launched
from sampled_sae.kernels import column_scores, configs

ROOT = Path(__file__).parents[2]


# of the others what the table is not of; with another Triton all of them, which make test asks of AMD's too
ALWAYS = ("sm_90",)


def compiled(arch, folder):
    """Resources by case."""
    out = folder / "compiled.json"
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.compiled", "--arch", arch, "--out", str(out)]
    command += [] if arch in ALWAYS else ["--known"]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    if done.stdout:
        warnings.warn(done.stdout, stacklevel=1)
    return json.loads(out.read_text())["archs"][arch]


@pytest.mark.slow
@pytest.mark.every_triton
@pytest.mark.parametrize("arch", SHARED)
def test_what_the_compiler_makes(arch, tmp_path):
    usages = compiled(arch, tmp_path)
    nothing_spills_and_all_fits(arch, usages)
    products_use_matrix_units_and_nothing_else_does(usages)
    if arch != "gfx942":
        small_d_leaves_room_for_two_blocks(arch, usages)
    the_committed_table_is_this(arch, usages)
    if arch in ("sm_90", "sm_100"):
        operands_come_by_descriptors(arch, usages)


def nothing_spills_and_all_fits(arch, usages):
    for name, usage in usages.items():
        assert usage["spilled"] == 0, name
        assert usage["shared"] <= SHARED[arch][0], name
        if arch != "gfx942":
            assert usage["registers"] * usage["threads"] <= SM_REGISTERS, name


def products_use_matrix_units_and_nothing_else_does(usages):
    assert any(usage["wants matrix"] for usage in usages.values())
    for name, usage in usages.items():
        assert (usage["matrix"] > 0) == usage["wants matrix"], name


def small_d_leaves_room_for_two_blocks(arch, usages):
    """What the table of the score promises on NVIDIA: one block's products hide the other's epilogue."""
    usage = usages.get("column_scores: bf16 small d")
    if usage is None:  # operands by descriptors, in larger tiles
        assert "column_scores: descriptors bf16 entropy" in usages
        return
    assert 2 * (usage["shared"] + KB) <= SHARED[arch][1]
    assert 2 * usage["registers"] * usage["threads"] <= SM_REGISTERS


def operands_come_by_descriptors(arch, usages):
    """Some loads of tiles and two of biases, where a thread's own loads would be dozens."""
    assert usages["column_scores: descriptors bf16 l2"]["loads"] <= 12


def the_committed_table_is_this(arch, usages):
    """A change of the code that changes the machine code shows in a diff: `python -m benchmarks.compiled`."""
    if f"Triton {triton.__version__}\n" in (TABLES / f"{arch}.md").read_text():
        rows = committed(arch)
        assert {name: {c: usage[c] for c in rows[name]} for name, usage in usages.items()} == rows


def test_every_kernel_that_is_launched_has_cases():
    sources = {path.stem: path.read_text() for path in (ROOT / "kernels").glob("*.py") if path.stem != "configs"}
    launched = {name: set(re.findall(r"launch\(\s*(\w+)", text)) for name, text in sources.items()}
    cases = {file: {case.kernel.fn.__name__ for case in of.values()} for file, of in CASES.items()}
    assert {name: kernels for name, kernels in launched.items() if kernels} == cases


@pytest.mark.parametrize("arch", SHARED)
def test_every_case_is_launched(arch):
    """Scores in 16 bits have one kernel for GPUs with tensor descriptors and one for others."""
    missing = {f"{file}: {name}" for file, of in CASES.items() for name, case in of.items() if not launched(case, arch)}
    scores = {f"column_scores: {name}" for name in CASES["column_scores"]}
    by_descriptors = {name for name in scores if "descriptors" in name}
    by_pointers = {f"column_scores: {name}" for name in ("bf16 small d", "bf16 large d", "fp16 tail of d")}
    if arch == "sm_100":
        by_pointers.add("column_scores: descriptors bf16 d of one tile")
    assert missing == (by_pointers if arch in ("sm_90", "sm_100") else by_descriptors)


@pytest.mark.parametrize(("B", "d", "given"), [(32, 768, {"B", "stride_x"}), (33, 768, {"stride_x"}), (32, 500, {"B"})])
def test_a_case_is_the_launch_that_the_launcher_makes(B, d, given):
    """Its arguments by name, the configuration of the architecture, and what Triton would know to be a multiple."""
    x, W = (torch.empty(n, d, device="meta", dtype=torch.bfloat16) for n in (B, 96))
    first, fold = launches(lambda: column_scores.column_statistics(x, W, None, "l2"), "sm_80")
    assert first.kernel is column_scores.column_partials_kernel
    assert fold.kernel is column_scores.fold_partials_kernel
    assert first.config is configs.column_scores_config("sm_80", torch.bfloat16, d)
    assert first.arguments["x"] is x
    assert first.arguments["b"] is None
    assert first.constexprs["FAST_LOG"]
    assert first.constexprs["D"] == d
    assert {name for name in ("B", "stride_x") if is_aligned(first.arguments[name])} == given
    assert first.wants_matrix("sm_80")
    assert not fold.wants_matrix("sm_80")
