import pytest
from workers import Workers


@pytest.fixture(scope="session")
def workers():
    started = Workers()
    yield started
    started.close()
