"""Cards: what help, README and docs say of every method is what its file says."""

import re
from dataclasses import dataclass, fields
from pathlib import Path

import pytest

from llm_unlearn.approximate import cards
from llm_unlearn.approximate.arguments import UnlearningConfig
from llm_unlearn.approximate.method import Card, Method, flag, flags
from llm_unlearn.approximate.methods import METHODS, load_method

ROOT = Path(__file__).parents[2]
AGAIN = "run `python -m llm_unlearn.approximate.cards`"


@dataclass
class Made(Method):
    beta: float = flag(
        0.5, "how far | how fast, and a help text that is longer than one line of a terminal"
    )
    refusals: str | None = flag(None, "a file")

    card = Card(
        title="Made up",
        source="Nobody, arXiv 2401.00001, eq. 1; Somebody (arXiv 2402.00002)",
        idea="It does nothing.",
        use_when="Tests run.",
        fails_when="They fail, which is told in words that go on for so long that a line of a terminal is over-full.",
    )
    preset = flags(learning_rate=1e-5, num_train_epochs=10.0, lr_scheduler_type="cosine")
    uses_retain = False
    is_suppression = True


def test_the_docs_page_is_made_of_the_cards() -> None:
    assert (ROOT / "docs" / "methods.md").read_text() == cards.docs_page(), AGAIN


def test_the_readme_shows_the_table() -> None:
    readme = (ROOT / "README.md").read_text()
    assert cards.with_table(readme) == readme, AGAIN
    assert all(readme.count(mark) == 1 for mark in cards.MARKS)


def test_a_card_as_text() -> None:
    assert cards.describe(Made).splitlines() == [
        "Made up",
        "",
        "Idea: It does nothing.",
        "Use it when: Tests run.",
        "It fails when: They fail, which is told in words that go on for so long that a line of a terminal is",
        "    over-full.",
        "Source: Nobody, arXiv 2401.00001, eq. 1; Somebody (arXiv 2402.00002)",
        "Preset for --full (a LoRA: ten times the learning rate): learning_rate 1e-05, num_train_epochs 10,",
        "    lr_scheduler_type cosine",
        "Note: needs no retain data; suppresses, does not remove",
        "",
        "Its own flags:",
        "    --beta 0.5                    how far | how fast, and a help text that is longer than one line",
        "                                  of a terminal",
        "    --refusals (not set)          a file",
        "",
        cards.ALL_FLAGS,
    ]


def test_a_card_as_markdown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cards, "METHODS", {"made": ""})
    monkeypatch.setattr(cards, "load_method", lambda name: Made)
    page = cards.docs_page()
    assert "## `made`: Made up\n\nIt does nothing.\n\n- **Use it when**: Tests run.\n" in page
    assert "**Differs**" not in page, "there is nothing to say"
    assert "The common defaults are learning_rate 1e-05, num_train_epochs 10," in page
    assert (
        "\n| flag | default |  |\n| --- | --- | --- |\n| `--beta` | 0.5 | how far &#124; how fast"
        in page
    )
    assert cards.with_table("a <!-- methods -->old<!-- /methods --> z") == (
        "a <!-- methods -->\n| `--method` |  |  | source |\n| --- | --- | --- | --- |\n| `made` | Made up | "
        "needs no retain data; suppresses, does not remove | [2401.00001](https://arxiv.org/abs/2401.00001) |\n"
        "<!-- /methods --> z"
    )


@pytest.mark.parametrize("name", METHODS)
def test_every_method_says_what_a_person_needs_to_know(name: str) -> None:
    method = load_method(name)
    card = method.card
    for told in (card.title, card.idea, card.use_when, card.fails_when):
        assert told.strip() == told and told
    assert re.search(r"\d{4}\.\d{5}", card.source), "a paper"
    assert all(one.metadata["help"] for one in fields(method))
    known = {one.name for one in fields(UnlearningConfig)}
    assert set(method.preset) <= known, "a preset is of training flags"
    assert not {one.name for one in fields(method)} & known, "a flag has one meaning"
    assert ("no retain data" in cards.describe(method)) is not method.uses_retain
    assert ("does not remove" in cards.notes_of(method)) is method.is_suppression


def test_titles_tell_methods_apart() -> None:
    titles = [load_method(name).card.title for name in METHODS]
    assert len(set(titles)) == len(titles)
    listed = cards.one_line_each().splitlines()
    assert [line.split()[0] for line in listed] == list(METHODS)
    assert len({line.index(title) for line, title in zip(listed, titles, strict=True)}) == 1
