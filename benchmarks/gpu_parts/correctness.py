"""`pytest -m gpu`, each file in a process of its own, so that a crash in one does not spoil the others.

Without the memory checker's test, which takes minutes: `pytest -m gpu -k memory_checker` runs it.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from benchmarks.measure import ROOT, Row
from benchmarks.record import Record, parser, table_of

LEFT_OUT = ("-k", "not memory_checker")
PYTEST = (sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "--color=no", *LEFT_OUT)
# Most of the time is compilation on the CPU. Tests at real sizes need the GPU's memory for themselves.
AT_ONCE, ALONE = 8, "tests/gpu/"
REHEARSED = "tests/kernels/test_rounded_rows.py"
OUTCOMES = ("PASSED", "FAILED", "ERROR", "SKIPPED")
COLUMNS = {name: f"{{{name}}}" for name in ("name", *OUTCOMES, "failures", "ended", "seconds")}


def main() -> None:
    args = parser(__doc__, "--out", "--device", "--rehearse", "--within", rounds=1).parse_args()
    record = Record(args, table_of(COLUMNS))
    files = [REHEARSED] if args.rehearse else test_files()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for row in pool.map(partial(tested, record), [name for name in files if not name.startswith(ALONE)]):
            record.add(row)
    for name in files:
        if name.startswith(ALONE):
            record.add(tested(record, name))
    bad = [row for row in record.rows if not row["ended"] or row["failures"]]
    if bad:
        sys.exit("; ".join(f"{row['name']}: {row['failures'] or 'did not end'}" for row in bad))


def test_files() -> list[str]:
    """Those with tests marked `gpu`; the largest first."""
    # a file that needs what is not installed here is no reason to leave out the others
    command = [*PYTEST, "--collect-only", "--continue-on-collection-errors", "-qq", "tests"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    found = re.findall(r"^(tests/\S+\.py): (\d+)$", done.stdout, re.MULTILINE)
    if not found:
        sys.exit(f"pytest --collect-only: {done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return [name for name, count in sorted(found, key=lambda item: -int(item[1]))]


def tested(record: Record, name: str) -> Row:
    """Outcomes of one file's tests, whether or not pytest came to its end."""
    start = time.perf_counter()
    log = record.out.parent / "tests" / (name.replace("/", ".") + ".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    process = subprocess.Popen(
        [*PYTEST, "-v", "--tb=short", "--maxfail=10", name], cwd=ROOT, stdout=log.open("w"), stderr=subprocess.STDOUT
    )
    try:
        process.wait(None if record.rehearse else max(1.0, record.left))
    except subprocess.TimeoutExpired:
        process.kill()
    text = log.read_text(errors="replace")
    outcomes = re.findall(rf"^(\S+::\S.*?) ({'|'.join(OUTCOMES)})\b", text, re.MULTILINE)
    return {
        "name": name,
        **{kind: sum(outcome == kind for _, outcome in outcomes) for kind in OUTCOMES},
        "failures": ", ".join(test.split("::", 1)[1] for test, outcome in outcomes if outcome in ("FAILED", "ERROR")),
        "ended": bool(re.search(r"^=+ .* in [\d.]+s", text, re.MULTILINE)),
        "seconds": round(time.perf_counter() - start, 1),
    }


if __name__ == "__main__":
    main()
