"""The reference models of every family."""

import pytest

from tests.models.hf.references import (
    REFERENCES,
    Reference,
    build_reference,
)


@pytest.fixture(scope="module", params=REFERENCES)
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    folder = tmp_path_factory.mktemp(request.param)
    return Reference(build_reference(REFERENCES[request.param], folder), folder)
