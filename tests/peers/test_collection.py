"""Every process finds the same tests of this folder."""

import pytest
from collected import collected_elsewhere


@pytest.mark.slow
def test_names_depend_on_nothing_outside(request):
    names = {item.nodeid for item in request.session.items if item.nodeid.startswith("tests/peers/")}
    assert names - set(collected_elsewhere("tests/peers")) == set()
