"""The README's tables are what the result files say, and its Python runs."""

import re
from pathlib import Path

import pytest

from benchmarks import report

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
TABLES = re.findall(r"<!-- table: (\S+) -->\n(.*?)<!-- end -->", README, flags=re.DOTALL)


def test_readme_shows_result_files():
    assert len(TABLES) >= 2


@pytest.mark.parametrize(("file", "shown"), TABLES)
def test_table_equals_its_file(file, shown):
    assert shown.strip() == (ROOT / file).read_text(encoding="utf-8").strip()


@pytest.mark.parametrize(("file", "table"), report.tables().items(), ids=str)
def test_table_file_equals_its_result_file(file, table):
    assert file.read_text(encoding="utf-8") == table


def test_plots_equal_their_result_files():
    pytest.importorskip("matplotlib")
    assert report.stale_plots() == []


def test_python_of_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for block in re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL):
        exec(compile(block, "README.md", "exec"), {})
