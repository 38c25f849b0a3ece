"""benchmarks/gpu.py end to end, as on the day a GPU is at hand, in the interpreter and at tiny sizes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_rehearsal(tmp_path):
    command = [sys.executable, "benchmarks/gpu.py", str(tmp_path), "--rehearse"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert len(done.stdout.splitlines()) < 100
    for part in ("correctness", "ceilings", "kernels", "steps"):
        result = json.loads((tmp_path / f"{part}.json").read_text())
        assert result["rows"]
        assert {"device", "torch", "triton", "date", "command"} <= set(result)
