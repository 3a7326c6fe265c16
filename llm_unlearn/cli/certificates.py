"""certificate show, verify, renew, stamp."""

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llm_unlearn import console
from llm_unlearn.cli.application import REQUESTS, Json, RunPath, app, open_run
from llm_unlearn.errors import RunError

if TYPE_CHECKING:
    from llm_unlearn.exact.certificates import Verdict

commands = typer.Typer(no_args_is_help=True, help="Certificates: show, verify, renew, stamp.")
app.add_typer(commands, name="certificate", rich_help_panel=REQUESTS)

CertificateFile = Annotated[
    Path, typer.Argument(metavar="FILE", help="A certificate, RUN/certificates/REQUEST.json.")
]


@commands.command()
def show(file: CertificateFile, as_json: Json = False) -> None:
    """What a certificate says. Who signed it is for `certificate verify`."""
    from llm_unlearn.exact.certificates import read_certificate

    said = read_certificate(file)
    if as_json:
        console.print_json(said)
        return
    for line in describe(said):
        print(line)


@commands.command()
def verify(
    file: CertificateFile,
    key: Annotated[
        Path | None, typer.Option(help="The signer's public key, PEM (signing.pub).")
    ] = None,
    adapter: Annotated[
        list[Path] | None,
        typer.Option(help="A served adapter that must be one it names; repeatable."),
    ] = None,
    run: Annotated[Path | None, typer.Option(help="The run that must have issued it.")] = None,
    tsa_root: Annotated[
        Path | None, typer.Option(help="Root certificate of the timestamp's authority, PEM.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check a certificate without its run; exit 1 if a byte of it, or of the adapter, differs."""
    from llm_unlearn.exact.certificates import verify_certificate
    from llm_unlearn.timestamps import verify_stamp

    verdict = verify_certificate(file, key, adapter or [], run)
    verdict.problems.extend(verify_stamp(file, tsa_root, verdict.notes))
    if as_json:
        _print_verdict_json(verdict)
    else:
        for line in describe(verdict.statement):
            print(line)
        print(f"signed by key {verdict.fingerprint}")
        for note in verdict.notes:
            print(f"note: {note}")
    if not verdict.passed:
        raise RunError(f"{file} does not hold: {'; '.join(verdict.problems)}")
    if not as_json:
        print("ok: the signature fits" + (", and so does the adapter" if adapter else ""))


def _print_verdict_json(verdict: "Verdict") -> None:
    console.print_json(
        {
            "passed": verdict.passed,
            "problems": verdict.problems,
            "notes": verdict.notes,
            "fingerprint": verdict.fingerprint,
            "statement": verdict.statement,
        }
    )


@commands.command()
def renew(
    run: RunPath,
    request: Annotated[list[str], typer.Argument(metavar="REQUEST...", help="Ids of requests.")],
    replay: Annotated[
        bool,
        typer.Option(help="First train every served node again: the class becomes `dense`."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Certify requests again as things are now: after a rebuild, a replay, a purge of copies."""
    written = open_run(run).renew(request, replay)
    if as_json:
        console.print_json({"certificates": written})
        return
    for path in written:
        print(f"certificate: {path}")


@commands.command()
def stamp(
    file: CertificateFile,
    tsa: Annotated[str, typer.Option(help="URL of an RFC 3161 timestamp authority.")],
) -> None:
    """Have an authority sign when the certificate was there; kept beside it as FILE.tsr."""
    from llm_unlearn.timestamps import stamp as stamp_file

    print(f"timestamp: {stamp_file(file, tsa)}")


def describe(said: dict[str, Any]) -> list[str]:
    """A statement in lines that a person reads."""
    told = said["predicate"]
    if "request" not in told:
        return [f"{said['predicateType']}: {len(said['subject'])} files"]
    kinds = {"delete": "deletion", "correct": "correction"}
    copies = told["outstanding_copies"]
    lines = [
        f"{kinds[told['kind']]} {told['request']} of run {told['run']}, acknowledged "
        f"{_moment(told['acknowledged_at'])}, certified {_moment(told['certified_at'])}",
        f"class of exactness: {told['exactness']['class']} ({told['exactness']['meaning']})",
        *(f"  {name}: {value}" for name, value in told["exactness"]["components"].items()),
        f"removed: {told['records_removed']} records, {len(told['nodes_removed'])} nodes; "
        f"targets {', '.join(target['pseudonym'][:16] for target in told['targets'][:5])}"
        + (f" and {len(told['targets']) - 5} more" if len(told["targets"]) > 5 else ""),
        f"served before {_short(told['served_before'])}, after {_short(told['served_after'])}, "
        f"blocks {told['served_depth']}",
        f"Merkle root of the retained records: {told['retained_root']}",
        *(f"check: {check['name']}: {_verdict(check['passed'])}" for check in told["checks"]),
        f"outstanding copies from before, as far as known: {copies['known']}"
        + (f" ({', '.join(copies['kinds'])})" if copies["known"] else ""),
        *(f"out of reach: {what}" for what in told["out_of_reach"]),
    ]
    return lines


def _verdict(passed: bool) -> str:
    return "passed" if passed else "FAILED"


def _short(sha: str | None) -> str:
    return sha[:16] if sha else "nothing"


def _moment(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S} UTC"
