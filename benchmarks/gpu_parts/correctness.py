"""`pytest -m gpu`, each file in a process of its own, so that a crash in one does not spoil the others.

Without the memory checker's test, which takes minutes: `pytest -m gpu -k memory_checker` runs it.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from benchmarks.gpu_parts.visit import Visit
from benchmarks.measure import ROOT, Row

LEFT_OUT = ("-k", "not memory_checker")
PYTEST = (sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "--color=no", *LEFT_OUT)
# Most of the time is compilation on the CPU. Tests at real sizes need the GPU's memory for themselves.
AT_ONCE, ALONE = 8, "tests/gpu/"
REHEARSED = "tests/kernels/test_chunk_scores.py"
OUTCOMES = ("PASSED", "FAILED", "ERROR", "SKIPPED")


def run(visit: Visit) -> None:
    """Raises RuntimeError where a test fails, or does not end in time."""
    files = test_files()
    if visit.rehearse:
        files = {REHEARSED: files[REHEARSED]}
    with ThreadPoolExecutor(AT_ONCE) as pool:
        together = [name for name in files if not name.startswith(ALONE)]
        for row in pool.map(lambda name: tested(name, visit), together):
            visit.add(row)
    for name in files:
        if name.startswith(ALONE):
            visit.add(tested(name, visit))
    bad = [row for row in visit.rows if not row["ended"] or row["FAILED"] or row["ERROR"]]
    if bad:
        raise RuntimeError("; ".join(f"{row['name']}: {row['failures'] or 'did not end'}" for row in bad))


def test_files() -> dict[str, int]:
    """Number of tests marked `gpu`, by file; the largest first."""
    # a file that needs what is not installed here is no reason to leave out the others
    command = [*PYTEST, "--collect-only", "--continue-on-collection-errors", "-qq", "tests"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    found = {name: int(count) for name, count in re.findall(r"^(tests/\S+\.py): (\d+)$", done.stdout, re.MULTILINE)}
    if not found:
        raise RuntimeError(f"pytest --collect-only: {done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def tested(name: str, visit: Visit) -> Row:
    """Outcomes of one file's tests, whether or not pytest came to its end."""
    start = time.perf_counter()
    log = visit.out / "tests" / (name.replace("/", ".") + ".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as written:
        try:
            limit = None if visit.rehearse else max(1.0, visit.left)
            command = [*PYTEST, "-v", "--tb=short", "--maxfail=10", name]
            subprocess.run(command, cwd=ROOT, stdout=written, stderr=subprocess.STDOUT, timeout=limit)
        except subprocess.TimeoutExpired:
            pass
    text = log.read_text(errors="replace")
    outcomes = re.findall(rf"^(\S+::\S.*?) ({'|'.join(OUTCOMES)})\b", text, re.MULTILINE)
    failures = [test.split("::", 1)[1] for test, outcome in outcomes if outcome in ("FAILED", "ERROR")]
    return {
        "name": name,
        **{kind: sum(outcome == kind for _, outcome in outcomes) for kind in OUTCOMES},
        "failures": ", ".join(failures),
        "ended": bool(re.search(r"^=+ .* in [\d.]+s", text, re.MULTILINE)),
        "seconds": round(time.perf_counter() - start, 1),
    }
