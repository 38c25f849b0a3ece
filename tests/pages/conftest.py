import pytest
from page_makers import make_run

from sampled_sae.training import batches


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    """See `make_run`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches, "CALIBRATION_TOKENS", 600)
        return make_run(tmp_path_factory.mktemp("look"))
