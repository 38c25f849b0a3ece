"""Every process finds the same tests: pytest-xdist stops where two of its workers do not."""

import pytest
from collected import collected_elsewhere


@pytest.mark.slow
def test_names_depend_on_nothing_outside(request):
    """Those of this run, whatever it was asked for and in whatever order."""
    names = {item.nodeid for item in request.session.items}
    assert names - set(collected_elsewhere("tests")) == set()
