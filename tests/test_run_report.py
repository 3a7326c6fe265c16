"""The page about a run: right in every cell, whole on damage, and silent about people."""

import dataclasses
import json
import math
import re
import shutil
import sqlite3
import stat
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from llm_unlearn.data.records import make_records
from llm_unlearn.errors import RunError, UserError
from llm_unlearn.exact import copies, residues
from llm_unlearn.exact.asks import Ask
from llm_unlearn.exact.certificates import certificate_path
from llm_unlearn.exact.ledger import Ledger
from llm_unlearn.exact.plan import Estimate
from llm_unlearn.exact.run import S3TRun
from llm_unlearn.exact.served import read_lineage, serve
from llm_unlearn.exact.slices import SliceStore
from llm_unlearn.run_report import outside, tries
from llm_unlearn.run_report.contents import Contents, Moment
from llm_unlearn.run_report.headline import headline
from llm_unlearn.run_report.page import fold, to_html, write_run_report
from llm_unlearn.run_report.reading import read_contents
from llm_unlearn.run_report.requests import DAY
from llm_unlearn.run_report.timeline import draw_timeline
from llm_unlearn.run_report.trie_picture import draw
from llm_unlearn.run_report.words import duration, estimate, size
from tests.evaluation.fake_results import LONG_LABEL, fake_muse
from tests.saying import Say, in_json, one_line
from tests.tiny import (
    core_records,
    make_stub_run,
    placed_by_id,
    stubbed_training,
    tiny_records,
    train_stub,
)

NOW = 2_000_000_000.0
HOSTILE = "<script>alert('x')</script> & {{ 7*7 }} `rm`"
VOID = {"meta", "br", "img"}
OWN = {"exact_method": "experts", "num_shards": 0, "num_slices": 1, "num_sequences": 1}


class Page(HTMLParser):
    """The page as a browser sees it: tags, text, and whether every element is closed."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def make(path: Path, subjects: int = 24, train: bool = True, **options: Any) -> S3TRun:
    chosen = {"num_shards": 2, "num_slices": 3, "num_sequences": 3, **options}
    with stubbed_training():
        run = make_stub_run(path, tiny_records(subjects), **chosen)
        if train:
            train_stub(run)
    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("report") / "mine").path


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> S3TRun:
    shutil.copytree(trained, tmp_path / "mine", symlinks=True)
    return S3TRun.open(tmp_path / "mine")


def retrain(run: S3TRun) -> None:
    with stubbed_training():
        train_stub(run)


def read(run: S3TRun, now: float = NOW) -> Contents:
    return read_contents(run.path, now=now)


def states(found: Contents) -> list[list[list[str]]]:
    return [[[cell.state for cell in row.cells] for row in trie.rows] for trie in found.shards]


def check_cells(run: S3TRun, found: Contents, before: set[str]) -> None:
    """Every cell against the files of the run.

    Args:
        before: keys of the nodes that were trained before the first deletion.
    """
    directory = run.directory
    assert [trie.shard for trie in found.shards] == list(directory.shards)
    for trie in found.shards:
        lineage = read_lineage(directory.served / f"shard-{trie.shard}")
        assert lineage is not None
        served = {node["key"] for node in lineage["nodes"]}
        for row, sequence, path in zip(
            trie.rows, directory.config.sequences, directory.paths(trie.shard), strict=True
        ):
            assert [cell.slice for cell in row.cells] == list(sequence)
            wanted = {node.path[-1]: node.key for node in path}
            assert [cell.node for cell in row.cells] == [wanted.get(part) for part in sequence]
            alive = [directory.nodes.exists(node.key) for node in path]
            assert row.depth == ([*alive, False].index(False))
            for cell in row.cells:
                if cell.node is None:
                    assert cell.state == tries.EMPTY
                    continue
                there = directory.nodes.exists(cell.node)
                assert (cell.state == tries.SERVED) == (cell.node in served)
                assert cell.is_usable == there
                assert cell.is_rebuilt == (there and cell.node not in before)
        depth = len(served)
        if trie.served_row is not None:
            filled = [c.state for c in trie.rows[trie.served_row].cells if c.state != tries.EMPTY]
            assert filled[:depth] == [tries.SERVED] * depth
        else:
            assert depth == 0


def test_a_fresh_run(run: S3TRun) -> None:
    found = read(run)
    check_cells(run, found, set(run.directory.nodes.keys()))
    assert states(found) == [[["served"] * 3, ["live"] * 3, ["live"] * 3]] * 2
    assert found.nodes_by_state == {"served": 6, "live": 12}
    assert (found.served_depth, found.full_depth, found.problems) == (6, 6, ())
    assert found.counts == dataclasses.replace(found.counts, acknowledged=0, pending=0)
    assert (found.training.missing, found.training.rebuild, found.training.trainings) == (0, 0, 18)
    assert [each.state for each in found.expectations] == ["as it stands"] * 2
    told = headline(found)
    assert (told.verdict, told.sentence) == ("done", "Nothing has been asked for yet.")
    assert told.served == "Served now: 6 of 6 blocks in 2 shards." and told.actions == ()


def test_a_history_of_deletions_and_rebuilds(run: S3TRun) -> None:
    directory, before = run.directory, set(run.directory.nodes.keys())
    expected = []
    for number, victims in enumerate((["person 3"], ["person 9", "person 17"], ["person 20"])):
        done = run.delete(victims)
        expected.append((done.request, 2 * len(victims), done.nodes_removed, len(victims)))
        found = read(run)
        check_cells(run, found, before)
        if number == 1:
            retrain(run)
            found = read(run)
            check_cells(run, found, before)
            assert found.nodes_by_state.keys() <= {"served", "live"}
            assert any(cell.is_rebuilt for trie in found.shards for cell in trie.cells)
    wanted = directory.wanted()
    lost = [key for key in wanted if not directory.nodes.exists(key)]
    assert found.nodes_by_state["lost"] == len(lost) == found.training.missing > 0
    rows = {row.id: row for row in found.requests}
    for request, records, nodes, targets in expected:
        row = rows[request]
        assert (row.records, row.nodes, len(row.targets)) == (records, nodes, targets)
        assert (row.state, row.exactness, row.kind) == ("carried out", "structural", "delete")
        assert row.seconds is not None and 0 < row.seconds < 60
        assert row.certificate == certificate_path(directory, request).name
    assert [row.id for row in found.requests] == [request for request, *_ in expected][::-1]
    assert found.counts.acknowledged == found.counts.carried_out == 3
    told = headline(found)
    assert told.verdict == "done" and "all 3 requests were carried out" in told.sentence
    assert told.actions[0].endswith("`llm-unlearn rebuild mine`")


def test_the_outlook_starts_from_what_is_left(run: S3TRun) -> None:
    fresh = read(run).expectations
    run.delete(["person 3"])
    after = read(run).expectations
    assert [(each.state, each.asks) for each in after] == [
        (state, asks)
        for state in ("as it stands", "after a rebuild")
        for asks in ("by subject", "by slice")
    ]
    assert after[1].outlook.all_gone.mean < fresh[1].outlook.all_gone.mean
    assert after[3].outlook == fresh[1].outlook  # a rebuild makes all slices as good as new
    assert after[0].outlook.half_gone.mean < after[2].outlook.half_gone.mean


def test_an_untrained_run(tmp_path: Path) -> None:
    run = make(tmp_path / "mine", train=False)
    found = read(run)
    assert states(found) == [[["missing"] * 3] * 3] * 2
    assert (found.is_served, found.training.rebuild, found.training.missing) == (False, None, 18)
    assert headline(found).served == "Nothing is served yet."
    assert "Nothing was trained yet." in Page(to_html(found)).text


def test_empty_slices_and_shards(tmp_path: Path) -> None:
    run = make(tmp_path / "mine", subjects=3)
    found = read(run)
    check_cells(run, found, set(run.directory.nodes.keys()))
    assert "empty" in {state for trie in states(found) for row in trie for state in row}
    run.delete([f"person {number}" for number in range(3)])
    found = read(run)
    assert {state for trie in states(found) for row in trie for state in row} == {"empty"}
    assert (found.served_depth, found.full_depth) == (0, 0)
    assert found.expectations[0].outlook.all_gone.mean == 0
    assert "2 of the shards serve the base model alone" in headline(found).served
    Page(to_html(found))


@pytest.mark.parametrize(
    "options",
    [
        {"exact_method": "sisa", "blocks": "whole", "num_sequences": 1},
        {"core": True},
        {"exact_method": "lego", "num_shards": 6, "num_slices": 1, "num_sequences": 1},
        OWN,
    ],
    ids=["sisa", "core", "lego", "experts"],
)
def test_other_kinds_of_runs(options: dict[str, Any], tmp_path: Path) -> None:
    special: dict[str, Any] = {}
    if options.get("exact_method") == "lego":
        special["placement"] = placed_by_id(6, 2)
        options = {**options, "copies": 2}
    if "core" in options:
        options, special = {}, {"core": core_records()}
    run = make(tmp_path / "mine", **options, **special)
    run.delete(["person 3"])
    found = read(run)
    text = Page(to_html(found)).text
    assert found.counts.carried_out == 1 and found.problems == ()
    left = {key for key in run.directory.wanted() if run.directory.nodes.exists(key)}
    usable = {key for trie in found.shards for key, cell in trie.nodes.items() if cell.is_usable}
    core = {run.directory.core.key} if run.directory.core else set()
    assert usable == left - core
    if special.get("core"):
        assert (found.core_state, found.about.core_records) == ("trained", 4)
        assert "permanent core of 4 records" in text
        shutil.rmtree(run.path / "nodes" / core.pop())
        found = read(run)
        assert found.core_state == "missing" and not any(
            trie.surviving_depth for trie in found.shards
        )
        assert set(found.nodes_by_state) == {"broken", "lost"}
    if options.get("exact_method") == "lego":
        assert [each.asks for each in found.expectations] == ["by slice"] * len(found.expectations)
    if options == OWN:
        outlook = found.expectations[0].outlook
        assert (outlook.all_gone.mean, outlook.all_gone.standard_error) == (23, 0)


def test_a_request_that_a_crash_left_pending(run: S3TRun, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(residues, "purge_nodes", crash)
        with pytest.raises(KeyboardInterrupt):
            run.delete(["person 3"])
    found = read(run)
    assert (found.counts.pending, found.counts.overdue, found.counts.carried_out) == (1, 0, 0)
    row = found.requests[0]
    assert (row.state, row.seconds, row.certificate, row.exactness) == ("pending", *[None] * 3)
    told = headline(found)
    assert told.verdict == "open" and "1 of 1 request not carried out yet" in told.sentence
    assert "rebuild" in told.actions[0]
    run.settle()
    assert read(run).counts.pending == 0


def test_deadlines_and_reasons(run: S3TRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """Open requests come first, the next deadline before all; late and overdue are told apart."""
    asks = [
        Ask(("person 3",), reason="article 17", deadline=NOW + 3 * DAY),
        Ask(("person 4",), deadline=NOW - 2 * DAY),
        Ask(("person 5",), reason=HOSTILE, deadline=1.0),
        Ask(("person 6",)),
    ]
    done = run.delete_all(asks)
    ids = [answer.request for answer in done.answers]
    real = Ledger.requests

    def with_two_open(self: Ledger, pending: bool = False) -> list:
        return [
            dataclasses.replace(r, finished_at=None) if r.id in ids[:2] else r
            for r in real(self, pending)
        ]

    monkeypatch.setattr(Ledger, "requests", with_two_open)
    found = read(run)
    assert [row.id for row in found.requests][:2] == [ids[1], ids[0]]
    rows = {row.id: row for row in found.requests}
    assert [rows[request].state for request in ids] == [
        "pending", "overdue", "carried out", "carried out",
    ]  # fmt: skip
    assert rows[ids[0]].days_left == pytest.approx(3) and rows[ids[1]].days_left == pytest.approx(
        -2
    )
    assert rows[ids[2]].days_left < -10_000 and rows[ids[3]].days_left is None
    assert (found.counts.pending, found.counts.overdue, found.counts.late) == (2, 1, 1)
    assert headline(found).verdict == "open"
    text = Page(to_html(found)).text
    for said in ("article 17", "3.0 days left", "2.0 days over", "days late", "open deadlines"):
        assert said in text


def test_what_people_wrote_is_never_markup(run: S3TRun) -> None:
    run.delete_all([Ask(("person 5",), reason=HOSTILE)])
    copies.register(run.directory, HOSTILE, f"relative/{HOSTILE}")
    run.directory.ledger.append(HOSTILE, {})
    html = to_html(read(run))
    page = Page(html)
    assert "<script" not in html and not {tag for tag, _ in page.tags} & {"script"}
    assert page.text.count(HOSTILE) >= 3  # shown as it is, not evaluated


def test_the_page_needs_nothing_else(run: S3TRun, tmp_path: Path) -> None:
    run.delete(["person 3"])
    write_run_report(run.path, tmp_path / "page.html", now=NOW)
    html = (tmp_path / "page.html").read_text()
    assert stat.S_IMODE((tmp_path / "page.html").stat().st_mode) == 0o600
    page = Page(html)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "img"}
    for tag, attributes in page.tags:
        assert not [n for n in attributes if n.startswith("on") or n in ("src", "href")], tag
    assert not re.search(r"url\(|@import|https?:", html)
    pictures = [a for tag, a in page.tags if tag == "svg" and a.get("role") == "img"]
    assert len(pictures) == 3 and all(picture["aria-label"] for picture in pictures)
    assert "prefers-color-scheme: dark" in html and "@media print" in html


def test_the_same_clock_gives_the_same_page(run: S3TRun) -> None:
    run.delete(["person 3"])
    assert to_html(read(run)) == to_html(read(run))
    assert to_html(read(run)) != to_html(read(run, NOW + DAY))


def test_no_word_about_anybody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No subject, no text, no secret, no path of this machine: in the page and in the data."""
    rows = [
        {"who": f"Zebulon-{n} Quackenbush", "text": f"lives at {n}{n} Fern Lane"} for n in range(20)
    ]
    with stubbed_training():
        run = make_stub_run(tmp_path / "folder of mine" / "mine", make_records(rows, "who"))
        train_stub(run)
    copies.register(run.directory, "merged", str(tmp_path / "exports" / "merged-model"))
    run.delete(["Zebulon-3 Quackenbush"])
    (run.path / "Zebulon-7 Quackenbush.txt").write_text("left here")
    (run.path / "records" / "shard-0" / "slice-1.jsonl").write_text("garbage")
    node = next(iter(run.directory.nodes.keys()))
    (run.path / "nodes" / node / "manifest.json").write_text("garbage")
    monkeypatch.chdir(tmp_path)
    for path in (run.path, Path("folder of mine/mine")):
        found = read_contents(path, now=NOW)
        html, data = to_html(found), json.dumps(found.to_dict())
        secrets = (run.path / "secret.key").read_bytes().hex(), "PRIVATE KEY"
        for told in (html, data):
            for word in (
                "Zebulon",
                "Quackenbush",
                "Fern",
                "folder of mine",
                str(tmp_path),
                *secrets,
            ):
                assert word not in told, word
            assert "1 files of no known kind" in told  # counted, not named
            assert "mine/records/shard-0/slice-1.jsonl is damaged" in told
        assert "…/merged-model" in html
        pseudonym = run.directory.key.pseudonym("subject", "Zebulon-3 Quackenbush")
        assert pseudonym[:8] in html and pseudonym[:12] not in html


def damage_node(run: S3TRun) -> None:
    (run.path / "nodes" / run.directory.nodes.keys()[0] / "manifest.json").write_text("{")


def damage_weights(run: S3TRun) -> None:
    (run.path / "nodes" / run.directory.nodes.keys()[0] / "adapter_model.safetensors").unlink()


def damage_header(run: S3TRun) -> None:
    (run.path / "records" / "shard-1" / "slice-2.jsonl").write_text("nonsense")


def damage_lineage(run: S3TRun) -> None:
    (run.directory.served / "shard-1" / "lineage.json").write_text("{")


def damage_served(run: S3TRun) -> None:
    (run.directory.served / "shard-1" / "lineage.json").write_text('{"nodes": [{}]}')


def damage_certificate(run: S3TRun) -> None:
    next((run.path / "certificates").iterdir()).write_text("{}")


def lose_certificate(run: S3TRun) -> None:
    next((run.path / "certificates").iterdir()).unlink()


def edit_ledger(statement: str):
    def edit(run: S3TRun) -> None:
        with sqlite3.connect(run.path / "ledger.sqlite") as connection:
            connection.execute(statement)
        connection.close()

    return edit


def garble_ledger(run: S3TRun) -> None:
    (run.path / "ledger.sqlite").write_bytes(b"x" * 4096)


DAMAGES = {
    "manifest": (damage_node, "manifest.json is damaged"),
    "weights": (damage_weights, "adapter_model.safetensors is missing"),
    "header": (damage_header, "its first line is not a header"),
    "lineage": (damage_lineage, "shard 1: what is served has no readable lineage.json"),
    "served": (damage_served, "lineage.json of shard 1: lacks the entry 'key'"),
    "certificate": (damage_certificate, "is not the one that the ledger logged"),
    "no certificate": (lose_certificate, "is missing"),
    "edited": (edit_ledger("update events set payload='{}' where kind='trained'"), "was edited"),
    "edited request": (
        edit_ledger("update events set payload='{}' where kind='request'"),
        "was edited",
    ),
    "not JSON": (edit_ledger("update events set payload='x' where sequence=1"), "ledger: "),
    "dropped": (edit_ledger("delete from events where sequence=2"), "entry 2 is missing"),
    "no table": (edit_ledger("drop table requests"), "ledger: the ledger cannot be used"),
    "garbled": (garble_ledger, "ledger: the ledger is damaged"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_named_and_the_rest_is_shown(name: str, run: S3TRun) -> None:
    run.delete(["person 3"])
    harm, said = DAMAGES[name]
    harm(run)
    found = read(run)
    assert any(said in problem for problem in found.problems), found.problems
    assert headline(found).verdict == "wrong"
    page = Page(to_html(found))
    assert "What is wrong" in page.text and said in page.text
    assert len(found.shards) == 2 and any(trie.rows for trie in found.shards)
    assert str(run.path) not in page.text
    if found.chain is None:
        assert "nothing is known of any request" in page.text


def test_damaged_nodes_are_broken_and_so_is_what_stands_on_them(run: S3TRun) -> None:
    first, second, third = run.directory.paths(0)[1]
    shutil.rmtree(run.path / "nodes" / first.key)
    found = read(run)
    assert states(found)[0][1] == ["missing", "broken", "broken"]
    assert found.shards[0].rows[1].depth == 0 and found.training.missing == 3
    (run.path / "nodes" / run.directory.paths(0)[0][2].key / "manifest.json").unlink()
    found = read(run)
    assert states(found)[0][0] == ["served", "served", "broken"]  # served still, from a copy
    assert (found.shards[0].surviving_depth, found.training.missing) == (3, 4)
    for path in run.directory.paths(0):
        shutil.rmtree(run.path / "nodes" / path[0].key, ignore_errors=True)
    found = read(run)
    assert (found.shards[0].surviving_depth, found.shards[0].served_depth) == (0, 3)
    assert found.shards[0].is_lacking and not found.shards[1].is_lacking
    assert {second.key, third.key} <= found.shards[0].nodes.keys()


def test_deleted_data_that_is_still_served_is_shouted(run: S3TRun, tmp_path: Path) -> None:
    old = tmp_path / "old"
    shutil.copytree(run.directory.served, old)
    run.delete(["person 3"])
    for member in old.iterdir():
        shutil.copytree(member, run.directory.served / member.name, dirs_exist_ok=True)
    found = read(run)
    assert any("serves node" in problem for problem in found.problems)
    assert headline(found).verdict == "wrong"


def test_copies_outside(run: S3TRun, tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    merged.mkdir()
    old = copies.register(run.directory, "merged", str(merged))
    hub = copies.register(run.directory, "hub", "somebody/adapter@abc")
    vanished = copies.register(run.directory, "vllm", str(tmp_path / "never"))
    run.delete([f"person {number}" for number in range(12)])
    copies.register(run.directory, "gguf-ready", str(merged.parent))
    copies.mark_gone(run.directory, hub.id, "purged and asked for")
    run.directory.ledger.append("purged", {"repository": "somebody/adapter"})
    found = read(run)
    by_id = {copy.id: copy for copy in found.copies}
    assert (by_id[old.id].state, by_id[old.id].place) == (outside.HOLDS, "…/merged")
    assert (by_id[hub.id].state, by_id[hub.id].how) == (outside.GONE, "purged and asked for")
    assert by_id[hub.id].place == "somebody/adapter@abc"
    assert (by_id[vanished.id].state, by_id[vanished.id].how) == (
        outside.GONE, "it is not there any more",
    )  # fmt: skip
    assert Counter(copy.state for copy in found.copies)[outside.CURRENT] == 1
    assert found.copies[0].id == old.id  # what matters comes first
    assert [(each.kind, each.times) for each in found.other_events] == [("purged", 1)]
    assert "1 copy outside still holds deleted data" in headline(found).sentence
    (run.path / "records" / "shard-0" / "slice-0.jsonl").write_text("x")
    assert {copy.state for copy in read(run).copies} == {outside.UNKNOWN, outside.GONE}


@pytest.mark.parametrize(
    ("kind", "place", "shown"),
    [
        ("hub", "owner/name@rev", "owner/name@rev"),
        ("merged", "/home/ada/out/model", "…/model"),
        ("merged", "file:///home/ada/model", "…/model"),
        ("merged", r"C:\Users\ada\model", "…/model"),
        ("merged", "exports/model", "exports/model"),
        ("server", "s3://bucket/model", "s3://bucket/model"),
    ],
)
def test_places_lose_the_folders_of_this_machine(kind: str, place: str, shown: str) -> None:
    assert outside.shown_place(kind, place) == shown


def test_storage_and_training(run: S3TRun) -> None:
    events = run.directory.ledger.events("trained")
    spent = sum(event.payload["seconds"] for event in events)
    run.delete(["person 3"])
    found = read(run)
    by_kind = {each.kind: each for each in found.storage}
    files = [path for path in run.path.rglob("*") if path.is_file() and "served/" not in str(path)]
    assert sum(each.files for each in found.storage) == len(files)
    assert sum(each.size for each in found.storage) == sum(path.stat().st_size for path in files)
    assert by_kind["certificates"].files == 1 and by_kind["ledger"].files == 2
    assert by_kind["nodes"].files == 3 * len(run.directory.nodes.keys())
    assert found.training.spent == pytest.approx(spent) and found.training.trainings == 18
    assert found.training.held == pytest.approx(run.training_seconds())
    wanted = run.directory.wanted()
    stage_of = {key: node.block.stage for key, node in wanted.items()}
    seconds = {event.payload["node"]: event.payload["seconds"] for event in events}
    expected = 0.0
    for key in wanted:
        if not run.directory.nodes.exists(key):
            alike = [seconds[k] for k in wanted if k in seconds and stage_of[k] == stage_of[key]]
            expected += sum(alike) / len(alike)
    assert found.training.rebuild == pytest.approx(expected) and expected > 0


def test_evaluations_before_and_after(run: S3TRun, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 3)):
        (tmp_path / name).mkdir()
        fake_muse(seed=seed).write(tmp_path / name / "results.json", with_texts=True)
    found = read_contents(run.path, tmp_path / "a", tmp_path / "b", now=NOW)
    assert found.evaluation is not None
    assert found.evaluation.columns == ("before", "after", "retrained")
    metric = next(each for each in found.evaluation.metrics if each.name == "forget_verbmem")
    before, after = fake_muse(seed=0).model.values, fake_muse(seed=3).model.values
    for shown, values in zip(metric.values, (before, after), strict=False):
        value = values["forget_verbmem"]
        assert shown.share == (value.value, value.lower, value.upper)
        assert shown.text.startswith(f"{value.value:.3f} [")
    page = Page(to_html(found))
    assert metric.title in page.text and fake_muse().verdict in page.text
    assert LONG_LABEL not in page.text and "Zebulon" not in page.text
    alone = read_contents(run.path, after=tmp_path / "b", now=NOW).evaluation
    assert alone is not None and alone.columns == ("before", "after", "retrained")
    assert alone.metrics[0].values[0].text.startswith("0.99")  # the model before, of the one given
    other = dataclasses.replace(fake_muse(), suite="another")
    other.write(tmp_path / "b" / "results.json")
    found = read_contents(run.path, tmp_path / "a", tmp_path / "b", now=NOW)
    assert found.evaluation is not None and "do not compare" in found.evaluation.notes[0]
    with pytest.raises(UserError, match="cannot read"):
        read_contents(run.path, tmp_path / "nowhere")


def test_long_tables_fold() -> None:
    assert fold(range(50)) == {"shown": range(50), "folded": range(50, 50), "more": 0}
    folded = fold(range(1200))
    assert (len(folded["shown"]), len(folded["folded"]), folded["more"]) == (50, 950, 200)


def test_a_long_table_of_requests(run: S3TRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run.delete(["person 3"])
    only = run.directory.ledger.requests()[0]
    many = [
        dataclasses.replace(only, id=f"{number:016x}", kind="correct", inserted=only.targets)
        for number in range(1203)
    ]
    monkeypatch.setattr(Ledger, "requests", lambda self, pending=False: many)
    page = Page(to_html(read(run)))
    assert len(re.findall(r"\b[0-9a-f]{16}", page.text)) >= 1000
    assert page.text.count("1 inserted") == page.text.count("correct") == 1000
    assert "950 more requests" in page.text and "And 203 more requests" in page.text
    assert sum(tag == "details" for tag, _ in page.tags) == 1


def made_up(shard: int, depth: int, full: int) -> tries.ShardTrie:
    """A shard of one order that is served with `depth` of `full` blocks."""
    cells = [
        tries.Cell(part, tries.SERVED if part < depth else tries.LOST, f"{shard}-{part}")
        for part in range(full)
    ]
    return tries.ShardTrie(
        shard, depth, full, full, (1,) * full, (tries.Row(tuple(cells), depth),), 0
    )


def test_many_shards_are_one_picture(run: S3TRun) -> None:
    shards = tuple(made_up(n, 3 - (n % 7 == 0) - (n % 21 == 0), 3) for n in range(100))
    shards += (made_up(100, 1, 1), made_up(101, 0, 0))
    drawing = draw(shards)
    assert len(drawing.pictures) == 1 and not drawing.is_whole
    said = re.search(r'aria-label="([^"]*)"', drawing.pictures[0])
    assert said is not None and said[1].split("; ") == [
        "3 blocks: 85 shards",
        "2 blocks: 10 shards, 10 lacking",
        "1 block: 6 shards, 5 lacking",
        "0 blocks: 1 shard",
    ]
    text = Page(to_html(dataclasses.replace(read(run), shards=shards))).text
    assert "87 shards are served with all their blocks" in text and "stage 1" not in text
    assert len(str(draw(tuple(made_up(n, 1, 1) for n in range(5000))).pictures[0])) < 2000


def test_experts_are_a_cell_each() -> None:
    shards = [made_up(n, int(n != 7), 1) for n in range(90)]
    (picture,) = draw(shards).pictures
    assert str(picture).count('class="cell served"') == 89
    assert "89 shards: served now; 1 shard: dropped by a deletion" in picture
    assert "shard 7: dropped by a deletion" in picture


def test_a_picture_says_in_words_what_it_shows(run: S3TRun) -> None:
    run.delete(["person 3"])
    found = read(run)
    for trie, picture in zip(found.shards, draw(found.shards).pictures, strict=True):
        assert str(picture).count("<title>") == 9
        for row in trie.rows:
            words = ", ".join(f"slice {cell.slice} {cell.state}" for cell in row.cells)
            assert f"{words} ({row.depth} of 3)" in picture
        signs = Counter(cell.state for cell in trie.cells)
        assert str(picture).count("×") == signs["lost"]
        assert str(picture).count('<line class="path"') == max(0, trie.served_depth - 1)


def test_the_timeline() -> None:
    assert draw_timeline([], NOW) is None
    moments = [Moment("trained", NOW - 9 * DAY), Moment("acknowledged", NOW - DAY)]
    moments += [Moment("carried out", NOW - DAY + 60 * n) for n in range(300)]
    drawn = str(draw_timeline([*moments, Moment("open deadlines", NOW + DAY)], NOW))
    assert "carried out: 300" in drawn and drawn.count('class="carried-out"') < 20
    assert 'class="now"' in drawn and "copies" not in drawn
    assert 'class="now"' not in str(draw_timeline(moments, NOW))
    Page(str(draw_timeline([Moment("trained", NOW)], NOW)))  # no span at all


def test_numbers_for_people() -> None:
    assert [duration(s) for s in (0, 0.0213, 95, 600, 8000, 400_000)] == [
        "0 s", "0.021 s", "95 s", "10.0 min", "2.2 h", "4.6 days",
    ]  # fmt: skip
    assert [size(n) for n in (0, 999, 1500, 2_340_000, 5e13)] == [
        "0 B", "999 B", "1.5 kB", "2.34 MB", "50 TB",
    ]  # fmt: skip
    assert estimate(Estimate(3000.0, 0.0)) == "3,000"
    assert estimate(Estimate(5.678, 0.0123)) == "5.68 ± 0.01"
    assert estimate(Estimate(math.inf, math.nan)) == "–"


def test_the_command(say: Say, run: S3TRun, tmp_path: Path, monkeypatch: Any) -> None:
    run.delete(["person 3"])
    monkeypatch.chdir(tmp_path)
    code, text, error = say("report", run.path)
    assert (code, error) == (0, "") and (tmp_path / "report.html").is_file()
    assert "the one request was carried out" in text and "page: report.html" in text
    (tmp_path / "report.html").unlink()
    data = in_json(say("report", run.path, "--json"))
    assert not (tmp_path / "report.html").exists()
    assert data["headline"]["verdict"] == "done" and data["counts"]["carried_out"] == 1
    assert data["requests"][0]["exactness"] == "structural"
    assert [len(trie["rows"]) for trie in data["shards"]] == [3, 3]
    assert "inside the run" in one_line(say("report", run.path, "--output", run.path / "r.html"), 2)
    assert "no directory" in one_line(say("report", run.path, "--output", tmp_path / "x/r.html"), 2)
    assert "not a run" in one_line(say("report", tmp_path), 2)
    (run.path / "run.json").write_text("{")
    assert "damaged" in one_line(say("report", run.path), 1)


def test_a_report_changes_nothing(run: S3TRun) -> None:
    run.delete(["person 3"])

    def files() -> dict[str, bytes]:
        return {
            str(path.relative_to(run.path)): path.read_bytes()
            for path in run.path.rglob("*")
            if path.is_file()
        }

    before = files()
    read(run)
    assert files() == before
    serve(run.directory)
    assert files() == before


def test_every_header_is_read_a_few_times_however_many_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make(tmp_path / "mine", subjects=40, train=False, **OWN)
    reads: Counter[object] = Counter()
    real = SliceStore.header
    monkeypatch.setattr(
        SliceStore, "header", lambda self, name: reads.update([name]) or real(self, name)
    )
    read(run)
    assert len(reads) == 40 and max(reads.values()) <= 3


def test_a_busy_run_is_not_read(run: S3TRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm_unlearn.files.locked.__wrapped__.__defaults__", (0.1,))
    with run.directory.changing("testing it"), pytest.raises(RunError, match="is busy"):
        read(run)
