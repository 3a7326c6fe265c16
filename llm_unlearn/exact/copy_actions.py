"""What a person does about copies: registers one made elsewhere, says that one is gone, deletes an export."""

import os
import re
from contextlib import AbstractContextManager
from pathlib import Path

from llm_unlearn import files
from llm_unlearn.errors import UserError
from llm_unlearn.exact.copies import Copy, find, known, mark_gone, register
from llm_unlearn.exact.served import LINEAGE_NAME, read_lineage
from llm_unlearn.exact.store import RunDirectory

KIND = re.compile(r"[a-z0-9][a-z0-9._-]{0,39}")
LONGEST_PLACE = 4096
DECLARED, DELETED, UNFINISHED = "declared by the operator", "deleted", "never finished"


def add(run: RunDirectory, place: str, kind: str, parent: str | None = None) -> Copy:
    """Register a copy that somebody made outside: a quantised file, an upload, a backup.

    Args:
        place: a path, or any words that say where it is.
        parent: id of the copy that it was made from; what is served now by default.

    Raises:
        UserError: a kind or a place that is none, or an unknown parent.
    """
    if not KIND.fullmatch(kind):
        raise UserError(
            f"--kind {kind!r} is not a word for a kind of copy: give one such as quantised, gguf or backup"
        )
    if not place.strip() or len(place) > LONGEST_PLACE or not place.isprintable():
        raise UserError("--add wants the place of the copy: a path, or words that say where it is")
    is_local = os.path.lexists(place)
    where = os.path.abspath(place) if is_local else place
    of = find(run, parent) if parent is not None else None
    with run.changing("registering a copy of it"):
        return register(run, kind, where, of, is_local=is_local)


def declare_gone(run: RunDirectory, identity: str) -> None:
    """Take somebody's word that a copy does not exist any more.

    Raises:
        UserError: no such copy, or it is still there to be seen.
    """
    copy = find(run, identity)
    if copy.gone is None and copy.is_local and os.path.lexists(copy.place):
        raise UserError(
            f"{copy.place} is still there: delete it first (`--delete {copy.id}` does, where it is a stale "
            "export of this run)"
        )
    mark_gone(run, identity, DECLARED)


def delete_export(run: RunDirectory, identity: str, even_current: bool = False) -> Path:
    """Remove a stale export, or what a crash left of one, and note that it is gone.

    Only a directory that says in its lineage that it is this copy, and holds nothing else.

    Args:
        even_current: remove it although nothing deleted is in it.

    Returns:
        Where it was.

    Raises:
        UserError: no such copy, not stale, not an export of ours, or other files are in it.
    """
    copy = find(run, identity)
    place = Path(copy.place)
    if not copy.is_local:
        raise UserError(
            f"{copy.place} is not on this machine: delete it there, then give --gone {identity}"
        )
    if not copy.is_half_written and not os.path.lexists(place):
        raise UserError(f"{place} is not there any more: nothing was deleted")
    if os.path.lexists(place):
        if copy.gone is None and not even_current and not copy.is_stale(run.wanted()):
            raise UserError(
                f"copy {identity} is current, nothing deleted is in it: remove {place} yourself if you mean it"
            )
        _ensure_ours(copy, place)
    with exporting(run):
        if copy.is_half_written:
            files.remove(copy.half_written)
        if os.path.lexists(place):
            # Out of sight at once; what a crash leaves is found again.
            place.rename(copy.half_written)
            files.remove(copy.half_written)
        mark_gone(run, identity, DELETED)
    return place


def _ensure_ours(copy: Copy, place: Path) -> None:
    if place.is_symlink() or not place.is_dir():
        raise UserError(f"{place} is not a directory that an export wrote: delete it yourself")
    lineage = read_lineage(place)
    if not isinstance(lineage, dict) or lineage.get("copy") != copy.id:
        raise UserError(
            f"{place} does not say that it is copy {copy.id} ({LINEAGE_NAME} there names another or none): "
            "delete it yourself"
        )
    listed = lineage.get("files")
    written = {LINEAGE_NAME, *(listed if isinstance(listed, dict) else ())}
    for folder, _, names in os.walk(place):
        for name in names:
            inside = Path(folder, name).relative_to(place).as_posix()
            if inside not in written:
                raise UserError(
                    f"{place} holds {inside!r}, which the export did not write: move or delete it first"
                )


def exporting(run: RunDirectory) -> AbstractContextManager[None]:
    """Lock of the one process that writes or removes exports; a deletion does not wait for it."""
    return files.locked(run.path / "export.lock", "exporting from it", timeout=1.0)


def remove_unfinished(run: RunDirectory) -> list[Copy]:
    """Remove what crashes left of exports, and note it. The caller holds `exporting`."""
    cut_off = [copy for copy in known(run) if copy.gone is None and copy.is_half_written]
    for copy in cut_off:
        files.remove(copy.half_written)
        if not os.path.lexists(copy.place):
            mark_gone(run, copy.id, UNFINISHED)
    return cut_off
