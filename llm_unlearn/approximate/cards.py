"""The methods' cards as help text, as the README's table and as a page of the docs.

Imports no torch: `--help` is quick.
"""

import textwrap
from dataclasses import fields

from llm_unlearn.approximate.method import Method
from llm_unlearn.approximate.methods import METHODS, load_method

WIDTH = 100
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
        (card.title, ""),
        ("Idea", card.idea),
        ("Use it when", card.use_when),
        ("It fails when", card.fails_when),
        ("Differs", card.differs),
        ("Source", card.source),
        ("Preset", preset_of(method)),
    ]
    lines = []
    for name, told in parts:
        if told:
            lines += textwrap.wrap(f"{name}: {told}", WIDTH, subsequent_indent="    ")
        elif name == card.title:
            lines += [card.title, ""]
    return "\n".join([*lines, "", "Its own flags:", *flags_of(method)])


def flags_of(method: type[Method]) -> list[str]:
    """One line for each flag: name, default, what it is."""
    found = [
        f"    --{one.name} {one.default} ".ljust(34) + one.metadata.get("help", "")
        for one in fields(method)
    ]
    return found or ["    none"]


def preset_of(method: type[Method]) -> str:
    told = [f"{name} {value}" for name, value in method.preset.items()]
    told += [] if method.uses_retain else ["no retain data"]
    told += ["works on weights that are there (--full, or a given adapter)"] * method.needs_weights
    told += ["suppression, not removal"] * method.is_suppression
    return ", ".join(told) or "the common defaults"


def readme_table() -> str:
    """The README's table of methods."""
    rows = [
        f"| `{name}` | {load_method(name).card.title} | {short_source(load_method(name))} |"
        for name in METHODS
    ]
    return "\n".join(["| `--method` | | source |", "|---|---|---|", *rows])


def short_source(method: type[Method]) -> str:
    """The first work that the card names."""
    return method.card.source.split(";")[0]


def docs_page() -> str:
    """Every card, as Markdown."""
    parts = [PAGE_HEAD]
    for name in METHODS:
        method = load_method(name)
        card = method.card
        parts.append(f"\n## `{name}`: {card.title}\n\n{card.idea}\n")
        parts.append(f"- **Use it when**: {card.use_when}\n- **It fails when**: {card.fails_when}")
        if card.differs:
            parts.append(f"- **Differs**: {card.differs}")
        parts.append(f"- **Source**: {card.source}\n- **Preset**: {preset_of(method)}")
        if fields(method):
            flags = "\n".join(
                f"| `--{f.name}` | {f.default} | {f.metadata['help']} |" for f in fields(method)
            )
            parts.append(f"\n| flag | default | |\n|---|---|---|\n{flags}")
    return "\n".join(parts) + "\n"


def main() -> None:
    """Write `docs/methods.md` and the README's table, between its marks."""
    from pathlib import Path

    root = Path(__file__).parents[2]
    (root / "docs" / "methods.md").write_text(docs_page())
    readme = (root / "README.md").read_text()
    before, rest = readme.split("<!-- methods -->")
    after = rest.split("<!-- /methods -->")[1]
    marked = f"<!-- methods -->\n{readme_table()}\n<!-- /methods -->"
    (root / "README.md").write_text(before + marked + after)


if __name__ == "__main__":
    main()
