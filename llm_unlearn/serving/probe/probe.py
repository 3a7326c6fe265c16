"""Is anything left of what was deleted? Looks at a run on disk, or at a server, and says what it saw.

`verify` says whether a run is what it claims. A probe looks for residue: every adapter that exists, by the
digest of its content, wherever one can be; and what cannot be looked at is told, and never counts as clean.
"""

import time
from pathlib import Path

from llm_unlearn.errors import UserError
from llm_unlearn.exact.store import RunDirectory
from llm_unlearn.serving.outside.http_client import SECONDS, Server, read_token
from llm_unlearn.serving.probe.answers import Asking, compare_answers
from llm_unlearn.serving.probe.clean import Clean, retired_names, served_now
from llm_unlearn.serving.probe.disk import Disk
from llm_unlearn.serving.probe.expected import Expected
from llm_unlearn.serving.probe.looks import Probe
from llm_unlearn.serving.probe.processes import look_at_open_files
from llm_unlearn.serving.probe.server import look_at_server

ATTEMPTS, PAUSE_SECONDS = 3, 0.5


def probe(
    target: str,
    run: Path | None = None,
    served: Path | None = None,
    token_file: Path | None = None,
    asking: Asking | None = None,
    seconds: float = SECONDS,
) -> Probe:
    """What is left of what was deleted: in a run (`probe_run`), or at an address.

    Args:
        run: the run that a server serves, with which what it holds is compared; or
        served: what `probe RUN --json` printed where the run is.
        token_file: holds a bearer token; LLM_UNLEARN_TOKEN by default.
        asking: prompts whose answers are compared.
        seconds: for one question.

    Raises:
        UserError: nothing to compare with, or the server wants another token.
        RunError: the server cannot be reached, or is something else.
    """
    if "://" not in target:
        if any(value is not None for value in (run, served, asking)):
            raise UserError(
                f"{target} is no address: --run, --served and --prompts go with a server"
            )
        return probe_run(Path(target))
    if (run is None) == (served is None):
        raise UserError("a server is compared with a run: give --run RUN, or --served FILE")
    server = Server(target, read_token(token_file), seconds)
    directory = RunDirectory.open(run) if run is not None else None
    return _probe_server(server, directory, served, asking)


def probe_run(path: Path) -> Probe:
    """Everything of a run on this machine.

    A run that changes while it is looked at is looked at again, so that nothing is found that was
    about to go.

    Raises:
        UserError: there is no run.
    """
    run = RunDirectory.open(path)
    for left in reversed(range(ATTEMPTS)):
        found = _probe_run(run)
        if found.is_clean or not left or run.ledger.count() == found.epoch:
            return found
        time.sleep(PAUSE_SECONDS)
    raise AssertionError("one attempt is the last")


def _probe_run(run: RunDirectory) -> Probe:
    clean = Clean.of(run)
    disk = Disk(run, clean)
    looks = [*disk.looks(), look_at_open_files(run, clean)]
    served = served_now(run, clean)
    retired = retired_names(run, [adapter.name for adapter in served])
    return Probe(
        str(run.path),
        clean.epoch,
        tuple(looks),
        tuple(disk.adapters),
        tuple(served),
        tuple(retired),
    )


def _probe_server(
    server: Server, run: RunDirectory | None, served: Path | None, asking: Asking | None
) -> Probe:
    expected = _expected(run, served)
    looks, adapters = look_at_server(server, expected)
    for _ in range(ATTEMPTS):
        if not any(look.problems for look in looks) or _stands_still(expected):
            break
        time.sleep(PAUSE_SECONDS)  # a deletion is being carried out: a server may just follow it
        expected = _expected(run, served)
        looks, adapters = look_at_server(server, expected)
    if asking is not None:
        looks.append(compare_answers(server, run.path if run is not None else None, asking))
    now = tuple(expected.adapters.values())
    return Probe(server.url, expected.epoch, tuple(looks), tuple(adapters), now, expected.retired)


def _stands_still(expected: Expected) -> bool:
    run, clean = expected.run, expected.clean
    if run is None or clean is None:
        return True
    return run.ledger.count() == expected.epoch and not clean.is_pending


def _expected(run: RunDirectory | None, served: Path | None) -> Expected:
    if run is not None:
        return Expected.of(run)
    assert served is not None
    return Expected.from_file(served)
