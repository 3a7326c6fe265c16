"""Near-duplicates: everything that is similar is found, and nothing else, against plain loops."""

import random

import pytest
from datasketch import MinHash, MinHashLSH
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llm_unlearn.data import near_duplicates
from llm_unlearn.data.near_duplicates import NearDuplicates, jaccard, normalised, shingles
from llm_unlearn.data.records import Record
from llm_unlearn.errors import UserError

# Few letters, so that grams repeat within texts and between them.
TEXTS = st.lists(st.text("ab é", max_size=24), max_size=12)
THRESHOLDS = st.sampled_from([0.01, 0.3, 0.5, 2 / 3, 0.8, 0.95, 1.0])


def plain_grams(text: str) -> set[str]:
    filled = text + " " * max(0, 5 - len(text))
    return {filled[i : i + 5] for i in range(len(filled) - 4)}


def plain_matches(
    known: list[str], texts: list[str], threshold: float
) -> dict[tuple[int, int], float]:
    """Every pair, compared one by one."""
    found = {}
    for row, text in enumerate(texts):
        for other, candidate in enumerate(known):
            first, second = plain_grams(text), plain_grams(candidate)
            similarity = len(first & second) / len(first | second)
            if similarity >= threshold:
                found[row, other] = similarity
    return found


@given(TEXTS, TEXTS, THRESHOLDS)
@settings(max_examples=300, deadline=None)
@example(["", "ab"], ["", "ab", "ab "], 1.0)
@example([], ["aaaaa"], 0.5)
@example(["a" * 30], ["a" * 5, "a" * 4], 1.0)
def test_agrees_with_brute_force(known: list[str], texts: list[str], threshold: float) -> None:
    matches = list(NearDuplicates(known, threshold).find(texts))
    found = {(match.row, match.known): match.similarity for match in matches}
    assert len(found) == len(matches)
    assert found == plain_matches(known, texts, threshold)
    assert all(match.is_exact == (texts[match.row] == known[match.known]) for match in matches)


def edited(text: str, edits: int, generator: random.Random) -> str:
    letters = list(text)
    for _ in range(edits):
        letters[generator.randrange(len(letters))] = generator.choice("abcdefghij ")
    return "".join(letters)


@pytest.mark.parametrize("length", [60, 900, 6000])
def test_agrees_on_long_texts(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond what a signature has bits for, in several steps, on both sides of the threshold."""
    monkeypatch.setattr(near_duplicates, "PAIRS_AT_ONCE", 10)
    monkeypatch.setattr(near_duplicates, "AT_ONCE", 7)
    generator = random.Random(length)
    known = ["".join(generator.choices("abcdefghij ", k=length)) for _ in range(4)]
    texts = [
        edited(text, edits, generator)
        for text in known
        for edits in range(0, 5 + length // 16, 1 + length // 160)
    ]
    expected = plain_matches(known, texts, 0.8)
    assert 0 < len(expected) < len(texts)
    assert {(m.row, m.known): m.similarity for m in NearDuplicates(known).find(texts)} == expected


def test_finds_what_minhash_finds_and_misses() -> None:
    """An existing library agrees on what is similar; it misses some of it, at any number of bands."""
    generator = random.Random(5)
    known = ["".join(generator.choices("abcdefghij ", k=100)) for _ in range(40)]
    texts = [edited(text, edits, generator) for text in known for edits in (1, 2, 3, 4, 5)]
    sketches = MinHashLSH(threshold=0.8, num_perm=128)

    def sketch(text: str) -> MinHash:
        made = MinHash(num_perm=128)
        made.update_batch([gram.encode() for gram in shingles(text)])
        return made

    for number, text in enumerate(known):
        sketches.insert(number, sketch(text))
    theirs = {
        (row, number) for row, text in enumerate(texts) for number in sketches.query(sketch(text))
    }
    ours = {(match.row, match.known) for match in NearDuplicates(known, 0.8).find(texts)}
    similar = {(r, n) for r, n in theirs if jaccard(shingles(texts[r]), shingles(known[n])) >= 0.8}
    assert similar and similar < ours


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("Ada  Lovelace\nwas here", "ada lovelace WAS here "),
        ("cafe\u0301 noir", "CAF\u00c9 noir"),
        ("Stra\u00dfe 12", "STRASSE 12"),
        ("\uff21\uff44\uff41 wrote notes", "ada wrote notes"),
    ],
)  # fmt: skip
def test_what_does_not_count_as_a_difference(first: str, second: str) -> None:
    one, two = (normalised(Record("1", "s", {"text": text})) for text in (first, second))
    assert one == two


def test_parts_of_a_record_are_one_text() -> None:
    whole = Record("1", "s", {"text": "Who? Ada."})
    parts = Record("2", "s", {"prompt": "Who?", "completion": " Ada."})
    chat = {
        "messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ada."}]
    }
    assert (
        normalised(whole) == normalised(parts) == normalised(Record("3", "s", chat)) == "who? ada."
    )


@pytest.mark.parametrize("threshold", [0.0, -1.0, 1.01, float("nan")])
def test_thresholds_that_mean_nothing_are_refused(threshold: float) -> None:
    with pytest.raises(UserError, match="--threshold must be above 0 and at most 1"):
        NearDuplicates(["text"], threshold)
