"""The trie as a picture: inline SVG whose colours the style sheet chooses, with words beside it.

Every state has a colour and a sign, so that neither colour nor eyes are needed: each picture carries
the same in words.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from llm_unlearn.run_report.tries import (
    BROKEN,
    EMPTY,
    LIVE,
    LOST,
    MEANINGS,
    MISSING,
    REBUILT,
    SERVED,
    Cell,
    Row,
    ShardTrie,
)
from llm_unlearn.run_report.words import many

SIGNS = {SERVED: "●", LIVE: "○", LOST: "×", MISSING: "·", BROKEN: "!", EMPTY: "–"}
REBUILT_SIGN = "↻"
MOST_SHARDS, MOST_CELLS = 24, 600  # that are drawn one by one

UNREADABLE = Markup('<text class="unreadable" x="0" y="24">! cannot be read</text>')

WIDTH, HEIGHT, GAP = 48, 32, 9
LEFT, TOP, RIGHT = 50, 20, 50
SMALL, PER_LINE = 22, 40


@dataclass(frozen=True)
class Drawing:
    """What stands for the trie.

    Attributes:
        is_whole: a picture for each shard, in their order, with all cells.
        legend: the signs in it, and what they mean.
    """

    pictures: tuple[Markup, ...]
    is_whole: bool
    legend: tuple[tuple[Markup, str], ...]


def draw(tries: Sequence[ShardTrie]) -> Drawing:
    """A picture for each shard; one of all where they are many."""
    cells = sum(len(trie.cells) for trie in tries)
    if not cells:
        return Drawing((), False, ())
    is_flat = all(len(trie.cells) <= 1 for trie in tries)
    if is_flat and len(tries) > 1 and cells <= MOST_CELLS:
        return Drawing((draw_flat(tries),), False, legend(tries))
    if len(tries) <= MOST_SHARDS and cells <= MOST_CELLS:
        return Drawing(tuple(map(draw_shard, tries)), True, legend(tries))
    meaning = (
        (_swatch("complete"), "with all blocks that the shard could have"),
        (_swatch("lacking"), "with fewer"),
    )
    return Drawing((draw_histogram(tries),), False, meaning)


def legend(tries: Sequence[ShardTrie]) -> tuple[tuple[Markup, str], ...]:
    """The states that occur, each with its cell and its meaning."""
    cells = [cell for trie in tries for cell in trie.cells]
    states = {cell.state for cell in cells}
    found = [
        (_sample(Cell(0, state)), meaning) for state, meaning in MEANINGS.items() if state in states
    ]
    if any(cell.is_rebuilt for cell in cells):
        found.append((_sample(Cell(0, SERVED, is_rebuilt=True)), REBUILT))
    return tuple(found)


def in_words(trie: ShardTrie) -> str:
    """What a shard's picture shows, as text."""
    rows = [
        f"order {number}: " + ", ".join(map(_cell_in_words, row.cells)) + f" ({_depth(row)})"
        for number, row in enumerate(trie.rows, start=1)
    ]
    return "; ".join([f"Shard {trie.shard}", *rows])


def draw_shard(trie: ShardTrie) -> Markup:
    """One shard: a row for each sequence, a column for each stage."""
    if not trie.rows:
        return _svg(150, 40, f"Shard {trie.shard} cannot be read", [UNREADABLE])
    stages = len(trie.rows[0].cells)
    width = LEFT + stages * (WIDTH + GAP) + RIGHT
    height = TOP + len(trie.rows) * (HEIGHT + GAP)
    parts = [
        Markup('<text class="head" x="{}" y="12">{}</text>').format(
            LEFT + stage * (WIDTH + GAP) + WIDTH // 2, f"stage {stage + 1}"
        )
        for stage in range(stages)
    ]
    parts += [
        _draw_row(number, row, is_served=trie.served_row == number)
        for number, row in enumerate(trie.rows)
    ]
    return _svg(width, height, in_words(trie), parts)


def draw_flat(tries: Sequence[ShardTrie]) -> Markup:
    """Shards of one block each: a small cell for each of them."""
    shown = [(trie, cell) for trie in tries for cell in trie.cells]
    parts = []
    for number, (trie, cell) in enumerate(shown):
        line, column = divmod(number, PER_LINE)
        said = f"shard {trie.shard}: {_state_in_words(cell)}"
        parts.append(_small(column * SMALL, line * SMALL, cell, said))
    counts = Counter(cell.state for _, cell in shown)
    words = "; ".join(
        f"{many(count, 'shard')}: {MEANINGS[state]}" for state, count in counts.items()
    )
    lines = -(-len(shown) // PER_LINE)
    return _svg(min(len(shown), PER_LINE) * SMALL, lines * SMALL, words, parts)


def draw_histogram(tries: Sequence[ShardTrie]) -> Markup:
    """How many shards are served with how many blocks, and how many of them could have more."""
    complete = Counter(trie.served_depth for trie in tries if not trie.is_lacking)
    lacking = Counter(trie.served_depth for trie in tries if trie.is_lacking)
    deepest = max(trie.full_depth for trie in tries)
    scale = 420 / max((complete + lacking).values())
    parts, words = [], []
    for line, depth in enumerate(range(deepest, -1, -1)):
        total = complete[depth] + lacking[depth]
        said = many(total, "shard") + (f", {lacking[depth]:,} lacking" * (lacking[depth] > 0))
        words.append(f"{many(depth, 'block')}: {said}")
        lengths = [
            max(counts[depth] * scale, 2.0 * (counts[depth] > 0)) for counts in (complete, lacking)
        ]
        parts.append(
            Markup(
                '<text class="end" x="74" y="{base}">{depth}</text>'
                '<rect class="complete" x="84" y="{y}" width="{first:.1f}" height="16"/>'
                '<rect class="lacking" x="{middle:.1f}" y="{y}" width="{second:.1f}" height="16"/>'
                '<text x="{end:.1f}" y="{base}">{said}</text>'
            ).format(
                base=line * 24 + 17,
                y=line * 24 + 4,
                depth=many(depth, "block"),
                first=lengths[0],
                middle=84 + lengths[0],
                second=lengths[1],
                end=92 + sum(lengths),
                said=said,
            )
        )
    return _svg(700, (deepest + 1) * 24 + 4, "; ".join(words), parts)


def _draw_row(number: int, row: Row, is_served: bool) -> Markup:
    y = TOP + number * (HEIGHT + GAP)
    middle = y + HEIGHT // 2
    parts = [
        Markup('<text class="order" x="0" y="{}">order {}</text>').format(middle + 4, number + 1)
    ]
    before: int | None = None
    for stage, cell in enumerate(row.cells):
        x = LEFT + stage * (WIDTH + GAP)
        if cell.state != EMPTY:
            if before is not None:
                kind = "path" if is_served and cell.state == SERVED else f"link {cell.state}"
                parts.append(
                    Markup('<line class="{}" x1="{}" y1="{}" x2="{}" y2="{}"/>').format(
                        kind, before, middle, x, middle
                    )
                )
            before = x + WIDTH
        emphasis = " chosen" if is_served and cell.state == SERVED else ""
        parts.append(_draw_cell(x, y, cell, emphasis))
    end = LEFT + len(row.cells) * (WIDTH + GAP)
    parts.append(
        Markup('<text class="order{}" x="{}" y="{}">{}</text>').format(
            " chosen" if is_served else "", end, middle + 4, _depth(row)
        )
    )
    return Markup("").join(parts)


def _draw_cell(x: int, y: int, cell: Cell, emphasis: str) -> Markup:
    rebuilt = Markup('<text class="rebuilt" x="{}" y="{}">{}</text>').format(
        x + WIDTH - 9, y + 13, REBUILT_SIGN
    )
    return Markup(
        '<g class="cell {state}{emphasis}"><title>{said}</title>'
        '<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="5"/>'
        '<text class="slice" x="{middle}" y="{base}">{part}</text>'
        '<text class="sign" x="{left}" y="{base}">{sign}</text>{rebuilt}</g>'
    ).format(
        state=cell.state,
        emphasis=emphasis,
        said=_cell_in_words(cell),
        x=x,
        y=y,
        width=WIDTH,
        height=HEIGHT,
        middle=x + WIDTH // 2,
        base=y + 21,
        part=cell.slice,
        left=x + 11,
        sign=SIGNS[cell.state],
        rebuilt=rebuilt if cell.is_rebuilt else "",
    )


def _small(x: int, y: int, cell: Cell, said: str) -> Markup:
    return Markup(
        '<g class="cell {}"><title>{}</title><rect x="{}" y="{}" width="18" height="18" rx="3"/>'
        '<text class="small" x="{}" y="{}">{}</text></g>'
    ).format(
        cell.state,
        said,
        x + 2,
        y + 2,
        x + 11,
        y + 15,
        REBUILT_SIGN if cell.is_rebuilt else SIGNS[cell.state],
    )


def _sample(cell: Cell) -> Markup:
    drawn = _small(0, 0, cell, cell.state)
    return Markup('<svg class="sample" width="22" height="22" aria-hidden="true">{}</svg>').format(
        drawn
    )


def _swatch(style: str) -> Markup:
    return Markup(
        '<svg class="sample trie" width="22" height="22" aria-hidden="true">'
        '<rect class="{}" x="2" y="2" width="18" height="18"/></svg>'
    ).format(style)


def _svg(width: int, height: int, words: str, parts: Sequence[Markup]) -> Markup:
    return Markup(
        '<svg class="trie" viewBox="0 0 {w} {h}" width="{w}" height="{h}" role="img" '
        'aria-label="{words}">{parts}</svg>'
    ).format(w=width, h=height, words=words, parts=Markup("\n").join(parts))


def _state_in_words(cell: Cell) -> str:
    return MEANINGS[cell.state] + (f"; {REBUILT}" if cell.is_rebuilt else "")


def _cell_in_words(cell: Cell) -> str:
    return f"slice {cell.slice} {cell.state}" + (" (rebuilt)" if cell.is_rebuilt else "")


def _depth(row: Row) -> str:
    return f"{row.depth} of {sum(cell.state != EMPTY for cell in row.cells)}"
