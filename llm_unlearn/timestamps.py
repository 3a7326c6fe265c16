"""RFC 3161 timestamps: an authority signs that a file was there at a moment.

The authority learns the file's SHA-256 and nothing else. Its answer is kept beside the file as
`FILE.tsr`, which `openssl ts -verify` reads too. Needs the extra `[timestamp]`.
"""

import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from llm_unlearn import files
from llm_unlearn.errors import RunError, UserError

SUFFIX = ".tsr"
TIMEOUT_SECONDS = 30.0
MOST_BYTES = 1_000_000  # of an answer


def stamp_path(path: Path) -> Path:
    return path.with_name(path.name + SUFFIX)


def stamp(path: Path, authority: str) -> Path:
    """Ask an authority for a timestamp of a file; returns where its answer is kept.

    Args:
        authority: an http or https URL that answers RFC 3161 queries.

    Raises:
        UserError: the file or the URL cannot be used, or the extra is not installed.
        RunError: the authority cannot be reached, or its answer is not about this file.
    """
    library = _library()
    if not authority.startswith(("https://", "http://")):
        raise UserError(f"{authority!r} is no http or https URL of a timestamp authority")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    builder = library.TimestampRequestBuilder().hash_algorithm(library.HashAlgorithm.SHA256)
    query = builder.data(data).nonce(nonce=True).build()
    answer = _ask(authority, query.as_bytes())
    try:
        response = library.decode_timestamp_response(answer)
        is_ours = (
            library.PKIStatus(response.status) == library.PKIStatus.GRANTED
            and response.tst_info.nonce == query.nonce
            and response.tst_info.message_imprint.message == query.message_imprint.message
        )
    except ValueError as error:
        raise RunError(f"{authority} did not answer with a timestamp ({error})") from None
    if not is_ours:
        raise RunError(f"{authority} did not grant a timestamp of this file")
    files.write_bytes(stamp_path(path), answer)
    return stamp_path(path)


def _ask(authority: str, query: bytes) -> bytes:
    request = urllib.request.Request(
        authority, query, {"Content-Type": "application/timestamp-query"}
    )
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as reply:
            return reply.read(MOST_BYTES)
    except (urllib.error.URLError, TimeoutError, ValueError) as error:
        raise RunError(f"{authority} cannot be asked for a timestamp: {error}") from None


def verify_stamp(path: Path, root: Path | None, notes: list[str]) -> list[str]:
    """Problems of the timestamp beside a file; none where there is no timestamp.

    Args:
        root: certificate of the authority's root, PEM; without it, the timestamp is not judged.
        notes: gets what a reader should know.
    """
    held = stamp_path(path)
    if not held.is_file():
        return [f"{held} is missing"] if root else []
    if root is None:
        notes.append(f"{held.name} was not checked: give its authority's root with --tsa-root")
        return []
    library = _library()
    from cryptography import x509

    try:
        response = library.decode_timestamp_response(held.read_bytes())
        verifier = library.VerifierBuilder()
        for certificate in x509.load_pem_x509_certificates(root.read_bytes()):
            verifier = verifier.add_root_certificate(certificate)
        verifier.build().verify_message(response, path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {root}: {error.strerror}") from None
    except (ValueError, library.VerificationError) as error:
        return [f"the timestamp does not hold ({error})"]
    notes.append(f"timestamp: {response.tst_info.gen_time:%Y-%m-%d %H:%M:%S} UTC")
    return []


def _library() -> Any:
    try:
        import rfc3161_client
    except ImportError:
        raise UserError(
            "timestamps need one more package: pip install 'llm-unlearn[timestamp]'"
        ) from None
    return rfc3161_client
