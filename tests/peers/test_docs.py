"""The Python of docs/drop-in.md runs."""

import re
from pathlib import Path

import pytest

TEXT = (Path(__file__).parents[2] / "docs" / "drop-in.md").read_text(encoding="utf-8")
BLOCKS = {
    f"{section.splitlines()[0]} {i}": block
    for section in TEXT.split("\n## ")[1:]
    for i, block in enumerate(re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL))
}


@pytest.mark.parametrize("name", BLOCKS)
def test_block(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(BLOCKS[name], "docs/drop-in.md", "exec"), {})


def test_every_peer_has_a_block():
    assert len(BLOCKS) == 6
