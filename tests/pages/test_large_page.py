"""A page of 16,384 features stays usable. What it took is recorded with the test, and judged by nobody."""

import pytest
from browser import logged, opened, until

from benchmarks.pages import N_FEATURES, TIMED, large_page, measured


@pytest.mark.slow
def test_a_large_table_has_few_rows_in_the_page_and_finds_all(tmp_path, record_property):
    file = large_page(tmp_path, "top:200")
    with opened() as browser:
        for name, value in measured(browser, file).items():
            record_property(name, value)
        assert browser.execute_script(TIMED, "")[1] == N_FEATURES
        browser.execute_script("document.getElementById('table').scrollTop = 30 * 12000")
        until(browser, "return document.querySelector('tr[data-row]').ariaRowIndex > 11000")
        assert browser.execute_script("return document.querySelectorAll('tr[data-row]').length") < 100
        last = browser.execute_script("table.sort('feature', true); table.select(3); return table.shown[0]")
        assert last == N_FEATURES - 1
        assert browser.execute_script("return document.querySelector('tr.selected').ariaRowIndex") == str(
            N_FEATURES - 3
        )
        assert browser.execute_script(TIMED, "16383")[1] == 1
        assert logged(browser) == []
