"""The methods' cards as help text, as the README's table and as a page of the docs.

Imports no torch: `--help` is quick.
"""

import re
import textwrap
from collections.abc import Sequence
from dataclasses import Field, fields

from llm_unlearn.approximate.method import Method
from llm_unlearn.approximate.methods import METHODS, load_method

WIDTH, COLUMN = 100, 34
PRESET = "Preset for --full (a LoRA: ten times the learning rate)"
MARKS = "<!-- methods -->", "<!-- /methods -->"
ALL_FLAGS = "Flags of every method: python recipes/unlearn.py --help"
PAGE_HEAD = """# Approximate methods

One card for each method of `recipes/unlearn.py`; `python recipes/unlearn.py --method NAME --help` prints
the same. None of them carries a guarantee. This page is made from the methods' own files by
`python -m llm_unlearn.approximate.cards`.
"""


def one_line_each() -> str:
    """Name and title of every method, for `--help`."""
    return "\n".join(f"    {name:<18}{load_method(name).card.title}" for name in METHODS)


def describe(method: type[Method]) -> str:
    """A method's card and its own flags, as plain text."""
    card = method.card
    parts = [
        ("Idea", card.idea),
        ("Use it when", card.use_when),
        ("It fails when", card.fails_when),
        ("Differs", card.differs),
        ("Source", card.source),
        (PRESET, preset_of(method)),
        ("Note", notes_of(method)),
    ]
    lines = [card.title, ""]
    for name, told in parts:
        if told:
            lines += _wrap(f"{name}: {told}", WIDTH, "    ")
    return "\n".join([*lines, "", "Its own flags:", *flags_of(method), "", ALL_FLAGS])


def flags_of(method: type[Method]) -> list[str]:
    """Name, default and meaning of each flag, in two columns."""
    lines = []
    for one in fields(method):
        head = f"    --{one.name} {default_of(one)}  "
        told = _wrap(one.metadata["help"], WIDTH - COLUMN)
        lines += [head.ljust(COLUMN) + told[0], *(" " * COLUMN + more for more in told[1:])]
    return lines or ["    none"]


def _wrap(text: str, width: int, indent: str = "") -> list[str]:
    """Lines of words; a flag is one word."""
    return textwrap.wrap(text, width, subsequent_indent=indent, break_on_hyphens=False)


def default_of(one: Field) -> str:
    return "(not set)" if one.default in (None, "") else str(one.default)


def preset_of(method: type[Method]) -> str:
    told = [f"{name} {_number(value)}" for name, value in method.preset.items()]
    return ", ".join(told) or ("the common defaults" if method.trains else "nothing is trained")


def notes_of(method: type[Method]) -> str:
    """What it needs and is; empty where there is nothing to say."""
    told = [] if method.uses_retain else ["needs no retain data"]
    told += ["works on weights that are there (--full, or a given adapter)"] * method.needs_weights
    told += ["needs --full"] * method.needs_full
    told += ["suppresses, does not remove"] * method.is_suppression
    return "; ".join(told)


def _number(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def readme_table() -> str:
    """The README's table of methods."""
    rows = []
    for name in METHODS:
        method = load_method(name)
        rows.append([f"`{name}`", method.card.title, notes_of(method), short_source(method)])
    return table(["`--method`", "", "", "source"], rows)


def short_source(method: type[Method]) -> str:
    """The first paper that the card names, as a link."""
    number = re.search(r"\d{4}\.\d{5}", method.card.source)
    return f"[{number[0]}](https://arxiv.org/abs/{number[0]})" if number else method.card.source


def docs_page() -> str:
    """Every card, as Markdown."""
    from llm_unlearn.approximate.arguments import COMMON

    common = [f"{name} {_number(value)}" for name, value in COMMON.items() if value is not None]
    defaults = textwrap.fill(f"The common defaults are {', '.join(common)}.", WIDTH)
    return "\n".join(
        [PAGE_HEAD, f"{defaults}\n", *(_section(name, load_method(name)) for name in METHODS)]
    )


def _section(name: str, method: type[Method]) -> str:
    card = method.card
    points = {
        "Use it when": card.use_when,
        "It fails when": card.fails_when,
        "Differs": card.differs,
        "Source": card.source,
        PRESET: preset_of(method),
        "Note": notes_of(method),
    }
    told = "\n".join(f"- **{point}**: {text}" for point, text in points.items() if text)
    section = f"## `{name}`: {card.title}\n\n{card.idea}\n\n{told}\n"
    rows = [[f"`--{f.name}`", default_of(f), f.metadata["help"]] for f in fields(method)]
    return section + (f"\n{table(['flag', 'default', ''], rows)}\n" if rows else "")


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown; a bar in a cell is no border."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(
        f"| {' | '.join(one.replace('|', '&#124;') for one in line)} |" for line in lines
    )


def with_table(readme: str) -> str:
    """The README with the table between its marks."""
    before, rest = readme.split(MARKS[0])
    _, after = rest.split(MARKS[1])
    return f"{before}{MARKS[0]}\n{readme_table()}\n{MARKS[1]}{after}"


def main() -> None:
    """Write `docs/methods.md` and the README's table, between its marks."""
    from pathlib import Path

    root = Path(__file__).parents[2]
    readme = root / "README.md"
    (root / "docs" / "methods.md").write_text(docs_page())
    readme.write_text(with_table(readme.read_text()))


if __name__ == "__main__":
    main()
