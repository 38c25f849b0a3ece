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
    stack = ExitStack()
    option = config.getoption
    made = checked(option("--program-order"), option("--order-seed"), not option("--no-poison"))
    config.stash[FINDINGS] = stack.enter_context(made)
    config.add_cleanup(stack.close)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    findings = item.config.stash[FINDINGS]
    findings.test = item.nodeid
    yield
    faults = findings.faults(item.nodeid)
    if faults and not item.config.getoption("--memcheck-go-on"):
        pytest.fail("memcheck:\n" + "\n".join(map(str, faults)), pytrace=False)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    findings = config.stash[FINDINGS]
    for line in findings.lines():
        terminalreporter.write_line(line)
    path = config.getoption("--memcheck-report")
    if path:
        rows = [f._asdict() | {"lanes": n, "first": findings.first[f]} for f, n in sorted(findings.lanes.items())]
        path.write_text(json.dumps({"kernels": findings.kernels, "found": rows}, indent=1) + "\n")
