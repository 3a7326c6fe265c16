"""Durable files: written beside, fsynced and renamed, so that each exists whole or not at all."""

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from llm_unlearn.errors import RunError

TEMPORARY_PREFIX = ".tmp-"
LOCK_TIMEOUT_SECONDS = 60.0


def temporary_name(path: Path) -> Path:
    """A fresh sibling of `path`; whatever a crash leaves there is found again by its prefix."""
    return path.with_name(f"{TEMPORARY_PREFIX}{secrets.token_hex(8)}")


def fsync(path: Path) -> None:
    """Bring a file or a directory (its list of names) to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Replace `path` by `data`, durably. A full disk leaves the old file as it was."""
    temporary = temporary_name(path)
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    fsync(path.parent)


def write_many(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Replace files of one directory, durably.

    All are written before the first is waited for: one commit of the file system's journal then
    covers most of them, and a thousand take little longer than one.
    """
    folder.mkdir(exist_ok=True)
    written = {name: temporary_name(folder / name) for name in contents}
    for name, data in contents.items():
        with open(os.open(written[name], os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as out:
            out.write(data)
    for temporary in written.values():
        fsync(temporary)
    for name, temporary in written.items():
        os.replace(temporary, folder / name)
    fsync(folder)


def fsync_tree(path: Path) -> None:
    """Bring a directory, its subdirectories and their files to disk."""
    for folder, _, names in os.walk(path, topdown=False):
        for name in names:
            fsync(Path(folder, name))
        fsync(Path(folder))


def publish_directory(temporary: Path, final: Path) -> None:
    """Make a finished directory visible under its name; its files are on disk before the name is."""
    fsync_tree(temporary)
    os.replace(temporary, final)
    fsync(final.parent)


def publish_link(target: Path, link: Path) -> None:
    """Point the symbolic link `link` at its sibling `target`: one rename, so no reader sees half."""
    temporary = temporary_name(link)
    os.symlink(os.path.relpath(target, link.parent), temporary)
    os.replace(temporary, link)
    fsync(link.parent)


def remove(path: Path) -> None:
    """Unlink a file, a link or a tree. Something already gone is no error: purging is repeatable."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=False)
    else:
        path.unlink(missing_ok=True)


def tree_bytes(path: Path) -> int:
    """Size of all files below a directory; others may write and remove some meanwhile."""
    total = 0
    for folder, _, names in os.walk(path):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += os.lstat(os.path.join(folder, name)).st_size
    return total


@contextlib.contextmanager
def locked(path: Path, holder: str, timeout: float = LOCK_TIMEOUT_SECONDS) -> Iterator[None]:
    """Hold the lock file `path`. It is freed by the operating system when the process dies.

    Args:
        holder: what holds the lock, for the message of whoever waits in vain.

    Raises:
        RunError: the lock stayed taken for `timeout` seconds.
    """
    from filelock import FileLock, Timeout

    try:
        with FileLock(path, timeout=timeout):
            yield
    except Timeout:
        raise RunError(
            f"{path.parent} is busy: another process is {holder}. "
            "Nothing was changed; try again when it has finished."
        ) from None
