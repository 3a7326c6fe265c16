"""serve; token add, list, revoke."""

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llm_unlearn import console
from llm_unlearn.cli.application import SERVING, Json, RunPath, app, open_run
from llm_unlearn.errors import UserError

if TYPE_CHECKING:
    from llm_unlearn.serving.http.starting import Started
    from llm_unlearn.serving.policy import Policy

NEEDED = ("fastapi", "uvicorn", "prometheus_client")
# Both spellings, as the recipes have underscores.
BOTH = {"token_normalize_func": lambda name: name.replace("_", "-")}

tokens = typer.Typer(no_args_is_help=True, help="Tokens of a server: add, list, revoke.")
app.add_typer(tokens, name="token", rich_help_panel=SERVING)

TokensPath = Annotated[
    Path | None, typer.Option("--tokens", help="File of the tokens (RUN/serving/tokens.json).")
]
OwnLimit = Annotated[
    float | None, typer.Option(help="Instead of the server's; 0: no limit.", min=0)
]


def _policy_option(about: str) -> Any:
    return typer.Option(help=about, rich_help_panel="Policy")


def _limit_option(about: str, least: float | None = None) -> Any:
    return typer.Option(help=about, rich_help_panel="Limits", min=least)


@app.command(rich_help_panel=SERVING, context_settings=BOTH)
def serve(  # noqa: PLR0913 - typer makes an option of every argument
    run: RunPath,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 for any that is free.", min=0, max=65535)] = 8000,
    name: Annotated[
        str | None, typer.Option(help="Name of the ensemble as a model (that of the directory).")
    ] = None,
    tokens: TokensPath = None,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(help="Another name under which a proxy on this machine asks; repeatable."),
    ] = None,
    tls_certificate: Annotated[Path | None, typer.Option(help="PEM file, for HTTPS.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="PEM file of its key.")] = None,
    replica: Annotated[
        str | None, typer.Option(help="This server among several of the run (MACHINE-PORT).")
    ] = None,
    policy: Annotated[
        str | None,
        _policy_option(
            "immediate-execute, uncertified-execute, threshold-execute, -defer, -clean (default) or "
            "-abstain, deadline-clean, oblivious; UNSAFE: serve-anyway."
        ),
    ] = None,
    timing: Annotated[
        str | None,
        _policy_option("When to rebuild: immediate, uncertified, threshold, deadline."),
    ] = None,
    handling: Annotated[
        str | None, _policy_option("Of what is not certified: execute, defer, clean, abstain.")
    ] = None,
    target: Annotated[
        str | None, _policy_option("What a certificate promises: deactivated or retrained.")
    ] = None,
    threshold: Annotated[
        int | None, _policy_option("Affected shards that start a rebuild.")
    ] = None,
    deadline_hours: Annotated[
        float | None, _policy_option("After which a deletion has been executed.")
    ] = None,
    constant_time: Annotated[
        float | None,
        _policy_option(
            "Answers leave at multiples of so many seconds, and do not say how they were served."
        ),
    ] = None,
    max_batch: Annotated[int, _limit_option("Rows (answers times shards) in one batch.", 1)] = 64,
    max_waiting: Annotated[int, _limit_option("Queries that may wait; more get 429.", 1)] = 256,
    timeout: Annotated[
        float, _limit_option("Seconds until a query gets 504, also one that waits for a rebuild.")
    ] = 120.0,
    drain: Annotated[float, _limit_option("Seconds for running answers at the end.")] = 30.0,
    max_body: Annotated[int, _limit_option("Bytes of a request.", 1)] = 4_000_000,
    asks_per_minute: Annotated[float, _limit_option("Of each token; 0: no limit.", 0)] = 600.0,
    deletions_per_hour: Annotated[
        float, _limit_option("Subjects, of each token; 0: no limit.", 0)
    ] = 100.0,
    requests_per_subject: Annotated[
        float, _limit_option("In an hour, on each subject; 0: no limit.", 0)
    ] = 10.0,
    as_json: Json = False,
) -> None:
    """Answer over HTTP while deletions come in: OpenAI's API, /v1/classify, /v1/deletions."""
    if missing := [package for package in NEEDED if find_spec(package) is None]:
        raise UserError(f'serving needs {", ".join(missing)}: pip install "llm-unlearn[serve]"')
    if (tls_certificate is None) != (tls_key is None):
        raise UserError("--tls-certificate and --tls-key go together")
    opened = open_run(run)
    from llm_unlearn.serving.http.service import Settings
    from llm_unlearn.serving.http.starting import Place, serve_run
    from llm_unlearn.serving.http.starting import open_run as load
    from llm_unlearn.serving.policy import make_policy

    chosen = make_policy(policy, timing, handling, target, threshold, deadline_hours)
    settings = Settings(
        name=run.resolve().name if name is None else name,
        handling=chosen.handling,
        timeout=timeout,
        drain=drain,
        constant_time=constant_time,
        most_body=max_body,
        asks_per_minute=asks_per_minute,
        deletions_per_hour=deletions_per_hour,
        requests_per_subject=requests_per_subject,
    )
    tls = (tls_certificate, tls_key) if tls_certificate and tls_key else None
    place = Place(host, port, tokens, tuple(allowed_host or ()), replica, tls)

    def say(started: "Started") -> None:
        if as_json:
            console.print_json(started.to_dict() | {"policy": chosen.name})
        else:
            _print_started(run, started, chosen)

    serve_run(
        opened,
        settings,
        place,
        lambda replica: load(opened, chosen, replica, max_batch, max_waiting),
        say,
    )


def _print_started(run: Path, started: "Started", policy: "Policy") -> None:
    if policy.is_unsafe:
        console.warn(f"the policy {policy.name} answers with deleted data: for comparison only")
    if started.tokens is None:
        console.warn(
            "no tokens: every program on this machine may ask, delete and operate "
            f"(`llm-unlearn token add {run} --name NAME --right ask`)"
        )
    elif not started.is_encrypted and not started.is_loopback:
        console.warn("plain HTTP: tokens can be read on the way (--tls-certificate, or a proxy)")
    token = "" if started.tokens is None else " -H 'Authorization: Bearer TOKEN'"
    lines = [
        f"serving {run} as {started.model!r} at {started.url}",
        f"policy {policy.name}: {policy.description}; certified for the {policy.target} ensemble",
        f"audit log: {started.audit}",
        f"ask: curl {started.url}/v1/completions -H 'Content-Type: application/json'{token} "
        f'-d \'{{"model": "{started.model}", "prompt": "Hello"}}\'',
        "stop: Ctrl-C or SIGTERM; running answers are finished first",
    ]
    print("\n".join(lines), flush=True)


@tokens.command(context_settings=BOTH)
def add(
    run: RunPath,
    name: Annotated[str, typer.Option(help="By which it is listed and revoked; nobody's name.")],
    right: Annotated[list[str], typer.Option(help="ask, delete or operate; repeatable.")],
    subject: Annotated[
        list[str] | None,
        typer.Option(help="Whom it may delete, or '*' for everybody; repeatable."),
    ] = None,
    tokens: TokensPath = None,
    asks_per_minute: OwnLimit = None,
    deletions_per_hour: OwnLimit = None,
    as_json: Json = False,
) -> None:
    """Make a token and print it, this once: only its digest is kept."""
    from llm_unlearn.serving.http.auth import add_token, tokens_path

    directory = open_run(run).directory
    given = add_token(
        tokens or tokens_path(run), name, right, subject or (), directory.key.pseudonym,
        asks_per_minute, deletions_per_hour,
    )  # fmt: skip
    if as_json:
        console.print_json({"name": name, "token": given})
    else:
        print(given)


@tokens.command("list", context_settings=BOTH)
def list_tokens(run: RunPath, tokens: TokensPath = None, as_json: Json = False) -> None:
    """Names and rights of the tokens."""
    from llm_unlearn.serving.http.auth import read_tokens, tokens_path

    path = tokens or tokens_path(run)
    held = read_tokens(path) if path.exists() else ()
    if as_json:
        shown = ("name", "rights", "created", "asks_per_minute", "deletions_per_hour")
        console.print_json(
            [
                {key: getattr(token, key) for key in shown} | {"subjects": token.reach}
                for token in held
            ]
        )
        return
    for token in held:
        reach = f", may delete {token.reach}" if token.subjects else ""
        print(f"{token.name}: {', '.join(token.rights)}{reach}; made {token.created}")
    if not held:
        print(f"{path} holds no tokens")


@tokens.command(context_settings=BOTH)
def revoke(
    run: RunPath,
    name: Annotated[str, typer.Option(help="Of the token.")],
    tokens: TokensPath = None,
    as_json: Json = False,
) -> None:
    """Take a token away; running servers refuse it from then on."""
    from llm_unlearn.serving.http.auth import revoke_token, tokens_path

    revoke_token(tokens or tokens_path(run), name)
    if as_json:
        console.print_json({"revoked": name})
    else:
        print(f"revoked {name}")
