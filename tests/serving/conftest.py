"""A trained stub run, copied for who changes it."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serving.servers import closed_afterwards, make_trained_run


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_trained_run(tmp_path_factory.mktemp("serving") / "run")


@pytest.fixture(autouse=True)
def _servers_of_a_test() -> Iterator[None]:
    with closed_afterwards():
        yield


@pytest.fixture(autouse=True, scope="module")
def _servers_of_a_module() -> Iterator[None]:
    with closed_afterwards():
        yield


@pytest.fixture
def run_path(trained_run: Path, tmp_path: Path) -> Path:
    # Without what other tests' servers have logged in it.
    ignored = shutil.ignore_patterns("serving")
    shutil.copytree(trained_run, tmp_path / "run", symlinks=True, ignore=ignored)
    return tmp_path / "run"
