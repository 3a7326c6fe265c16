"""What people wrote is shown as they wrote it."""

import pytest

from llm_unlearn import console
from llm_unlearn.errors import UserError

WRITTEN = "[/INST] [bold]x[/bold] [red]"


def test_nothing_that_people_wrote_is_markup(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_table(f"title {WRITTEN}", ["name", WRITTEN], [["a", WRITTEN]])
    assert capsys.readouterr().out.count(WRITTEN) == 3
    console.warn(WRITTEN)

    def fail() -> None:
        raise UserError(WRITTEN)

    assert console.exit_code_of(fail) == 2
    assert capsys.readouterr().err.count(WRITTEN) == 2


def test_a_bar_says_what_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "stderr", console.Console(markup=False, force_terminal=True))
    with console.stderr.capture() as shown, console.steps_progress(WRITTEN) as say:
        say(1, 2)
    assert "[/INST] [bold]x" in shown.get()


def test_numbers_stand_right_and_words_left(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [["a", "-1.5", "cat", "0.60 ± 0.02"], ["b", "100%", "elephant", "–"]]
    console.print_table("", ["", "number", "word", "interval"], rows)
    lines = [line for line in capsys.readouterr().out.splitlines() if "│" in line]
    assert [line.split("│")[2:5] for line in lines] == [
        ["   -1.5 ", " cat      ", " 0.60 ± 0.02 "],
        ["   100% ", " elephant ", "           – "],
    ]
