"""The tables of README and docs are what the result files say; the README's Python runs."""

import re
from pathlib import Path

import pytest
import torch

from benchmarks import report
from sampled_sae import SampledSAE

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
FILES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = {page.name: page.read_text(encoding="utf-8") for page in FILES}
TABLES = [
    (page, file, shown)
    for page, text in PAGES.items()
    for file, shown in re.findall(r"<!-- table: (\S+) -->\n(.*?)<!-- end -->", text, flags=re.DOTALL)
]


def test_the_readme_fits_its_screen():
    """It sells the layer and points on; what is longer has a page in docs/."""
    assert len(README.splitlines()) <= 130
    assert [page for page, _, _ in TABLES].count("README.md") == 1
    assert README.count("![") == 2


def test_the_results_page_shows_tables_that_the_report_makes_each_once():
    shown = [file for page, file, _ in TABLES if page == "results.md"]
    assert len(shown) == len(set(shown)) >= 8
    assert set(shown) <= {str(file.relative_to(ROOT)) for file in report.tables()}


@pytest.mark.parametrize(("page", "file", "shown"), TABLES, ids=lambda value: value if len(value) < 60 else "")
def test_table_equals_its_file(page, file, shown):
    assert shown.strip() == (ROOT / file).read_text(encoding="utf-8").strip()


@pytest.mark.parametrize(("file", "table"), [pytest.param(*one, id=one[0].name) for one in report.tables().items()])
def test_table_file_equals_its_result_file(file, table):
    assert file.read_text(encoding="utf-8") == table


def test_plots_equal_their_result_files():
    pytest.importorskip("matplotlib")
    assert report.stale_plots() == []


def test_python_of_the_readme_trains(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    names = {}
    exec(compile(block, "README.md", "exec"), names)
    sae, start = names["sae"], SampledSAE(names["sae"].cfg)
    start.init_b_dec(names["activations"][:1024])
    assert {n for n, p in start.named_parameters() if torch.equal(p, sae.get_parameter(n))} == set()
    assert float(names["out"].mse) < float(start(names["x"]).mse)
    assert torch.equal(SampledSAE.from_pretrained("my_sae").threshold, sae.threshold)


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", PAGES["family.md"], flags=re.DOTALL))
def test_python_of_the_family_trains(block):
    names = {}
    exec(compile(block, "family.md", "exec"), names)
    sae, optimizer = names["sae"], names["optimizer"]
    assert all(optimizer.state[p]["step"] == 16 for p in sae.parameters())
    assert torch.isfinite(names["out"].loss)
    assert int(sae.calibrated_at) == 16
