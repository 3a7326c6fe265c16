"""Rows of a benchmark, from a folder in its own layout or from the Hub."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llm_unlearn.data.sources import read_hub_rows, read_rows
from llm_unlearn.errors import UserError

SUFFIXES = (".json", ".jsonl")
Row = Mapping[str, Any]

# The rows of one section by its name (`knowmem/forget_qa`); None where the source lacks it.
Read = Callable[[str], Sequence[Row] | None]


def read_folder(folder: Path) -> Read:
    """Read FOLDER/NAME.json (or .jsonl): an array, or an object a line.

    Raises:
        UserError: the folder does not exist.
    """
    if not folder.is_dir():
        raise UserError(f"no such suite or folder: {folder}")

    def read(name: str) -> Sequence[Row] | None:
        found = [folder / f"{name}{suffix}" for suffix in SUFFIXES]
        return next((_read_file(path) for path in found if path.is_file()), None)

    return read


def _read_file(path: Path) -> Sequence[Row]:
    """MUSE stores passages both as objects with a `text` and as bare strings."""
    import json

    if path.suffix == ".json":
        try:
            content = json.loads(path.read_text(encoding="utf-8-sig"))
        except ValueError:
            return read_rows(path)  # an object a line, or a message with the line's number
        if isinstance(content, list) and all(isinstance(row, str) for row in content):
            return [{"text": row} for row in content]
    return read_rows(path)


def read_hub(name: str, is_split: bool) -> Read:
    """Read a Hub dataset.

    Args:
        is_split: a section is `configuration/split` (MUSE), not a configuration (TOFU).
    """

    def read(section: str) -> Sequence[Row] | None:
        config, split = section.split("/") if is_split else (section, "train")
        return read_hub_rows(name, config, split)

    return read
