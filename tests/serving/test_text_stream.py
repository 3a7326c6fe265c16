"""Text that is given out is final: no torn character, no part of a stop, whatever the tokens are."""

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from llm_unlearn.serving.engine.text import UNFINISHED, TextStream
from tests.tiny import make_tiny_tokenizer

CHARACTERS = "ab .\n\u00e9\u20ac\u6f22\U0001f600\u0e01"
BYTES = (b"\xe2", b"\x82", b"\xac", b"\xff", b"a", b"\xf0\x9f")
TEXTS = st.text(st.sampled_from(CHARACTERS), max_size=40)
STOPS = st.lists(st.text(st.sampled_from(CHARACTERS), min_size=1, max_size=4), max_size=4)


class Pieces:
    """A tokenizer of arbitrary byte strings, which decodes as byte-level BPE does."""

    def __init__(self, pieces: list[bytes]):
        self.pieces = pieces

    def decode(self, tokens: list[int], **_: Any) -> str:
        return b"".join(self.pieces[token] for token in tokens).decode(errors="replace")


class Fallback:
    """A SentencePiece-like tokenizer: a run of bytes that is no text as a whole is none at all."""

    def __init__(self, pieces: list[bytes]):
        self.pieces = pieces
        vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)}
        self.tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
        self.tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])

    def decode(self, tokens: list[int], **_: Any) -> str:
        return self.tokenizer.decode([self.pieces[token][0] for token in tokens])


@st.composite
def splits(draw: st.DrawFn, text: bytes) -> list[bytes]:
    """Any split of some bytes into tokens, also within a character."""
    places = draw(st.sets(st.integers(1, max(1, len(text) - 1)), max_size=len(text)))
    ends = [0, *sorted(place for place in places if place < len(text)), len(text)]
    return [text[a:b] for a, b in pairwise(ends)]


def first_stop(text: str, stops: list[str]) -> str:
    """By the definition: read letter by letter, and stop as soon as a stop is complete."""
    for end in range(len(text) + 1):
        ended = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if ended:
            return text[: end - max(ended)]
    return text


def check(tokenizer: Any, tokens: list[int], stops: list[str]) -> None:
    stream, given_out = TextStream(tokenizer, stops), ""
    whole = first_stop(tokenizer.decode(tokens), stops)
    for token in tokens:
        given_out += stream.push(token)
        assert whole.startswith(given_out), "what is given out is never taken back"
        if stream.is_stopped:
            break
    given_out += stream.finish()
    assert given_out == stream.text == whole
    assert stream.is_stopped == (whole != tokenizer.decode(tokens))
    assert stream.finish() == "", "nothing comes after the end"


@given(TEXTS.map(str.encode).flatmap(splits), STOPS)
def test_pieces_are_the_whole_text_up_to_the_first_stop(
    pieces: list[bytes], stops: list[str]
) -> None:
    check(Pieces(pieces), list(range(len(pieces))), stops)


@given(TEXTS.map(str.encode), STOPS)
def test_a_token_for_each_byte(text: bytes, stops: list[str]) -> None:
    check(Fallback([bytes([byte]) for byte in text]), list(range(len(text))), stops)


@given(text=TEXTS, stops=STOPS)
def test_with_the_tokens_of_a_real_tokenizer(text: str, stops: list[str]) -> None:
    tokenizer = make_tiny_tokenizer()
    check(tokenizer, tokenizer(text)["input_ids"], stops)


@given(st.lists(st.sampled_from(BYTES), max_size=30), STOPS)
@example([b"\xe2"] * 9 + [b"\x82", b"\xac"], [])
@example([b"\xe2\x82", b"\xac\xe2"] + [b"\x82\xac\xe2"] * 12, [])
def test_bytes_that_are_no_text(pieces: list[bytes], stops: list[str]) -> None:
    """A model may say anything. What byte-level decoding makes of it is given out all the same."""
    check(Pieces(pieces), list(range(len(pieces))), stops)


@pytest.mark.parametrize("kind", [Pieces, Fallback])
def test_many_characters_of_bytes(kind: Any) -> None:
    """Longer than the tokens that are decoded together, whose start falls within a character."""
    pieces = [bytes([byte]) for byte in ("\u6f22" * 20 + "a").encode()]
    stream = TextStream(kind(pieces))
    given_out = [stream.push(token) for token in range(len(pieces))]
    assert given_out == ["", "", "\u6f22"] * 20 + ["a"]
    assert UNFINISHED not in stream.text


def test_no_more_is_decoded_than_is_needed() -> None:
    """Tokens without end: each is read with a few before it."""
    tokenizer, lengths = make_tiny_tokenizer(), []

    class Counting:
        def decode(self, tokens: list[int], **options: Any) -> str:
            lengths.append(len(tokens))
            return str(tokenizer.decode(tokens, **options))

    stream = TextStream(Counting())
    for token in tokenizer("Question: what does person 1 eat? " * 30)["input_ids"]:
        stream.push(token)
    assert stream.text == "Question: what does person 1 eat? " * 30
    assert max(lengths) < 20


def test_the_stop_that_is_complete_first() -> None:
    """Not the one that begins first, which one token more would have completed: a client that read
    letter by letter would have stopped."""
    assert first_stop("xabc", ["abc", "b"]) == "xa"
    for pieces in ([b"xabc"], [b"x", b"a", b"b", b"c"], [b"xab", b"c"]):
        check(Pieces(pieces), list(range(len(pieces))), ["abc", "b"])
