"""A finished run's folder."""

import pytest

from tests.report.pages import finished_run


@pytest.fixture
def run(tmp_path):
    return finished_run(tmp_path / "quickstart")
