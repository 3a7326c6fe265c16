"""A trained stub run, copied for who changes it."""

import shutil
from pathlib import Path

import pytest

from tests.serving.servers import make_trained_run


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_trained_run(tmp_path_factory.mktemp("serving") / "run")


@pytest.fixture
def run_path(trained_run: Path, tmp_path: Path) -> Path:
    # Without what other tests' servers have logged in it.
    ignored = shutil.ignore_patterns("serving")
    shutil.copytree(trained_run, tmp_path / "run", symlinks=True, ignore=ignored)
    return tmp_path / "run"
