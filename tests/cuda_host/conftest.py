import pytest
from cuda_build import Builder


@pytest.fixture(scope="session")
def builder(tmp_path_factory) -> Builder:
    return Builder(tmp_path_factory.mktemp("cuda_host"))
