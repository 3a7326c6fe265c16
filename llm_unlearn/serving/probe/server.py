"""What a server holds: ours, which says it itself, or a stock vLLM, of which little can be seen."""

import re
from typing import Any

from llm_unlearn.errors import RunError
from llm_unlearn.exact.adapters import NAME
from llm_unlearn.serving.outside.http_client import Server
from llm_unlearn.serving.outside.models import answers_to, ensure_allowed, served_models
from llm_unlearn.serving.outside.vllm_server import in_memory_of
from llm_unlearn.serving.probe.expected import Expected
from llm_unlearn.serving.probe.looks import LiveAdapter, Look
from llm_unlearn.serving.probe.residue_report import Report, look_at_report

NEVER_SERVED = "shard-0@000000000000"
SAMPLE = re.compile(r"^(vllm:\w+)\{(.*)\} (\S+)$", re.M)
LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
MEMORY = (
    "what is in its memory: /v1/unload_lora_adapter can leave the weights there (vLLM issue 54839); a restart "
    "is certain"
)


def look_at_server(server: Server, expected: Expected) -> tuple[list[Look], list[LiveAdapter]]:
    """All that a server tells.

    Raises:
        RunError: it cannot be reached, refuses, or says nothing that can be understood.
    """
    told = ensure_allowed(server.get("/v1/residue"), server)
    cards = served_models(server)
    if told.status == 200:
        try:
            report = Report.read(told.json())
        except ValueError:
            raise RunError(
                f"{server.url}/v1/residue answers with something else than JSON"
            ) from None
        looks, adapters = look_at_report(report, expected, server.url)
        looks.append(_listed(cards, {resident.name for resident in report.residents}))
    elif told.status in (404, 405):
        looks, adapters = _stock(server, expected, cards)
    else:
        raise RunError(f"{server.url}/v1/residue cannot be asked: {told.message}")
    current = {
        *expected.adapters,
        *(card["id"] for card in cards if card["id"] in expected.exported),
    }
    return [*looks, _retired(server, expected, current)], adapters


def _listed(cards: list[dict[str, Any]], residents: set[str]) -> Look:
    """Our own server lists the adapters that it tells of, and no other."""
    look = Look("its list of models", examined=len(cards))
    names = {card["id"] for card in cards if NAME.fullmatch(card["id"])}
    look.problems += [
        f"{n} is listed, and not among its adapters" for n in sorted(names - residents)
    ]
    return look


def _retired(server: Server, expected: Expected, current: set[str]) -> Look:
    """Names that were served before must not answer: 404, as for a name that never was."""
    look = Look("names served before")
    if answers_to(server, NEVER_SERVED) is not False:
        look.unseen.append(
            "the server does not refuse a name that never was, so refusals tell nothing"
        )
        return look
    for name in expected.retired:
        if name in current:
            continue
        answers = answers_to(server, name)
        if answers is None:
            look.unseen.append(f"{name}: the server neither answers nor says 404")
            continue
        look.examined += 1
        if answers:
            look.problems.append(f"{name} still answers")
    return look


def _stock(
    server: Server, expected: Expected, cards: list[dict[str, Any]]
) -> tuple[list[Look], list[LiveAdapter]]:
    """A server that is not ours: names are all that it tells."""
    look = Look("adapters of the server, by name")
    adapters = []
    for card in cards:
        if not card.get("parent") and not NAME.fullmatch(card["id"]):
            continue  # the base model
        look.examined += 1
        problem = _problem_of(card["id"], expected)
        adapters.append(LiveAdapter(card["id"], server.url, None, None, (), problem))
        if problem:
            look.problems.append(f"{card['id']} {problem}")
    look.notes.append("that an adapter holds what its name says is the word of whoever loaded it")
    memory = Look("its memory", unseen=[MEMORY])
    memory.problems += [
        f"{name} was loaded and is deleted, and no restart of the server since is known (docs/vllm.md)"
        for name in loaded_and_deleted(server.url, expected)
    ]
    return [look, memory, *_metrics(server, expected)], adapters


def loaded_and_deleted(url: str, expected: Expected) -> list[str]:
    """Adapters that were loaded into a server, are deleted, and may be in its memory still."""
    if expected.run is None or expected.clean is None:
        return []
    return [
        copy.place.removeprefix(f"{url} ")
        for copy in in_memory_of(expected.run, url)
        if expected.clean.problem_of(copy.nodes)
    ]


def _problem_of(name: str, expected: Expected) -> str | None:
    if name in expected.exported:
        return None
    if NAME.fullmatch(name):
        return "is not what the run serves now"
    return "has no digest in its name: what it holds is not known, and old caches can answer for it"


def _metrics(server: Server, expected: Expected) -> list[Look]:
    """What vLLM measures tells whether it keeps prefixes, and whom requests wait for."""
    cache, flight = Look("its prefix cache"), Look("answers in flight")
    try:
        reply = server.get("/metrics")
        samples = SAMPLE.findall(reply.text) if reply.status == 200 else []
    except RunError:
        samples = []
    configs = [dict(LABEL.findall(s[1])) for s in samples if s[0] == "vllm:cache_config_info"]
    kept = {config.get("enable_prefix_caching", "").lower() for config in configs}
    cache.examined = len(configs)
    if kept != {"false"}:
        told = "is on" if "true" in kept else "is not told of in /metrics"
        cache.unseen.append(
            f"it {told}: what it keeps cannot be seen. Names with digests keep old prefixes from answering "
            "for new adapters (vLLM issue 42125)"
        )
    lora = [s for s in samples if s[0] == "vllm:lora_requests_info"]
    if not lora:
        flight.unseen.append("whom running requests read: /metrics does not tell")
        return [cache, flight]
    latest = dict(LABEL.findall(max(lora, key=lambda sample: _time(sample[2]))[1]))
    for label in ("running_lora_adapters", "waiting_lora_adapters"):
        for name in filter(None, latest.get(label, "").split(",")):
            flight.examined += 1
            if problem := _problem_of(name.strip(), expected):
                flight.problems.append(f"requests read {name.strip()}, which {problem}")
    flight.notes.append(
        "a request can be served with another adapter than it asked for (vLLM issue 47724)"
    )
    return [cache, flight]


def _time(value: str) -> float:
    try:
        return float(value)
    except ValueError:
        return 0.0
