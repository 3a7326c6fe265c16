"""A Hub on this machine, for the real `huggingface_hub` client over HTTP: what publishing needs of it.

Repositories have commits with parents, branches, tags, refs of pull requests, git blobs and LFS objects. A
commit answers as long as a ref reaches it. Every request is logged and numbered, and a hook sees it before it is
handled and after: it may kill a process, raise `Dropped` to hang up, or answer itself.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

DATE = "2030-01-01T00:00:00.000Z"
TOKEN = "hf_loopback"


class Dropped(Exception):
    """Raised by a hook: the connection is closed without an answer."""


@dataclass(frozen=True)
class Answer:
    """What the Hub says: a status, JSON or bytes, and headers."""

    status: int = 200
    body: Any = b""
    headers: dict[str, str] = field(default_factory=dict)


def refusal(status: int, code: str, message: str) -> Answer:
    return Answer(
        status,
        {"error": message},
        {"X-Error-Code": code, "X-Error-Message": " ".join(message.split())},
    )


NO_REPOSITORY = refusal(404, "RepoNotFound", "Repository not found")
NO_REVISION = refusal(404, "RevisionNotFound", "Invalid rev id")
NO_ENTRY = refusal(404, "EntryNotFound", "Entry not found")


@dataclass(frozen=True)
class Entry:
    """A file of a commit: `blob` with its git oid, or `lfs` with the SHA-256 of its content."""

    kind: str
    oid: str


@dataclass(frozen=True)
class Commit:
    oid: str
    parent: str | None
    title: str
    files: dict[str, Entry]


class Repository:
    def __init__(self, private: bool, keeps_unreachable: bool):
        self.private = private
        self.keeps_unreachable = keeps_unreachable
        self.commits: dict[str, Commit] = {}
        self.branches: dict[str, str] = {}
        self.tags: dict[str, str] = {}
        self.pulls: dict[str, str] = {}
        self.blobs: dict[str, bytes] = {}
        self.objects: dict[str, bytes] = {}
        attributes = self.blob(b"*.safetensors filter=lfs\n")
        self.commit("main", "initial commit", {".gitattributes": attributes})

    def blob(self, content: bytes) -> Entry:
        oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        self.blobs[oid] = content
        return Entry("blob", oid)

    def commit(self, ref: str, title: str, files: dict[str, Entry], squash: bool = False) -> Commit:
        parent = None if squash else self.branches.get(ref)
        told = [title, parent, len(self.commits), sorted((p, e.oid) for p, e in files.items())]
        made = Commit(hashlib.sha1(json.dumps(told).encode()).hexdigest(), parent, title, files)
        self.commits[made.oid] = made
        self.branches[ref] = made.oid
        return made

    def history(self, oid: str) -> Iterator[Commit]:
        """A commit and those before it, the newest first."""
        name: str | None = oid
        while name is not None:
            yield self.commits[name]
            name = self.commits[name].parent

    def reachable(self) -> dict[str, Commit]:
        tips = [*self.branches.values(), *self.tags.values(), *self.pulls.values()]
        return {commit.oid: commit for tip in tips for commit in self.history(tip)}

    def at(self, revision: str) -> Commit | None:
        names = self.branches | self.tags | self.pulls
        if revision in names:
            return self.commits[names[revision]]
        known = self.commits if self.keeps_unreachable else self.reachable()
        return known.get(revision)

    def content(self, entry: Entry) -> bytes | None:
        return (self.objects if entry.kind == "lfs" else self.blobs).get(entry.oid)

    def downloads(self) -> dict[tuple[str, str], bytes]:
        """Everything that somebody could download now, by revision and path."""
        commits = self.commits if self.keeps_unreachable else self.reachable()
        found = {
            (commit.oid, path): self.content(entry)
            for commit in commits.values()
            for path, entry in commit.files.items()
        }
        found |= {("lfs", oid): content for oid, content in self.objects.items()}
        return {place: content for place, content in found.items() if content is not None}


Hook = Callable[[int, str], Answer | None]


class LoopbackHub:
    """Start with `with LoopbackHub() as hub:`; `hub.url` is the endpoint.

    Args:
        lfs_suffixes: files that go to LFS; others are git blobs.
        keeps_unreachable: commits go on answering after a squash.
        keeps_objects: LFS objects go on being served after their deletion.
    """

    def __init__(
        self,
        lfs_suffixes: tuple[str, ...] = (".safetensors",),
        keeps_unreachable: bool = False,
        keeps_objects: bool = False,
        user: str = "tester",
    ):
        self.lfs_suffixes, self.user = lfs_suffixes, user
        self.keeps_unreachable, self.keeps_objects = keeps_unreachable, keeps_objects
        self.repositories: dict[str, Repository] = {}
        self.log: list[str] = []
        self.before: Hook | None = None
        self.after: Hook | None = None
        self._lock = threading.RLock()

    def __enter__(self) -> "LoopbackHub":
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = 2**16
            disable_nagle_algorithm = True

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002
                """Nothing on the terminal."""

            def do_any(self) -> None:
                try:
                    answer = hub.handle(self.command, self.path, read_body(self), self.headers)
                except Dropped:
                    self.close_connection = True
                    return
                send(self, answer)

            do_GET = do_POST = do_PUT = do_HEAD = do_DELETE = do_any

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: Any, client_address: Any) -> None:
                """Whoever was killed hangs up."""

        # Like the Hub, it keeps its large files on another host.
        self._servers = [Server(("127.0.0.1", 0), Handler) for _ in range(2)]
        self.url, self.store = (f"http://127.0.0.1:{s.server_port}" for s in self._servers)
        for server in self._servers:
            threading.Thread(target=server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def handle(self, method: str, target: str, body: bytes, headers: Any) -> Answer:
        """One request; paths are split before they are unquoted, so that a ref may have slashes."""
        parts = urlsplit(target)
        line = f"{method} {unquote(parts.path)}"
        with self._lock:
            number = len(self.log)
            self.log.append(line)
        if self.before and (given := self.before(number, line)):
            return given
        with self._lock:
            answer = self._route(method, parts.path, parse_qs(parts.query), body, headers)
        if self.after and (given := self.after(number, line)):
            return given
        return answer

    def _route(
        self, method: str, path: str, query: dict[str, list[str]], body: bytes, headers: Any
    ) -> Answer:
        if not path.startswith("/store/") and headers.get("Authorization") != f"Bearer {TOKEN}":
            is_private = any(r.private and f"/{n}" in path for n, r in self.repositories.items())
            if method not in ("GET", "HEAD") or "whoami" in path or is_private:
                return refusal(401, "", "Invalid credentials in Authorization header")
        for wanted, pattern, act in ROUTES:
            found = re.fullmatch(pattern, path)
            if found and method in wanted:
                return act(self, Request(method, [*map(unquote, found.groups(""))], query, body))
        return refusal(501, "", f"the loopback Hub has no route for {method} {path}")


@dataclass(frozen=True)
class Request:
    method: str
    groups: list[str]
    query: dict[str, list[str]]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body or b"{}")


def read_body(handler: BaseHTTPRequestHandler) -> bytes:
    if handler.headers.get("Transfer-Encoding", "").lower() == "chunked":
        parts = []
        while size := int(handler.rfile.readline().split(b";")[0], 16):
            parts.append(handler.rfile.read(size))
            handler.rfile.readline()
        handler.rfile.readline()
        return b"".join(parts)
    return handler.rfile.read(int(handler.headers.get("Content-Length") or 0))


def send(handler: BaseHTTPRequestHandler, answer: Answer) -> None:
    is_bytes = isinstance(answer.body, bytes)
    body = answer.body if is_bytes else json.dumps(answer.body).encode()
    kind = "application/octet-stream" if is_bytes else "application/json"
    handler.send_response(answer.status)
    for name, value in {
        "Content-Type": kind, "Content-Length": str(len(body)), **answer.headers,
    }.items():  # fmt: skip
        handler.send_header(name, value)
    handler.end_headers()
    if handler.command != "HEAD":
        handler.wfile.write(body)


def who(hub: LoopbackHub, request: Request) -> Answer:
    return Answer(body={"type": "user", "name": hub.user, "orgs": [], "auth": {}})


def validate(hub: LoopbackHub, request: Request) -> Answer:
    return Answer(body={"errors": [], "warnings": []})


def create(hub: LoopbackHub, request: Request) -> Answer:
    asked = request.json
    name = f"{asked.get('organization') or hub.user}/{asked['name']}"
    told = {"url": f"{hub.url}/{name}", "name": name}
    if name in hub.repositories:
        return Answer(409, {**told, "error": "You already created this model repo"})
    private = asked.get("visibility") == "private"
    hub.repositories[name] = Repository(private, hub.keeps_unreachable)
    return Answer(body=told)


def delete(hub: LoopbackHub, request: Request) -> Answer:
    asked = request.json
    name = f"{asked.get('organization') or hub.user}/{asked['name']}"
    return Answer(body={}) if hub.repositories.pop(name, None) else NO_REPOSITORY


def in_repository(act: Callable[..., Answer]) -> Callable[[LoopbackHub, Request], Answer]:
    """The first group names a repository, which must be there."""

    def call(hub: LoopbackHub, request: Request) -> Answer:
        repository = hub.repositories.get(request.groups[0])
        return act(hub, repository, request) if repository else NO_REPOSITORY

    return call


def at_revision(act: Callable[..., Answer]) -> Callable[[LoopbackHub, Request], Answer]:
    """The second group names a revision, which must be there; main if it is empty."""

    @in_repository
    def call(hub: LoopbackHub, repository: Repository, request: Request) -> Answer:
        commit = repository.at(request.groups[1] or "main")
        return act(hub, repository, commit, request) if commit else NO_REVISION

    return call


@at_revision
def describe(hub: LoopbackHub, repository: Repository, commit: Commit, request: Request) -> Answer:
    files = [{"rfilename": path} for path in commit.files]
    told = {"id": request.groups[0], "modelId": request.groups[0], "sha": commit.oid, "tags": []}
    return Answer(body={**told, "private": repository.private, "siblings": files})


@at_revision
def preupload(hub: LoopbackHub, repository: Repository, commit: Commit, request: Request) -> Answer:
    # A path in .gitignore is not committed, as on the Hub.
    ignored = commit.files.get(".gitignore")
    lines = (repository.content(ignored) or b"").decode().split() if ignored else []
    return Answer(
        body={
            "files": [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(hub.lfs_suffixes) else "regular",
                    "shouldIgnore": file["path"] in lines,
                    "oid": commit.files[file["path"]].oid if file["path"] in commit.files else None,
                }
                for file in request.json["files"]
            ]
        }
    )


@in_repository
def commit_files(hub: LoopbackHub, repository: Repository, request: Request) -> Answer:
    branch = request.groups[1]
    lines = [json.loads(line) for line in request.body.splitlines()]
    header = next(line["value"] for line in lines if line["key"] == "header")
    head = repository.at(branch)
    if head is None:
        return NO_REVISION
    if header.get("parentCommit") not in (None, head.oid):
        return refusal(412, "", "A commit has happened since. Please refresh and try again.")
    files = dict(head.files)
    for line in lines:
        value = line["value"]
        if line["key"] == "file":
            files[value["path"]] = repository.blob(base64.b64decode(value["content"]))
        elif line["key"] == "lfsFile":
            if value["oid"] not in repository.objects:
                return refusal(400, "", "an LFS object is missing")
            files[value["path"]] = Entry("lfs", value["oid"])
        elif line["key"] == "deletedFile":
            del files[value["path"]]
    made = repository.commit(branch, header["summary"], files)
    url = f"{hub.url}/{request.groups[0]}/commit/{made.oid}"
    return Answer(body={"success": True, "commitOid": made.oid, "commitUrl": url})


@at_revision
def tree(hub: LoopbackHub, repository: Repository, commit: Commit, request: Request) -> Answer:
    listed = []
    for path, entry in sorted(commit.files.items()):
        size = len(repository.content(entry) or b"")
        told = {"type": "file", "path": path, "size": size, "oid": entry.oid[:40]}
        if entry.kind == "lfs":
            told["lfs"] = {"oid": entry.oid, "size": size, "pointerSize": 127}
        listed.append(told)
    return Answer(body=listed)


@at_revision
def history(hub: LoopbackHub, repository: Repository, commit: Commit, request: Request) -> Answer:
    told = [
        {"id": one.oid, "title": one.title, "message": "", "authors": [], "date": DATE}
        for one in repository.history(commit.oid)
    ]
    return Answer(body=told)


@in_repository
def refs(hub: LoopbackHub, repository: Repository, request: Request) -> Answer:
    def told(names: dict[str, str], prefix: str) -> list[dict[str, str]]:
        return [{"name": n, "ref": prefix + n, "targetCommit": oid} for n, oid in names.items()]

    found: dict[str, Any] = {
        "branches": told(repository.branches, "refs/heads/"),
        "tags": told(repository.tags, "refs/tags/"),
        "converts": [],
    }
    if "include_prs" in request.query:
        found["pullRequests"] = told(repository.pulls, "")
    return Answer(body=found)


@in_repository
def squash(hub: LoopbackHub, repository: Repository, request: Request) -> Answer:
    branch = request.groups[1]
    if branch not in repository.branches:
        return NO_REVISION
    files = repository.commits[repository.branches[branch]].files
    repository.commit(branch, request.json.get("message", ""), files, squash=True)
    return Answer(body={})


@in_repository
def change_ref(hub: LoopbackHub, repository: Repository, request: Request) -> Answer:
    kind, name = request.groups[1:]
    names = repository.branches if kind == "branch" else repository.tags
    if request.method == "DELETE":
        if name == "main":
            return refusal(403, "", "main is protected")
        return Answer(body={}) if names.pop(name, None) else NO_REVISION
    start = repository.at(request.json.get("startingPoint", "main") if kind == "branch" else name)
    if start is None:
        return NO_REVISION
    names[name if kind == "branch" else request.json["tag"]] = start.oid
    return Answer(body={})


@in_repository
def objects(hub: LoopbackHub, repository: Repository, request: Request) -> Answer:
    told = [
        {
            "fileOid": oid, "oid": oid, "filename": "", "pushedAt": DATE, "ref": None,
            "size": len(content), "xetHash": None,
        }
        for oid, content in repository.objects.items()
    ]  # fmt: skip
    return Answer(body=told)


@in_repository
def delete_objects(hub: LoopbackHub, repository: Repository, request: Request) -> Answer:
    for oid in request.json["deletions"]["sha"]:
        if not hub.keeps_objects:
            repository.objects.pop(oid, None)
    return Answer(body={})


@in_repository
def batch(hub: LoopbackHub, repository: Repository, request: Request) -> Answer:
    asked, told = request.json, []
    for one in asked["objects"]:
        oid, here = one["oid"], one["oid"] in repository.objects
        link = {"href": f"{hub.store}/store/{request.groups[0]}/{oid}"}
        if asked["operation"] == "download":
            gone = {"error": {"code": 404, "message": "Object does not exist"}}
            told.append(one | ({"actions": {"download": link}} if here else gone))
        else:
            told.append(one | ({} if here else {"actions": {"upload": link}}))
    return Answer(body={"transfer": "basic", "objects": told})


@in_repository
def store(hub: LoopbackHub, repository: Repository, request: Request) -> Answer:
    oid = request.groups[1]
    if request.method == "PUT":
        if hashlib.sha256(request.body).hexdigest() != oid:
            return refusal(400, "", "not the content that was announced")
        repository.objects[oid] = request.body
        return Answer()
    if oid not in repository.objects:
        return refusal(403, "", "no such object")
    return Answer(body=repository.objects[oid], headers={"Accept-Ranges": "bytes"})


@at_revision
def resolve(hub: LoopbackHub, repository: Repository, commit: Commit, request: Request) -> Answer:
    entry = commit.files.get(request.groups[2])
    if entry is None:
        return Answer(404, {}, {**NO_ENTRY.headers, "X-Repo-Commit": commit.oid})
    headers = {"ETag": f'"{entry.oid}"', "X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
    if entry.kind == "blob":
        return Answer(body=repository.blobs[entry.oid], headers=headers)
    size = len(repository.content(entry) or b"")
    linked = {"X-Linked-Etag": f'"{entry.oid}"', "X-Linked-Size": str(size)}
    where = {"Location": f"{hub.store}/store/{request.groups[0]}/{entry.oid}"}
    return Answer(302, b"", headers | linked | where)


NAME = "([^/]+/[^/]+)"
MODEL = f"/api/models/{NAME}"
ROUTES: list[tuple[str, str, Callable[[LoopbackHub, Request], Answer]]] = [
    ("GET", "/api/whoami-v2", who),
    ("POST", "/api/validate-yaml", validate),
    ("POST", "/api/repos/create", create),
    ("DELETE", "/api/repos/delete", delete),
    ("GET", f"{MODEL}(?:/revision/([^/]+))?", describe),
    ("GET", "/api/models/([^/]+)()", describe),
    ("POST", f"{MODEL}/preupload/([^/]+)", preupload),
    ("POST", f"{MODEL}/commit/([^/]+)", commit_files),
    ("GET", f"{MODEL}/tree/([^/]+)(?:/.*)?", tree),
    ("GET", f"{MODEL}/commits/([^/]+)", history),
    ("GET", f"{MODEL}/refs", refs),
    ("POST", f"{MODEL}/super-squash/([^/]+)", squash),
    ("POST DELETE", f"{MODEL}/(branch|tag)/([^/]+)", change_ref),
    ("GET", f"{MODEL}/lfs-files", objects),
    ("POST", f"{MODEL}/lfs-files/batch", delete_objects),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", batch),
    ("GET HEAD PUT", f"/store/{NAME}/([0-9a-f]{{64}})", store),
    ("GET HEAD", f"/{NAME}/resolve/([^/]+)/(.+)", resolve),
]
