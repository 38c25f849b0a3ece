"""What pytest finds at another time, in another time zone, under another hash seed, by a user without a home."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ELSEWHERE = {"PYTHONHASHSEED": "1", "TZ": "Asia/Kathmandu", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}


def collected_elsewhere(folder: str) -> list[str]:
    """The names of all tests in a folder of the repository, slow ones too."""
    left_out = ("HOME", "PYTEST_ADDOPTS")
    environment = {name: value for name, value in os.environ.items() if name not in left_out and "XDIST" not in name}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests"), environment.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "", "-p", "another_day"]
    command += ["-p", "no:cacheprovider", "-p", "no:xdist", folder]
    done = subprocess.run(command, cwd=ROOT, env=environment | ELSEWHERE, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return [line for line in done.stdout.splitlines() if "::" in line]
