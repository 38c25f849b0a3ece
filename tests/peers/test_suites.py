"""The peers' own tests on our step: none is lost but those with a reason."""

import json
from pathlib import Path

import pytest
from suites import RESULTS, SUITES, compare, markdown_table

# where `make test` unpacks the source distributions
FOLDERS = {path.name: path for path in (Path(__file__).parents[2] / ".venv" / "peers" / "suites").glob("*/")}


def assert_nothing_is_lost(found):
    unexplained = [name for name, reason in found["passes as it is alone"].items() if reason is None]
    assert not unexplained
    assert found["as it is"]["passed"] > 5


def test_sparsify_s_own_tests_pass_on_our_step():
    if "sparsify" not in FOLDERS:
        pytest.skip("make test unpacks sparsify's source distribution")
    assert_nothing_is_lost(compare("sparsify", FOLDERS["sparsify"]))


@pytest.mark.parametrize("suite", SUITES)
def test_the_recorded_runs_lost_nothing(suite):
    assert_nothing_is_lost(json.loads(RESULTS.read_text())[suite])


def test_the_table_is_that_of_the_results():
    assert RESULTS.with_suffix(".md").read_text() == markdown_table(json.loads(RESULTS.read_text()))
