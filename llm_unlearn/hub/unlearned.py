"""Publishing what an approximate method left. Its card says that nothing is guaranteed.

There is no ledger, so nothing is purged and nothing signed. What was computed from the forget set and is
not weights (statistics, detectors, the tuned model behind a wrapper) is not published at all.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm_unlearn.errors import UserError
from llm_unlearn.hub.client import Hub
from llm_unlearn.hub.content import CARD_NAME, OF_THE_HUB
from llm_unlearn.hub.evaluations import read_evaluation, to_model_index
from llm_unlearn.hub.names import check_base, check_repository
from llm_unlearn.hub.purge import Say, silent
from llm_unlearn.hub.push import Options, Pushed

REPORT_NAME = "unlearning.json"
WRAPPER_NAME = "wrapper.json"
HIDDEN = (
    "what {method} leaves hides what was to be forgotten and still holds it, and what it answers through "
    "is computed from the forget set: it is not published"
)
# Weights, what loads them, and the tokenizer; everything else stays here.
PUBLISHED = re.compile(
    r"adapter_config\.json|adapter_model\.safetensors|(generation_)?config\.json|chat_template\.jinja"
    r"|model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json|tokenizer(_config)?\.json"
    r"|special_tokens_map\.json|added_tokens\.json|vocab\.json|merges\.txt|tokenizer\.model"
)
_FILE = re.compile(r"[\w./\\:~ -]*[/\\][\w./\\:~ -]*|[\w -]+\.(jsonl?|csv|parquet|txt|ya?ml)")


def push_result(
    path: Path,
    repository: str,
    options: Options,
    hub: Hub | None = None,
    say: Say = silent,
) -> Pushed:
    """Publish an approximate result in one commit.

    Args:
        path: the directory with unlearning.json.

    Raises:
        UserError: flags for exact runs, a result that only hides what it was to forget, a base model
            that only this machine knows, or a repository that holds something else.
    """
    check_repository(repository)
    report = json.loads((path / REPORT_NAME).read_bytes())
    _check(path, report, options)
    base = check_base(_base_of(path, report), options.base_model)
    contents = _contents(path, report, base, options)
    hub = hub or Hub()
    accounts = hub.accounts()
    name = check_repository(repository if "/" in repository else f"{accounts[0]}/{repository}")
    head = hub.head(name)
    if head is None:
        hub.create(name, options.private)
        head = hub.head(name)
    if head is None or (options.private and not head.private):
        raise UserError(f"{name} is public or does not answer: make it private on its page")
    held = hub.files(name, head.revision)
    _check_same_kind(hub, name, head.revision, set(held))
    say(f"uploading {len(contents)} files to {name}")
    old = [path for path in held if path not in contents and path not in OF_THE_HUB]
    revision = hub.commit(
        name, contents, old, f"Publish what {report['method']} left", head.revision
    )
    return Pushed(name, revision, revision != head.revision)


def _check(path: Path, report: Mapping[str, Any], options: Options) -> None:
    if options.per_shard or options.fresh:
        raise UserError(
            f"--per-shard and --fresh are for exact runs; {path} is an approximate result"
        )
    if report["is_suppression"] or (path / WRAPPER_NAME).exists():
        raise UserError(HIDDEN.format(method=report["method"]))


def _base_of(path: Path, report: Mapping[str, Any]) -> str:
    if not report["is_adapter"]:
        return str(report["base_model"])
    config = json.loads((path / "adapter_config.json").read_bytes())
    return str(config["base_model_name_or_path"])


def _contents(
    path: Path, report: Mapping[str, Any], base: str, options: Options
) -> dict[str, bytes | Path]:
    contents: dict[str, bytes | Path] = {
        file.name: file for file in sorted(path.iterdir()) if PUBLISHED.fullmatch(file.name)
    }
    for name, key in (
        ("adapter_config.json", "base_model_name_or_path"),
        ("config.json", "_name_or_path"),
    ):
        if name in contents:
            config = json.loads((path / name).read_bytes())
            if key in config:
                contents[name] = json.dumps({**config, key: base}, indent=2).encode()
    return contents | {CARD_NAME: _card(path, report, base, options).encode()}


def _card(path: Path, report: Mapping[str, Any], base: str, options: Options) -> str:
    """The result's own card, with the Hub's names and without the paths of this machine."""
    from huggingface_hub import ModelCard

    card = ModelCard((path / CARD_NAME).read_text(), ignore_metadata_errors=True)
    card.data["base_model"] = base
    card.data["base_model_relation"] = "adapter" if report["is_adapter"] else "finetune"
    evaluations = [read_evaluation(one) for one in options.evaluations]
    if evaluations:
        card.data["model_name"] = path.resolve().name
        card.data["eval_results"] = to_model_index(evaluations)
    files = {str(v) for v in {**report["flags"], **report["training"]}.values() if is_file(v)}
    lines = [
        line if line.split("|")[2:3] == [] or line.split("|")[2].strip() not in files
        else f"|{line.split('|')[1]}| (a file) |"
        for line in card.text.splitlines()
    ]  # fmt: skip
    return f"---\n{card.data.to_yaml()}\n---\n" + "\n".join(lines) + "\n"


def is_file(value: object) -> bool:
    """Does a flag's value look like the name of a file here?"""
    return isinstance(value, str) and (_FILE.fullmatch(value) is not None or Path(value).exists())


def _check_same_kind(hub: Hub, name: str, revision: str, held: set[str]) -> None:
    """A repository that holds something else is not written over."""
    foreign = held - {CARD_NAME, *OF_THE_HUB}
    if not foreign:
        return
    card = hub.read(name, revision, CARD_NAME).decode(errors="replace") if CARD_NAME in held else ""
    if "approximate-unlearning" not in card:
        raise UserError(f"{name} holds {min(foreign)!r} of something else: choose another REPO_ID")
