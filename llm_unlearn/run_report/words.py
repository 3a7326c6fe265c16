"""Numbers for people."""

import math
from datetime import UTC, datetime

from llm_unlearn.exact.plan import Estimate


def many(number: int, one: str, several: str | None = None) -> str:
    """A number with its noun."""
    return f"{number:,} {one if number == 1 else several or one + 's'}"


def duration(seconds: float) -> str:
    """A span of time for people."""
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"


def moment(seconds: float | None) -> str:
    """A moment in UTC, to the minute; a dash for one that has not come."""
    if seconds is None:
        return "–"
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M")


def estimate(found: Estimate) -> str:
    """A simulated mean with its standard error, to a hundredth of a request where that tells more."""
    if not math.isfinite(found.mean):
        return "–"
    if found.standard_error == 0:
        return f"{found.mean:,.0f}"
    digits = 2 if found.mean < 100 else 1 if found.mean < 1000 else 0
    return f"{found.mean:,.{digits}f} ± {found.standard_error:,.{digits}f}"


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1000
    return f"{count:.3g} TB"
