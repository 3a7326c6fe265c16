"""A trained stub run, and a copy of it beside a Hub of its own."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hub.published import World, make_trained, published


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_trained(tmp_path_factory.mktemp("published") / "run")


@pytest.fixture
def world(trained: Path, tmp_path: Path) -> Iterator[World]:
    with published(trained, tmp_path / "run") as made:
        yield made
