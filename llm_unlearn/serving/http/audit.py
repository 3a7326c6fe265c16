"""The audit log: how every answer was served, in lines that are only ever appended.

RUN/serving/audit-<replica>.jsonl holds ids, epochs, tallies and times: no prompt, text, token or
name. A line is one write to the kernel, so that killing the server loses none that was written; it
is not waited for until it is on the disk. A line that cannot be written (a full disk) raises, and
what it was to tell of is refused: no answer leaves that the log does not know.
"""

import json
import os
import re
import threading
import time
from pathlib import Path
from typing import Any

from llm_unlearn.errors import RunError, UserError

FOLDER = "serving"
CLOSED = -1  # no file has this number, so that writing to it fails


class AuditLog:
    """Appends lines to one replica's log; from any thread.

    Args:
        run: the run directory.
        replica: letters, digits, dots and dashes.

    Raises:
        UserError: the replica's name cannot be part of a file's.
        RunError: the file cannot be written.
    """

    def __init__(self, run: Path, replica: str):
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", replica):
            raise UserError(
                f"--replica {replica!r}: expected letters, digits, dots and dashes (at most 100)"
            )
        self.path = run / FOLDER / f"audit-{replica}.jsonl"
        self.lock = threading.Lock()
        try:
            self.path.parent.mkdir(mode=0o700, exist_ok=True)
            flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            self.descriptor = os.open(self.path, flags, 0o600)
            os.fchmod(self.descriptor, 0o600)
            self.is_torn = self._ends_torn()
        except OSError as error:
            raise RunError(f"cannot write the audit log {self.path}: {error.strerror}") from None

    def _ends_torn(self) -> bool:
        """Did whoever wrote last die within a line?"""
        size = os.fstat(self.descriptor).st_size
        return size > 0 and os.pread(self.descriptor, 1, size - 1) != b"\n"

    def write(self, kind: str, **told: Any) -> None:
        """Append one line.

        Raises:
            OSError: it is not there, or only the beginning of it.
        """
        line = {"time": round(time.time(), 6), "kind": kind} | told
        data = json.dumps(line, separators=(",", ":")).encode() + b"\n"
        with self.lock:
            data = b"\n" * self.is_torn + data
            written = os.write(self.descriptor, data)
            self.is_torn = written < len(data)
            if self.is_torn:
                raise OSError(f"only {written} of {len(data)} bytes were written")

    def close(self) -> None:
        """Nothing can be written from then on; repeatable."""
        with self.lock:
            if self.descriptor != CLOSED:
                os.close(self.descriptor)
            self.descriptor = CLOSED


def read_audit(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a log; one that a crash or a full disk tore is left out."""
    lines = []
    for line in path.read_bytes().split(b"\n"):
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines
