"""Answers beside those of a system that never saw the subject: what is served now, computed afresh.

What equality shows: on these prompts, with the likeliest token each time, the server says what a system says
that is made of nothing deleted. It does not show that other prompts or sampling would agree, nor that the
server holds nothing deleted; a difference can also be rounding, where two tokens are nearly as likely.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from llm_unlearn.errors import RunError, UserError
from llm_unlearn.exact.adapters import NAME
from llm_unlearn.exact.run import S3TRun
from llm_unlearn.serving.outside.http_client import Server
from llm_unlearn.serving.outside.models import ensure_allowed, served_models
from llm_unlearn.serving.probe.looks import Look

MOST_PROMPTS = 10_000
LONGEST_PROMPT = 100_000
SHOWS = (
    "equal: on these prompts, greedily, it says what a system says that never saw what is deleted. Other prompts, "
    "sampling and what lies unused in memory are not shown by that"
)
Answerer = Callable[[str], str]


@dataclass(frozen=True)
class Asking:
    """What is asked, and of whom besides.

    Attributes:
        prompts: of the file, in order.
        model: name under which the servers answer; by default their first model.
        reference: another run or server; what the run serves, by default.
        show_text: tell prompts' answers where they differ.
    """

    prompts: tuple[str, ...]
    max_tokens: int = 32
    model: str | None = None
    reference: str | None = None
    show_text: bool = False


def read_prompts(path: Path) -> tuple[str, ...]:
    """Prompts of a JSONL file: `{"prompt": ...}` or a text on each line.

    Raises:
        UserError: it cannot be read; names the line.
    """
    prompts = []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts {path} cannot be read: {error}") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            told = json.loads(line)
        except (ValueError, RecursionError):
            told = None
        prompt = told.get("prompt") if isinstance(told, dict) else told
        if not isinstance(prompt, str) or not 0 < len(prompt) <= LONGEST_PROMPT:
            raise UserError(f'--prompts {path}, line {number}: expected {{"prompt": "..."}}')
        prompts.append(prompt)
    if not 0 < len(prompts) <= MOST_PROMPTS:
        raise UserError(
            f"--prompts {path} holds {len(prompts)} prompts: 1 to {MOST_PROMPTS} can be asked"
        )
    return tuple(prompts)


def compare_answers(server: Server, run: Path | None, asking: Asking) -> Look:
    """Ask every prompt of both and compare the texts.

    Raises:
        UserError: there is nothing to compare with.
        RunError: the reference fails its verification, or a server cannot be asked.
    """
    ask = _of_server(server, asking)
    other = _reference(server, run, asking)
    look, different = Look("answers"), []
    for number, prompt in enumerate(asking.prompts, start=1):
        ours, theirs = ask(prompt), other(prompt)
        look.examined += 1
        if ours != theirs:
            different.append((number, ours, theirs))
    equal = look.examined - len(different)
    look.notes.append(f"{equal} of {look.examined} answers are equal")
    if different:
        number, ours, theirs = different[0]
        told = f": {ours!r} instead of {theirs!r}" if asking.show_text else ""
        look.problems.append(f"{len(different)} answers differ, the first in row {number}{told}")
    else:
        look.notes.append(SHOWS)
    return look


def _reference(server: Server, run: Path | None, asking: Asking) -> Answerer:
    named = asking.reference
    if named is not None and "://" in named:
        return _of_server(Server(named, None, server.seconds), asking)
    if named is None and run is None:
        raise UserError("--prompts wants something to compare with: --run RUN or --reference")
    return offline(Path(named) if named is not None else run, asking.max_tokens)  # pyright: ignore[reportArgumentType]


def _of_server(server: Server, asking: Asking) -> Answerer:
    model = asking.model or _first_model(server)

    def ask(prompt: str) -> str:
        body = {"model": model, "prompt": prompt, "max_tokens": asking.max_tokens, "temperature": 0}
        reply = ensure_allowed(server.post("/v1/completions", body), server)
        if reply.status != 200:
            raise RunError(f"{server.url} does not answer a prompt: {reply.message}")
        try:
            text = reply.json()["choices"][0]["text"]
        except (ValueError, KeyError, IndexError, TypeError):
            raise RunError(f"{server.url}/v1/completions answers in another form") from None
        return str(text)

    return ask


def _first_model(server: Server) -> str:
    """The ensemble of ours, or the only adapter of a server that answers by one at a time."""
    cards = served_models(server)
    adapters = [card["id"] for card in cards if card.get("parent")]
    whole = [c["id"] for c in cards if not c.get("parent") and not NAME.fullmatch(c["id"])]
    if len(adapters) == 1:
        return adapters[0]
    if adapters or len(whole) != 1:
        raise UserError(f"{server.url} serves several models: say which with --model")
    return whole[0]


def offline(path: Path, max_tokens: int) -> Answerer:
    """A run's own ensemble, here and now, after its verification.

    Raises:
        RunError: the run fails its verification.
    """
    import torch
    from transformers.utils import logging

    from llm_unlearn.exact.base_model import load_base_of
    from llm_unlearn.exact.ensemble import ShardEnsemble

    logging.disable_progress_bar()
    run = S3TRun.open(path)
    failed = [check.name for check in run.verify() if not check.passed]
    if failed:
        raise RunError(
            f"{path} fails its verification ({', '.join(failed)}), so it is no reference"
        )
    model, tokenizer = load_base_of(run.directory)
    rule = run.directory.config.rule
    ensemble = ShardEnsemble.from_run(model, run.directory.served, rule, tokenizer)

    @torch.no_grad()
    def ask(prompt: str) -> str:
        given = tokenizer(prompt, return_tensors="pt")
        ids = given["input_ids"]
        made = ensemble.generate(
            input_ids=ids,
            attention_mask=given["attention_mask"],
            do_sample=False,
            max_new_tokens=max_tokens,
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
        )
        return str(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))

    return ask
