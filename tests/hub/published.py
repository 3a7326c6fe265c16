"""A stub run and a loopback Hub: what the tests of publishing start from."""

import contextlib
import copy
import hashlib
import json
import shutil
from base64 import b64decode
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.utils import get_session

from llm_unlearn.exact import copies
from llm_unlearn.exact.ledger import Ledger
from llm_unlearn.exact.run import S3TRun
from llm_unlearn.hub import publishing
from llm_unlearn.hub.client import Hub
from llm_unlearn.hub.push import Options, Pushed
from llm_unlearn.hub.state import describe, publications
from tests.loopback_hub import TOKEN, Commit, LoopbackHub, Repository
from tests.tiny import make_trained_stub

BASE = "org/tiny"
NAME = "tester/adapters"


class Killed(BaseException):
    """The process ends here."""


@dataclass
class World:
    """A run, and the Hub that it publishes on."""

    run: S3TRun
    loop: LoopbackHub
    hub: Hub

    def push(self, name: str = NAME, **options: Any) -> list[Pushed]:
        wanted = Options(**{"base_model": BASE, **options})
        return publishing.push(self.run.path, name, wanted, self.hub)

    def repository(self, name: str = NAME) -> Repository:
        return self.loop.repositories[name]

    def head(self, name: str = NAME) -> Commit:
        commit = self.repository(name).at("main")
        assert commit is not None
        return commit

    def read(self, path: str, name: str = NAME) -> bytes:
        content = self.repository(name).content(self.head(name).files[path])
        assert content is not None
        return content

    def said(self, name: str = NAME) -> dict[str, Any]:
        """What the statement on the Hub says."""
        return json.loads(b64decode(json.loads(self.read("publication.json", name))["payload"]))

    def served(self) -> set[str]:
        """SHA-256 of every weight file that anybody could download."""
        return {
            hashlib.sha256(content).hexdigest()
            for repository in self.loop.repositories.values()
            for (_, path), content in repository.downloads().items()
            if path.endswith(".safetensors") or len(path) == 64
        }

    def weights(self) -> set[str]:
        """SHA-256 of every weight file that the run serves now."""
        return {
            hashlib.sha256(path.read_bytes()).hexdigest()
            for path in self.run.directory.served.glob("*/adapter_model.safetensors")
        }

    def told(self) -> list[str]:
        return describe(S3TRun.open(self.run.path).directory)

    def check_told(self, old: set[str]) -> None:
        """Nothing that was deleted is on the Hub without `describe` saying so, and nothing that is
        there is said to be gone, by the ledger or by a statement.
        """
        served, told = self.served(), " ".join(self.told())
        if served & old:
            assert "still serves" in told or "may serve" in told, told
        live = {
            digest
            for publication in publications(self.run.directory)
            if not publication.is_gone
            for digest in publication.digests.values()
        }
        for publication in publications(self.run.directory):
            if publication.is_gone:
                assert not served & (set(publication.digests.values()) - live)
        if copies.outstanding(self.run.directory) == []:
            assert not served & old
        for name in self.loop.repositories:
            if "publication.json" in self.head(name).files:
                self.check_statement(name)

    def check_statement(self, name: str) -> None:
        for purge in self.said(name)["predicate"]["purged"]:
            there = self.loop.repositories.get(purge["repository"])
            for revision, answer in purge["revisions"].items() if there else ():
                assert answer != "404" or there.at(revision) is None
            for digest in purge["objects"]:
                assert purge["left"] or digest not in self.served()

    def killing(self, number: int, before: bool) -> contextlib.AbstractContextManager[None]:
        """The process dies before it sends its n-th request, or before it gets the answer."""
        sent = 0

        def count(_: object) -> bool:
            nonlocal sent
            sent += 1
            return sent > number

        return (
            self._dying(count, lambda _: False) if before else self._dying(lambda _: False, count)
        )

    def killing_where(
        self, wanted: Callable[[str], bool]
    ) -> contextlib.AbstractContextManager[None]:
        """The process dies before it gets the answer to a request to such an address."""
        return self._dying(lambda _: False, lambda answer: wanted(str(answer.url)))

    @contextlib.contextmanager
    def killing_writes(self, number: int) -> Iterator[None]:
        """The process dies when its n-th entry in the ledger is on disk."""
        append, written = Ledger.append, 0

        def dying(ledger: Ledger, kind: str, payload: Mapping[str, Any]) -> None:
            nonlocal written
            append(ledger, kind, payload)
            written += 1
            if written > number:
                raise Killed

        Ledger.append = dying
        try:
            yield
        finally:
            Ledger.append = append

    @contextlib.contextmanager
    def _dying(self, before: Callable[[Any], bool], after: Callable[[Any], bool]) -> Iterator[None]:
        def on_request(request: object) -> None:
            if before(request):
                raise Killed

        def on_answer(answer: object) -> None:
            if after(answer):
                raise Killed

        client = get_session()
        hooks = client.event_hooks
        client.event_hooks = {
            "request": [on_request, *hooks["request"]],
            "response": [*hooks["response"], on_answer],
        }
        try:
            yield
        finally:
            client.event_hooks = hooks


@contextlib.contextmanager
def online() -> Iterator[None]:
    """The client talks to whom it is told to, over plain LFS."""
    before = constants.HF_HUB_OFFLINE, constants.HF_HUB_DISABLE_XET
    constants.HF_HUB_OFFLINE, constants.HF_HUB_DISABLE_XET = False, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, constants.HF_HUB_DISABLE_XET = before
        huggingface_hub.close_session()


def make_trained(path: Path, **options: Any) -> Path:
    """A stub run of two shards, trained."""
    shape = {"num_shards": 2, **options}
    return make_trained_stub(path, **shape)


@contextlib.contextmanager
def published(trained: Path, place: Path, **options: Any) -> Iterator[World]:
    """A copy of a run beside a Hub of its own."""
    shutil.copytree(trained, place, symlinks=True)
    with online(), LoopbackHub(**options) as loop:
        yield World(S3TRun.open(place), loop, Hub(loop.url, TOKEN))


def again(world: World, saved: dict[str, Repository], trained: Path) -> World:
    """The same Hub and run as they were saved."""
    shutil.rmtree(world.run.path)
    shutil.copytree(trained, world.run.path, symlinks=True)
    world.loop.repositories = copy.deepcopy(saved)
    return World(S3TRun.open(world.run.path), world.loop, world.hub)
