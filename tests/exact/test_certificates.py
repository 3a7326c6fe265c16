"""Certificates: anyone can check them, no byte can be changed, and the class is what was delivered."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from llm_unlearn.data.partition import SliceName
from llm_unlearn.data.records import digest
from llm_unlearn.errors import UserError
from llm_unlearn.exact import certificates as module
from llm_unlearn.exact import served
from llm_unlearn.exact.certificates import (
    read_certificate,
    served_files,
    verify_certificate,
    weakest,
)
from llm_unlearn.exact.run import S3TRun
from llm_unlearn.exact.settling import renew
from llm_unlearn.exact.verification import Check
from llm_unlearn.signing import PublicKey, SignatureError, Signer, statement
from tests.tiny import (
    core_records,
    make_run,
    make_stub_run,
    stubbed_training,
    tiny_records,
    train_stub,
)

pytestmark = pytest.mark.usefixtures("without_fsync")


def trained(path: Path, **options: Any) -> S3TRun:
    run = make_stub_run(path, tiny_records(), **{"num_shards": 2, "num_slices": 2, **options})
    with stubbed_training():
        train_stub(run)
    return run


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reference") / "run"
    trained(path).delete(["person 3"])
    return path


@pytest.fixture
def run(reference: Path, tmp_path: Path) -> S3TRun:
    shutil.copytree(reference, tmp_path / "run", symlinks=True)
    return S3TRun.open(tmp_path / "run")


def certificate_of(run: S3TRun) -> Path:
    (path,) = (run.path / "certificates").glob("*.json")
    return path


def test_it_holds_without_its_run(run: S3TRun, tmp_path: Path) -> None:
    """With the certificate, the public key and an adapter alone, in another place."""
    away = tmp_path / "away"
    away.mkdir()
    for source in (certificate_of(run), run.path / "signing.pub"):
        shutil.copy(source, away)
    shutil.copytree(run.path / "served" / "shard-1", away / "adapter")
    shutil.rmtree(run.path)
    verdict = verify_certificate(
        away / certificate_of_name(away), away / "signing.pub", [away / "adapter"]
    )
    assert verdict.passed and not verdict.notes
    assert verdict.fingerprint == PublicKey.open(away / "signing.pub").fingerprint
    assert (
        "compare its fingerprint" in verify_certificate(away / certificate_of_name(away)).notes[0]
    )


def certificate_of_name(folder: Path) -> str:
    (path,) = folder.glob("*.json")
    return path.name


def test_every_byte_of_the_certificate_counts(run: S3TRun) -> None:
    path, key = certificate_of(run), run.path / "signing.pub"
    whole = path.read_bytes()
    public = PublicKey.open(key)
    assert public.read(whole)
    for position in range(len(whole)):
        for flip in (1, 32, 128):
            with pytest.raises(SignatureError):
                public.read(
                    whole[:position] + bytes([whole[position] ^ flip]) + whole[position + 1 :]
                )


def test_every_byte_of_the_adapter_counts(tmp_path: Path) -> None:
    """All positions of a small one: what is served when nothing of a shard is left."""
    run = trained(tmp_path / "run", num_slices=1, num_sequences=1)
    everybody = run.directory.slices.subjects(SliceName(1, 0))
    path = run.delete(sorted(everybody)).certificate
    assert path is not None
    adapter, names = run.path / "served" / "shard-1", named(path)
    assert verify_certificate(path, adapters=[adapter]).passed
    for file in (adapter / "adapter_model.safetensors", adapter / "adapter_config.json"):
        whole = file.read_bytes()
        for position in range(len(whole)):
            file.write_bytes(
                whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :]
            )
            problems = module._compare_adapter(adapter, names)
            assert problems and file.name in problems[0]
        file.write_bytes(whole)
    assert verify_certificate(path, adapters=[adapter]).passed


def named(path: Path) -> dict[str, str]:
    return {e["name"]: e["digest"]["sha256"] for e in read_certificate(path)["subject"]}


def test_files_of_two_adapters_do_not_make_one(run: S3TRun, tmp_path: Path) -> None:
    mixed = tmp_path / "mixed"
    shutil.copytree(run.path / "served" / "shard-0", mixed)
    shutil.copy(run.path / "served" / "shard-1" / "adapter_config.json", mixed)
    verdict = verify_certificate(certificate_of(run), adapters=[mixed])
    assert not verdict.passed
    (mixed / "adapter_config.json").unlink()
    assert "is missing" in verify_certificate(certificate_of(run), adapters=[mixed]).problems[0]


def test_a_later_deletion_changes_what_is_served(run: S3TRun) -> None:
    first = certificate_of(run)
    run.delete(["person 5"])
    shards = [run.path / "served" / f"shard-{number}" for number in (0, 1)]
    verdicts = [verify_certificate(first, adapters=[shard]).passed for shard in shards]
    assert sorted(verdicts) == [False, True]
    (path,) = renew(run.directory, [first.stem])
    assert verify_certificate(path, adapters=shards, run=run.path).passed
    assert all(check.passed for check in run.verify())


def test_the_certificate_of_another_run_is_refused(run: S3TRun, tmp_path: Path) -> None:
    other = trained(tmp_path / "other")
    other.delete(["person 3"])
    with pytest.raises(SignatureError, match="not by the key"):
        verify_certificate(certificate_of(other), run.path / "signing.pub", run=run.path)
    with pytest.raises(SignatureError, match="not by the key"):
        verify_certificate(certificate_of(other), run.path / "signing.pub")
    shutil.copy(other.path / "signing.key", run.path)  # one key for both runs
    shutil.copy(other.path / "signing.pub", run.path)
    verdict = verify_certificate(certificate_of(other), run.path / "signing.pub", run=run.path)
    assert "has issued no such certificate" in verdict.problems[0]
    elsewhere = tmp_path / "elsewhere"
    shutil.copy(certificate_of(other), run.path / "certificates" / certificate_of(run).name)
    assert not all(check.passed for check in run.verify())
    with pytest.raises(UserError, match="is not a run"):
        verify_certificate(certificate_of(other), other.path / "signing.pub", run=elsewhere)


def test_a_forged_certificate_needs_the_key(run: S3TRun, tmp_path: Path) -> None:
    path = certificate_of(run)
    said = read_certificate(path)
    said["predicate"]["records_removed"] = 1000
    forged = Signer.of(tmp_path).sign(said)
    path.write_bytes(forged)
    with pytest.raises(SignatureError, match="not by the key"):
        verify_certificate(path)
    assert any("signed by" in problem for check in run.verify() for problem in check.problems)


def test_a_failed_check_fails_the_certificate(run: S3TRun, tmp_path: Path) -> None:
    said = read_certificate(certificate_of(run))
    said["predicate"]["checks"][0]["passed"] = False
    path = tmp_path / "c.json"
    path.write_bytes(Signer.of(run.path).sign(said))
    verdict = verify_certificate(path, run.path / "signing.pub")
    assert "a check had failed when it was written" in verdict.problems[0]


def test_the_class_is_that_of_the_weakest_component() -> None:
    assert weakest({"a": "dense", "b": "dense"}) == "dense"
    assert weakest({"a": "dense", "b": "structural"}) == "structural"
    assert weakest({"a": "structural", "b": "behavioural", "c": "replay"}) == "behavioural"
    assert weakest({"a": "dense", "b": "none"}) == "none"


def test_a_core_that_holds_the_deleted_is_said(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", core=core_records(), num_shards=1)
    held = run.delete(["person 11"])
    free = run.delete(["person 4"])
    assert run.certificate(held.request or "")["exactness"]["class"] == "none"
    assert run.certificate(free.request or "")["exactness"]["class"] == "structural"


def test_dense_needs_every_served_node(run: S3TRun) -> None:
    request = certificate_of(run).stem
    served_nodes = len(module.copies.nodes_served(run.directory))

    def class_after(check: Check | None) -> str:
        renew(run.directory, [request], check)
        return run.certificate(request)["exactness"]["class"]

    assert class_after(Check("replay", examined=served_nodes)) == "dense"
    assert class_after(Check("replay", examined=served_nodes - 1)) == "structural"
    assert class_after(None) == "structural"
    assert class_after(Check("replay", examined=served_nodes, problems=["bits"])) == "none"


def test_replay_makes_it_dense(tmp_path: Path, tiny_base: Path) -> None:
    """Every served node is really trained again."""
    run = make_run(tmp_path / "run", tiny_base, tiny_records(), num_slices=2)
    run.rebuild()
    request = run.delete(["person 3"]).request or ""
    run.rebuild()
    (path,) = run.renew([request], replay=True)
    told = read_certificate(path)["predicate"]
    assert told["exactness"]["class"] == "dense"
    assert any("trained again: equal bits" in check["name"] for check in told["checks"])
    assert verify_certificate(path, run=run.path, adapters=[run.path / "served/shard-0"]).passed


def test_signing_again_hashes_nothing_again(run: S3TRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """Digests of records come from headers, those of files from lineages."""
    request = certificate_of(run).stem
    for owner, name in ((served, "served_digest"), (module, "file_digest")):
        monkeypatch.setattr(owner, name, lambda *_: pytest.fail("hashed a file again"))
    read: list[SliceName] = []
    monkeypatch.setattr(run.directory.slices, "read", lambda name, *_: read.append(name) or [])
    renew(run.directory, [request])
    assert read == []


def test_many_members_are_named_by_one_digest(run: S3TRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_LISTED", 1)
    assert list(served_files(run.directory)) == ["served"]
    (path,) = renew(run.directory, [certificate_of(run).stem])
    verdict = verify_certificate(path, adapters=[run.path / "served" / "shard-0"])
    assert "names no single files" in verdict.problems[0]
    assert verify_certificate(path, run=run.path).passed


def test_copies_outside_are_counted(run: S3TRun, tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    merged.mkdir()
    module.copies.register(run.directory, "merged", str(merged))
    done = run.delete(["person 5", "person 6", "person 7"])
    assert [copy.place for copy in done.outstanding_copies] == [str(merged)]
    certificate = run.certificate(done.request or "")
    assert certificate["outstanding_copies"] == {"known": 1, "kinds": ["merged"]}
    assert str(tmp_path) not in json.dumps(certificate)
    merged.rmdir()
    renew(run.directory, [done.request or ""])
    assert run.certificate(done.request or "")["outstanding_copies"]["known"] == 0


def test_the_statement_is_about_what_is_served(run: S3TRun) -> None:
    said = read_certificate(certificate_of(run))
    again = statement(said["predicateType"], served_files(run.directory), said["predicate"])
    assert again == said
    assert said["predicate"]["served_after"] == named(certificate_of(run))["served"]
    assert digest(said) == digest(json.loads(json.dumps(said)))


def test_an_unknown_request_cannot_be_renewed(run: S3TRun) -> None:
    with pytest.raises(UserError, match="knows no request 'x'"):
        run.renew(["x"])
