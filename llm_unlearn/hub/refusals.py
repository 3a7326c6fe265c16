"""Every way in which the Hub or the network refuses, as one line that says what to do."""

import contextlib
from collections.abc import Iterator
from typing import Any

from llm_unlearn.errors import RunError, UserError


@contextlib.contextmanager
def explained(endpoint: str, about: str) -> Iterator[None]:
    """Turns what the Hub's client raises into `UserError` or `RunError`.

    Args:
        about: the repository, or what else is asked for.
    """
    import httpx2
    from huggingface_hub.errors import XetDownloadError

    try:
        yield
    except (
        httpx2.HTTPError, OSError, ValueError, KeyError, RuntimeError, XetDownloadError,
    ) as error:  # fmt: skip
        raise _explanation(endpoint, about, _first_cause(error)) from None


def _explanation(endpoint: str, about: str, cause: BaseException) -> UserError:
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if isinstance(cause, OfflineModeIsEnabled):
        return UserError("the Hub is switched off by HF_HUB_OFFLINE: unset it")
    if isinstance(cause, HfHubHTTPError):
        return _refusal(about, cause)
    if isinstance(cause, httpx2.TimeoutException):
        return RunError(f"{endpoint} did not answer in time: run the same command again")
    if isinstance(cause, FileNotFoundError):
        return RunError(
            "a file went away while it was being sent, as a deletion makes it: run the same command again"
        )
    if isinstance(cause, (httpx2.HTTPError, ConnectionError)):
        return RunError(
            f"cannot reach {endpoint} ({type(cause).__name__}): check the network and run the same "
            "command again"
        )
    return RunError(f"{about}: the Hub's answer makes no sense ({_line(cause)})")


def _first_cause(error: BaseException) -> BaseException:
    """What is behind an error of the client, which wraps those of its threads."""
    import httpx2

    while not isinstance(error, httpx2.HTTPError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _refusal(about: str, error: Any) -> UserError:
    """What a status means, and what to do."""
    from huggingface_hub.errors import (
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    code = error.response.status_code
    if isinstance(error, GatedRepoError):
        return UserError(f"{about} is gated: ask for access on its page")
    if isinstance(error, RevisionNotFoundError):
        return UserError(f"{about} has no such revision")
    if isinstance(error, RepositoryNotFoundError) and code == 404:
        return UserError(f"{about} is not on the Hub, or is private and not this token's")
    if code == 401:
        return UserError("the Hub does not accept the token: run `hf auth login` or set HF_TOKEN")
    if code == 403:
        return UserError(f"{about}: the token may not do this; it needs the right to write there")
    if code in (409, 412):
        return RunError(
            f"{about} was changed by somebody else meanwhile: run the same command again"
        )
    if code == 429 or code >= 500:
        return RunError(
            f"{about}: the Hub is busy or down ({code}): run the same command again later"
        )
    return RunError(f"{about}: the Hub refused ({code}: {_line(error.server_message or '')})")


def _line(text: object) -> str:
    return " ".join(str(text).split())[:200]
