"""Tokens: kept as digests, in a file that only its owner reads, revoked without a restart."""

import hashlib
import json
import os
from pathlib import Path

import pytest

from llm_unlearn.data.partition import PartitionKey
from llm_unlearn.errors import UserError
from llm_unlearn.serving.http.auth import Tokens, add_token, read_tokens, revoke_token
from llm_unlearn.serving.http.refusals import Refusal
from tests.serving.servers import Served

KEY = PartitionKey.from_phrase("tokens")


def test_a_token_is_given_once_and_kept_as_its_digest(tmp_path: Path) -> None:
    path = tmp_path / "new" / "tokens.json"
    given = add_token(path, "web", ["ask", "delete"], ["Ada"], KEY.pseudonym, asks_per_minute=5)
    kept = path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600
    assert given not in kept and "Ada" not in kept
    (token,) = read_tokens(path)
    assert token.sha256 == hashlib.sha256(given.encode()).hexdigest()
    assert token.subjects == (KEY.pseudonym("subject", "Ada"),) and token.asks_per_minute == 5
    assert token.may_delete([KEY.pseudonym("subject", "Ada")])
    assert not token.may_delete([KEY.pseudonym("subject", n) for n in ("Ada", "Ben")])
    assert len(given) > 40


def test_revocation_needs_no_restart(tmp_path: Path) -> None:
    path = tmp_path / "tokens.json"
    one, two = (add_token(path, name, ["ask"]) for name in ("one", "two"))
    tokens = Tokens(path)
    assert [holder.name for holder in map(tokens.holder, (one, two)) if holder] == ["one", "two"]
    revoke_token(path, "one")
    assert tokens.holder(one) is None and tokens.holder(two) is not None
    three = add_token(path, "three", ["operate"])
    assert tokens.holder(three) is not None


def test_the_first_token_counts_at_once(run_path: Path) -> None:
    """A server that was started without any lets nobody else in from then on, whatever becomes of it."""
    path = run_path / "serving" / "tokens.json"
    service = Served(run_path, Tokens(path, is_optional=True)).service
    assert service.holder(None).name == "anybody"
    given = add_token(path, "web", ["ask"])
    with pytest.raises(Refusal) as caught:
        service.holder(None)
    assert caught.value.status_code == 401 and service.holder(given).name == "web"
    path.unlink()
    with pytest.raises(Refusal) as caught:
        service.holder(given)
    assert caught.value.status_code == 503


def test_a_link_that_leads_nowhere_is_no_missing_file(tmp_path: Path) -> None:
    path = tmp_path / "tokens.json"
    path.symlink_to(tmp_path / "away.json")
    with pytest.raises(UserError, match="cannot read"):
        Tokens(path, is_optional=True)


@pytest.mark.parametrize(
    "harm", ["removed", "readable", "garbage", "half", "right", "twice", "deep"]
)
def test_a_file_that_cannot_be_used_lets_nobody_in(run_path: Path, harm: str) -> None:
    """Whoever broke it may have meant to revoke."""
    path = run_path.parent / "tokens.json"
    given = add_token(path, "web", ["ask"])
    served = Served(run_path, Tokens(path))
    assert served.service.holder(given).name == "web"
    entry = json.loads(path.read_text())["tokens"][0]
    texts = {
        "garbage": "\x00\x01",
        "half": path.read_text()[:50],
        "right": json.dumps({"version": 1, "tokens": [entry | {"rights": ["root"]}]}),
        "twice": json.dumps({"version": 1, "tokens": [entry, entry]}),
        "deep": "[" * 100_000,
    }
    if harm == "removed":
        path.unlink()
    elif harm == "readable":
        os.chmod(path, 0o644)
    else:
        path.write_text(texts[harm])
    with pytest.raises(Refusal) as caught:
        served.service.holder(given)
    assert caught.value.status_code == 503
    with pytest.raises(UserError) as told:
        Tokens(path)
    assert "\n" not in str(told.value) and str(path) in str(told.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rights": ["root"]}, "expected ask, delete, operate"),
        ({"rights": []}, "missing"),
        ({"rights": ["delete"]}, "--subject"),
        ({"rights": ["ask"], "subjects": ["Ada"]}, "--subject"),
        ({"rights": ["ask"], "name": "a\nb"}, "printable"),
        ({"rights": ["ask"], "name": "taken"}, "revoke it first"),
    ],
)
def test_tokens_that_make_no_sense(tmp_path: Path, options: dict[str, object], words: str) -> None:
    path = tmp_path / "tokens.json"
    add_token(path, "taken", ["ask"])
    before = path.read_bytes()
    with pytest.raises(UserError, match=words):
        add_token(path, **{"name": "web", "pseudonym": KEY.pseudonym, **options})  # pyright: ignore
    assert path.read_bytes() == before
    with pytest.raises(UserError, match="no token"):
        revoke_token(path, "other")


def test_a_stopped_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tokens.json"
    given = add_token(path, "web", ["ask"])

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(UserError, match="No space left"):
        revoke_token(path, "web")
    monkeypatch.undo()
    assert Tokens(path).holder(given) is not None
