"""A chat model, and runs that began with it."""

import pytest

from tests.tools.run_folders import LORA, write_lm, write_run


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """A folder with the models `lm` and `plain` (no chat template) and the runs `whole` and `lora`."""
    path = tmp_path_factory.mktemp("made")
    write_lm(path / "lm")
    write_lm(path / "plain", template=None, seed=9)
    write_run(path / "whole", path / "lm")
    write_run(path / "lora", path / "lm", lora=LORA)
    return path
