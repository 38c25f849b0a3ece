"""The memory checker as a pytest plugin: over the tests of every kernel here, and over tests at fault."""

import json
import os
from pathlib import Path

import pytest
from forked import run_forked

triton = pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="needs Triton's interpreter")
CHEAP = (
    "(optional_arguments and True-True) or unused_slots or (rows_apart and 16) or (listed_features and True-True) or "
    "(largest_indices and 77) or (compact_largest and 50-4) or (nth_largest and True) or threshold_stays or "
    "(other_rows_stand and decayed) or before_the_first_token or reconstruction_of_strided or "
    "rounded_rows_of_strided or undecided_columns_of_strided or (ties_of_what_is_open and True) or "
    "(stretches and decaying) or (lie_between and 67 and True-tails) or (fire_between and 67 and True-tails) or "
    "(of_a_list and 5-3) or (with_a_spread and (tails or 16-4)) or (products_above and 3.0 and tails) or "
    "(more_than_fits and 1000) or (stripes_of_d and tails and bfloat16) or (walk_over_all_tiles and 65) or "
    "gradients_of_any_layout or (smallest_that_is_kept and 40)"
)


def pytest_in(folder, arguments):
    os.chdir(folder)
    return int(pytest.main(arguments))


def run_plugin(tmp_path, *arguments, cwd=ROOT):
    """(exit status, output) of a pytest with it, in a process of its own."""
    options = ["-p", "tests.memcheck", "-p", "no:cacheprovider", "-q", "-n", "0"]
    return run_forked(tmp_path / "log", pytest_in, cwd, [*options, *arguments])


@pytest.mark.slow
def test_every_kernel_is_free_of_faults(tmp_path):
    """In a shuffled order of their programs; the results are those of the tests themselves."""
    report = tmp_path / "report.json"
    # those too of which a few cases run every day
    options = ["-m", "not slow or one_in", "-k", CHEAP, "--program-order", "shuffle", f"--memcheck-report={report}"]
    status, said = run_plugin(tmp_path, "tests/kernels", *options)
    assert status == 0, said[-5000:]
    found = json.loads(report.read_text())
    assert [row for row in found["found"] if not row["kind"].startswith("same program")] == []
    defined = {
        line.split("def ")[1].split("(")[0]
        for file in (ROOT / "kernels").glob("*.py")
        for line in file.read_text().splitlines()
        if line.startswith("def ") and line.split("(")[0].endswith("_kernel")
    }
    assert set(found["kernels"]) == defined


TESTS_AT_FAULT = """
import pytest, torch, triton, triton.language as tl


@triton.jit
def one_kernel(x):
    tl.store(x + 1, 1.0)


@pytest.fixture
def made():
    one_kernel[(1,)](torch.zeros(1))


@pytest.mark.parametrize("case", [1, 2])
def test_bad(case):
    one_kernel[(1,)](torch.zeros(1))


def test_good():
    one_kernel[(1,)](torch.zeros(2))


def test_of_what_is_made(made):
    pass


def test_that_fails_by_itself():
    one_kernel[(1,)](torch.zeros(1))
    raise ValueError
"""
FOUND = "out of bounds: store | one_kernel | test_it.py:7 | elements 1 to 1 of pointer 1 (1,)"


@pytest.fixture
def tests_at_fault(tmp_path):
    """In a folder that is named as the package is."""
    (tmp_path / "triton").mkdir()
    file = tmp_path / "triton" / "test_it.py"
    file.write_text(TESTS_AT_FAULT)
    return str(file)


def test_the_plugin_fails_the_tests_at_fault(tmp_path, tests_at_fault):
    """Each of them, whether another had the same fault before or not, and where a fixture has it."""
    status, said = run_plugin(tmp_path, tests_at_fault, cwd=tmp_path)
    assert status == 1
    assert "3 failed, 1 passed" in said
    assert "ERROR at setup of test_of_what_is_made" in said
    assert said.count(FOUND) >= 5  # of four tests, and in the list at the end; in CI pytest says it in its summary too
    status, said = run_plugin(tmp_path, tests_at_fault, "--memcheck-go-on", cwd=tmp_path)
    assert status == 1
    assert "1 failed, 4 passed" in said


@pytest.mark.slow
def test_the_processes_of_a_run_add_up(tmp_path, tests_at_fault):
    report = tmp_path / "report.json"
    status, said = run_plugin(tmp_path, tests_at_fault, "-n", "2", f"--memcheck-report={report}", cwd=tmp_path)
    assert status == 1
    assert "5 launches of 1 kernels" in said
    found = json.loads(report.read_text())
    assert found["kernels"] == {"one_kernel": 5}
    assert [row["lanes"] for row in found["found"]] == [4]


def compiling_pytest(arguments):
    triton.knobs.runtime.interpret = False
    return int(pytest.main(arguments))


def test_without_the_interpreter_the_plugin_is_an_error(tmp_path, tests_at_fault):
    options = ["-p", "tests.memcheck", "-p", "no:cacheprovider", tests_at_fault]
    status, said = run_forked(tmp_path / "log", compiling_pytest, options)
    assert status == pytest.ExitCode.USAGE_ERROR
    assert "set TRITON_INTERPRET=1" in said
