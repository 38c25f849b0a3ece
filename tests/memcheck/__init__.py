"""A pytest plugin that looks for what Triton's interpreter hides; see docs/memcheck.md.

TRITON_INTERPRET=1 python -m pytest -p tests.memcheck tests/kernels
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import triton

from .findings import Findings
from .interpreter import ORDERS, checked

FINDINGS = pytest.StashKey[Findings]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("memcheck", "memory checks in Triton's interpreter")
    group.addoption("--program-order", choices=ORDERS, default="forward", help="in which the programs of a launch run")
    group.addoption("--order-seed", type=int, default=0, help="of the shuffled order")
    group.addoption("--no-poison", action="store_true", help="leave torch.empty as it is")
    group.addoption("--memcheck-report", type=Path, help="write what was run and found as JSON")
    group.addoption("--memcheck-go-on", action="store_true", help="report faults without failing the tests")


def pytest_configure(config: pytest.Config) -> None:
    if not triton.knobs.runtime.interpret:
        raise pytest.UsageError("memcheck: sees kernels in the interpreter alone; set TRITON_INTERPRET=1")
    stack = ExitStack()
    option = config.getoption
    made = checked(option("--program-order"), option("--order-seed"), not option("--no-poison"))
    config.stash[FINDINGS] = stack.enter_context(made)
    config.add_cleanup(stack.close)


def watched(item: pytest.Item, when: str) -> Iterator[None]:
    """A part of a test, fixtures too, that fails with the faults that are found in it."""
    findings = item.config.stash[FINDINGS]
    findings.begin(item.nodeid)
    try:
        yield
    except BaseException:
        if findings.faults(new=True):
            item.add_report_section(when, "memcheck", "\n".join(map(str, findings.faults(new=True))))
        raise
    faults = findings.faults(new=True)
    if faults and not item.config.getoption("--memcheck-go-on"):
        pytest.fail("memcheck:\n" + "\n".join(map(str, faults)), pytrace=False)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Iterator[None]:
    yield from watched(item, "setup")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    yield from watched(item, "call")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Iterator[None]:
    yield from watched(item, "teardown")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A process of pytest-xdist sends what it has found."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["memcheck"] = session.config.stash[FINDINGS].plain()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    if sent := getattr(node, "workeroutput", {}).get("memcheck"):
        node.config.stash[FINDINGS].merge(sent)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    findings = config.stash[FINDINGS]
    for line in findings.lines():
        terminalreporter.write_line(line)
    path = config.getoption("--memcheck-report")
    if path:
        path.write_text(json.dumps(findings.plain(), indent=1) + "\n")
