"""Push: what is on the Hub, and what is not."""

import json
import os
import time
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from llm_unlearn.errors import RunError, UserError
from llm_unlearn.exact import copies
from llm_unlearn.exact.adapters import file_digest
from llm_unlearn.hub import publishing
from llm_unlearn.signing import PublicKey
from tests.evaluation.fake_results import SECRET, TOFU, fake_tofu
from tests.hub.published import BASE, NAME, World, make_trained, published
from tests.loopback_hub import Entry
from tests.tiny import core_records, make_stub_run, stubbed_training, tiny_records, train_stub

WEIGHTS = "adapter_model.safetensors"


def test_one_commit_with_everything_and_nothing_secret(world: World) -> None:
    world.run.delete(["person 1"])
    (pushed,) = world.push()
    head = world.head()
    assert (pushed.repository, pushed.revision, pushed.uploaded) == (NAME, head.oid, True)
    assert [c.title for c in world.repository().history(head.oid)][1:] == ["initial commit"]
    request = world.run.directory.ledger.requests()[0].id
    assert set(head.files) == {
        ".gitattributes", "README.md", "publication.json", "signing.pub", f"certificates/{request}.json",
        *(f"shard-{n}/{name}" for n in (0, 1) for name in (WEIGHTS, "adapter_config.json", "lineage.json")),
    }  # fmt: skip
    everything = b"".join(world.repository().downloads().values())
    own = world.run.path
    for secret in (own / "secret.key", own / "signing.key"):
        assert secret.read_bytes() not in everything
    assert b"person" not in everything and str(own).encode() not in everything
    for line in b"\n".join(p.read_bytes() for p in own.rglob("*.jsonl")).split(b"\n"):
        assert not line or line not in everything


def test_the_statement_names_every_file_and_is_signed(world: World) -> None:
    world.run.delete(["person 1"])
    world.push()
    public = PublicKey.open(world.run.path / "signing.pub")
    said = public.read(world.read("publication.json"))
    files = {entry["name"]: entry["digest"]["sha256"] for entry in said["subject"]}
    assert set(files) == set(world.head().files) - {".gitattributes", "publication.json"}
    for path, digest in files.items():
        (world.run.path / "fetched").write_bytes(world.read(path))
        assert file_digest(world.run.path / "fetched") == digest
    predicate = said["predicate"]
    (request,) = world.run.directory.ledger.requests()
    assert predicate["requests"] == {request.id: files[f"certificates/{request.id}.json"]}
    assert predicate["run"] == world.run.directory.key.salt_id
    assert predicate["served"] == copies.known(world.run.directory)[0].served
    assert predicate["base_model"]["name"] == BASE
    assert predicate["base_model"]["weights"] == world.run.directory.shape.weights
    assert predicate["purged"] == [] and len(predicate["out_of_reach"]) >= 4


def test_the_base_model_is_renamed_and_nothing_else(world: World) -> None:
    world.push()
    own = world.run.directory.served / "shard-0" / "adapter_config.json"
    before, after = (
        json.loads(own.read_bytes()),
        json.loads(world.read("shard-0/adapter_config.json")),
    )
    assert after.pop("base_model_name_or_path") == BASE
    assert before.pop("base_model_name_or_path") == "tiny"
    assert after == before


def test_the_card(world: World) -> None:
    world.run.delete(["person 1"])
    world.push()
    card = ModelCard(world.read("README.md").decode())
    assert card.data.base_model == BASE and card.data["base_model_relation"] == "adapter"
    assert {"unlearning", "exact-unlearning", "s3t", "lora"} <= set(card.data.tags)
    assert card.data.library_name == "peft" and "model-index" not in card.content
    assert "deterministic function of data that contains no deleted record" in card.text
    assert "22 records of 11 subjects" in card.text
    assert "carried out: 1;" in card.text
    assert f"llm-unlearn pull {NAME}" in card.text
    assert f'from_pretrained(base, "{NAME}", subfolder="shard-0")' in card.text


def test_evaluations_are_model_index(world: World, tmp_path: Path) -> None:
    results = fake_tofu()
    results.suite = str(tmp_path / "home" / "my suite")
    results.write(tmp_path / "results.json", with_texts=True)
    world.push(evaluations=[tmp_path])
    text = world.read("README.md").decode()
    card = ModelCard(text)
    found = {one.metric_type: one for one in card.data.eval_results}
    assert found["model_utility"].metric_value == TOFU["model_utility"][0]
    assert found["model_utility"].dataset_type == "my suite"
    assert set(found) == set(TOFU) and "| my suite" in text
    assert SECRET not in text and "home" not in text
    world.push()  # without it: nothing is claimed any more
    assert "model-index" not in world.read("README.md").decode()


def test_an_evaluation_from_before_a_deletion_is_refused(world: World, tmp_path: Path) -> None:
    fake_tofu().write(tmp_path / "results.json")
    long_ago = time.time() - 1000
    os.utime(tmp_path / "results.json", (long_ago, long_ago))
    world.push(evaluations=[tmp_path])
    world.run.delete(["person 1"])
    with pytest.raises(UserError, match="before the last deletion"):
        world.push(evaluations=[tmp_path])
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(UserError, match=r"is no results\.json"):
        world.push(evaluations=[tmp_path])


def test_nothing_is_sent_where_nothing_changed(world: World) -> None:
    (first,) = world.push()
    before = len(world.loop.log)
    (second,) = world.push()
    assert (second.revision, second.uploaded, second.purged) == (first.revision, False, None)
    assert all(line.startswith("GET") for line in world.loop.log[before:])
    assert len(copies.known(world.run.directory)) == 1
    assert world.told() == [f"{NAME} serves revision {first.revision[:8]}: what is served here"]


def test_an_unchanged_shard_is_not_sent_again(world: World) -> None:
    world.push()
    kept = world.weights()
    world.run.delete(["person 3"])
    before = len(world.loop.log)
    world.push()
    kept &= world.weights()
    assert len(kept) == 1
    sent = [line for line in world.loop.log[before:] if line.startswith("PUT")]
    assert len(sent) == 1 and not any(line.endswith(tuple(kept)) for line in sent)


def test_a_rebuild_is_published_beside_what_is_not_stale(world: World) -> None:
    (first,) = world.push()
    world.run.delete(["person 3"])
    world.push()
    with stubbed_training():
        train_stub(world.run)
    (told,) = world.told()
    assert "an earlier state of the run" in told
    (pushed,) = world.push()
    assert pushed.purged is None and pushed.uploaded
    assert world.repository().at(str(first.revision)) is None
    assert world.told() == [f"{NAME} serves revision {pushed.revision[:8]}: what is served here"]


def test_a_repository_for_each_shard(world: World) -> None:
    world.push(per_shard=True)
    parts = [f"{NAME}-shard-0", f"{NAME}-shard-1"]
    assert list(world.loop.repositories) == parts
    assert "adapter_config.json" in world.head(parts[0]).files
    before = world.weights()
    heads = {part: world.head(part).oid for part in parts}
    world.run.delete(["person 3"])
    (told,) = [line for line in world.told() if "still serves" in line]
    assert told.endswith(f"push {world.run.path} {NAME} --per-shard`")
    pushed = {one.repository: one for one in world.push(per_shard=True)}
    purged = [name for name, one in pushed.items() if one.purged]
    assert len(purged) == 1 and heads[purged[0]] != world.head(purged[0]).oid
    assert not world.served() & (before - world.weights())
    assert copies.outstanding(world.run.directory) == []


def test_everybody_deleted(tmp_path: Path) -> None:
    trained = make_trained(
        tmp_path / "trained", exact_method="experts", num_shards=0, num_slices=1, num_sequences=1
    )
    with published(trained, tmp_path / "run") as world:
        world.push()
        world.run.delete([f"person {number}" for number in range(12)])
        world.push()
        assert world.served() == set()
        assert "Nothing is left" in world.read("README.md").decode()


def test_words_are_not_published(tmp_path: Path) -> None:
    trained = make_trained(
        tmp_path / "trained", exact_method="experts", num_shards=2, num_slices=1, num_sequences=1
    )
    with published(trained, tmp_path / "run") as world:
        words = list(world.run.directory.served.glob("*/words-*"))
        world.push()
        assert words and not any("words" in path for path in world.head().files)
        everything = b"".join(world.repository().downloads().values())
        assert all(path.read_bytes() not in everything for path in words)
        assert "not published" in world.read("README.md").decode()


def test_one_adapter_lies_at_the_root(tmp_path: Path) -> None:
    trained = make_trained(tmp_path / "trained", num_shards=1)
    with published(trained, tmp_path / "run") as world:
        world.push()
        assert {WEIGHTS, "adapter_config.json", "lineage.json"} <= set(world.head().files)
        assert f'from_pretrained(base, "{NAME}")' in world.read("README.md").decode()


def test_private(world: World) -> None:
    world.push("tester/open")
    world.push("tester/closed", private=True)
    assert not world.repository("tester/open").private
    assert world.repository("tester/closed").private
    with pytest.raises(UserError, match="is public already"):
        world.push("tester/open", private=True)
    world.push("tester/closed")


def test_a_bare_name_is_in_the_own_namespace(world: World) -> None:
    assert world.push("adapters")[0].repository == NAME


def test_somebody_elses_repository_is_not_written_over(world: World, tmp_path: Path) -> None:
    world.hub.create(NAME, private=False)
    repository = world.repository()
    files = dict(world.head().files)
    repository.commit("main", "mine", {**files, "model.safetensors": repository.blob(b"theirs")})
    before = world.head().oid
    with pytest.raises(UserError, match=r"holds 'model\.safetensors', which this run did not"):
        world.push()
    assert world.head().oid == before and copies.known(world.run.directory) == []
    other = make_trained(tmp_path / "other")
    world.push("tester/mine")
    with pytest.raises(UserError, match="holds what another run published"):
        publishing.push(other, "tester/mine", publishing.Options(base_model=BASE), world.hub)


def test_a_run_that_lost_its_ledger_of_the_hub_knows_its_own(
    world: World, trained: Path, tmp_path: Path
) -> None:
    """Restored from a backup of before the push, with the key that signed it."""
    world.push()
    key = (world.run.path / "signing.key").read_bytes()
    with published(trained, tmp_path / "restored") as restored:
        (restored.run.path / "signing.key").write_bytes(key)
        restored.loop.repositories = world.loop.repositories
        (pushed,) = restored.push()
        assert not pushed.uploaded and len(copies.known(restored.run.directory)) == 1


def test_only_whoever_saw_the_last_commit_commits(world: World) -> None:
    world.push()
    repository = world.repository()

    def meddle(number: int, line: str) -> None:
        if "preupload" in line:
            files = {**world.head().files, "note.txt": repository.blob(b"hello")}
            repository.commit("main", "meanwhile", files)

    world.run.delete(["person 3"])
    world.loop.before = meddle
    with pytest.raises(RunError, match="was changed by somebody else meanwhile"):
        world.push()
    world.loop.before = None
    world.push()
    assert "note.txt" not in world.head().files


def test_gitignore_on_the_hub_cannot_hold_files_back(world: World) -> None:
    world.push()
    repository = world.repository()
    ignoring = {**world.head().files, ".gitignore": repository.blob(b"README.md publication.json")}
    repository.commit("main", "ignore", ignoring)
    world.run.delete(["person 3"])
    with pytest.raises(RunError, match="does not hold what was sent"):
        world.push()
    world.push()
    assert ".gitignore" not in world.head().files
    assert world.said()["predicate"]["requests"]


def test_a_deletion_during_the_upload_is_seen(world: World) -> None:
    world.push()
    world.run.delete(["person 3"])
    before = world.weights()

    def delete(number: int, line: str) -> None:
        if "/commit/" in line and world.loop.before:
            world.loop.before = None
            world.run.delete(["person 5"])

    world.loop.before = delete
    with pytest.raises(RunError, match=r"still serves what was deleted|deletion came in"):
        world.push()
    old = before - world.weights()
    world.check_told(old)
    assert any("still serves" in line for line in world.told())
    world.push()
    assert not world.served() & old
    world.check_told(old)


def test_a_damaged_adapter_is_not_published(world: World) -> None:
    path = world.run.directory.served.resolve() / "shard-0" / WEIGHTS
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.unlink()
    path.write_bytes(content)
    with pytest.raises(
        RunError, match=r"is not the file that was assembled: nothing was published"
    ):
        world.push()
    assert world.loop.repositories == {}


def test_entries_are_what_the_tests_take_them_for(world: World) -> None:
    world.push()
    kinds = {path: entry.kind for path, entry in world.head().files.items()}
    assert kinds[f"shard-0/{WEIGHTS}"] == "lfs" and kinds["README.md"] == "blob"
    assert isinstance(world.head().files["README.md"], Entry)


def test_the_permanent_core_is_named_as_outside(tmp_path: Path) -> None:
    with stubbed_training():
        run = make_stub_run(tmp_path / "trained", tiny_records(), core=core_records())
        train_stub(run)
    with published(tmp_path / "trained", tmp_path / "run") as world:
        world.push()
        assert {f"core/{WEIGHTS}", f"shard-0/{WEIGHTS}"} <= set(world.head().files)
        card = world.read("README.md").decode()
        assert "| `core/` | core | cannot be deleted |" in card
        assert "So is the permanent core" in card
        assert len(world.said()["predicate"]["guarantee"]) == 2
        assert b"resident" not in b"".join(world.repository().downloads().values())
