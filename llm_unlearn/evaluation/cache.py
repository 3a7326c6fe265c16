"""What an interrupted evaluation already found, by digest of model, conventions and rows.

Never by name: another model, profile or data has other digests and finds nothing. The entries can hold
what a model said about people, so they are readable by their owner only, and removed at the end.
"""

import json
from pathlib import Path
from typing import Any

from llm_unlearn import files
from llm_unlearn.data.records import digest

NAME = ".partial"


class BatchCache:
    """Finished batches of one model under one configuration.

    Args:
        directory: of the evaluation; entries go to a hidden folder in it.
        binding: what the entries depend on besides what is put to the model.
    """

    def __init__(self, directory: Path, binding: Any):
        self._folder = directory / NAME
        self._binding = binding

    def _path(self, key: Any) -> Path:
        return self._folder / f"{digest([self._binding, key])}.json"

    def get(self, key: Any) -> Any | None:
        """What was put there; None if nothing was, or if a crash damaged it."""
        try:
            return json.loads(self._path(key).read_bytes())
        except (OSError, ValueError):
            return None

    def put(self, key: Any, value: Any) -> None:
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        files.write_bytes(self._path(key), json.dumps(value).encode())


def forget_batches(directory: Path) -> None:
    """Remove all entries of a finished evaluation."""
    if (directory / NAME).exists():
        files.remove(directory / NAME)
