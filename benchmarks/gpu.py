"""Everything for one visit to a GPU, in under 9 minutes: correctness first, then speed, then tuning.

    python benchmarks/gpu.py OUTDIR                 all parts
    python benchmarks/gpu.py OUTDIR --only steps score
    python benchmarks/gpu.py OUTDIR --rehearse      tiny sizes in Triton's interpreter, to see that nothing is broken

Each part is a command of its own, so that a crash in one neither loses nor spoils the others, and writes
OUTDIR/<part>.json and .md row by row; what it printed is in <part>.log. A table of under 100 lines comes last.
Times are medians with the 20th and 80th percentile over rounds that go through all candidates in turn: of kernels
alone, with the L2 cache emptied before them; of whole steps with the host's work, as whoever trains sees it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.gpu_parts.summary import summary, with_predictions

ROOT = Path(__file__).resolve().parent.parent
# seconds for each part, the last gets what the others leave; the command, and more of it for a GPU
PARTS: dict[str, tuple[int, list[str], list[str]]] = {
    "correctness": (150, ["gpu_parts.correctness"], []),
    "ceilings": (20, ["operations", "--set", "ceilings"], ["--rounds", "15", "--seconds", "3"]),
    "score": (50, ["operations", "--set", "score"], ["--rounds", "15", "--seconds", "3"]),
    "kernels": (90, ["operations", "--set", "gpu"], ["--rounds", "11", "--seconds", "0.3"]),
    "steps": (75, ["steps", "gpu_steps", "--here"], ["--rounds", "15"]),
    "inference": (40, ["inference"], ["--rounds", "9"]),
    "peers": (40, ["steps", "peer_steps", "--here"], ["--rounds", "15", "--workloads", "Pythia-160M, wide"]),
    "tuning": (50, ["gpu_parts.tuning"], ["--rounds", "9"]),
}
# for a part to end by itself after its time
GRACE = 10
IN_ALL = 525
LONGEST_TABLE = 99


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for the results")
    parser.add_argument("--only", choices=list(PARTS), nargs="+", default=list(PARTS), help="these parts")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes in the interpreter, without a GPU")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    table: list[str] = []
    start, failed = time.monotonic(), 0
    for part in args.only:
        begun = time.monotonic()
        left = math.inf if args.rehearse else IN_ALL - GRACE - (begun - start)
        share = left if part == args.only[-1] else min(PARTS[part][0], left)
        trouble = run_part(part, args.out.resolve(), share, args.rehearse)
        failed += trouble is not None
        table += report(part, args.out, trouble, time.monotonic() - begun)
    if len(table) > LONGEST_TABLE:
        table = [*table[: LONGEST_TABLE - 1], f"... {len(table) - LONGEST_TABLE + 1} more lines"]
    text = "\n".join(table)
    (args.out / "table.txt").write_text(text + "\n", encoding="utf-8")
    print(text)
    return 1 if failed else 0


def command_of(part: str, out: Path, seconds: float, rehearse: bool) -> list[str]:
    """The module of a part and its arguments."""
    _, (module, *arguments), on_a_gpu = PARTS[part]
    command = [f"benchmarks.{module}", "--out", str(out / f"{part}.json"), *arguments]
    command += ["--device", "cpu", "--rehearse", "--rounds", "1"] if rehearse else ["--device", "cuda", *on_a_gpu]
    command += ["--impl", "triton"] if module in ("operations", "inference") else []
    return [*command, "--within", f"{seconds:.0f}"]


def run_part(part: str, out: Path, seconds: float, rehearse: bool) -> str | None:
    """What went wrong, if anything did."""
    (out / f"{part}.json").unlink(missing_ok=True)
    if seconds < 1:
        return "no time left"
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    interpreter = {"TRITON_INTERPRET": "1"} if rehearse else {}
    print(f"{part} ...", file=sys.stderr, flush=True)
    with (out / f"{part}.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *command_of(part, out, seconds, rehearse)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": path, **interpreter},
            stdout=log,
            stderr=subprocess.STDOUT,
            # with the processes it starts, which would slow the next part down if they outlived it
            start_new_session=True,
        )
        try:
            status = process.wait(None if rehearse else seconds + GRACE)
        except subprocess.TimeoutExpired:
            return f"stopped after {seconds + GRACE:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if status == 0:
        return None
    written = (out / f"{part}.log").read_text(errors="replace").strip().splitlines()
    return f"exit status {status}: {written[-1][:200] if written else ''}"


def report(part: str, out: Path, trouble: str | None, took: float) -> list[str]:
    """The part's lines in the table."""
    lines = [f"{part} ({took:.0f} s)" + (f": FAILED, {trouble} (see {part}.log)" if trouble else "")]
    try:
        found = json.loads((out / f"{part}.json").read_text())
        rows = with_predictions(found["rows"], found["device"]) if part == "steps" else found["rows"]
        lines += [f"  {line}" for line in summary(part, rows)]
    except FileNotFoundError:
        pass
    except Exception as error:
        lines.append(f"  no summary: {type(error).__name__}: {error}")
    return lines


if __name__ == "__main__":
    raise SystemExit(main())
