"""From tokens to text, as far as it cannot change any more."""

from collections.abc import Sequence
from typing import Any

UNFINISHED = "\ufffd"  # what a tokenizer says of bytes that are not a character, or not yet
LONGEST = 3  # of these at the end may still become one character, which has 4 bytes at most
REACH = 8  # tokens before a new one that its text may depend on


class TextStream:
    """The text of a growing list of tokens, cut off before the first of some texts.

    What is given out is final: bytes that may become another character, and text that may become a
    stop, wait for the next token. The first stop is the one that is complete first (of several that end
    together the longest), so that it does not matter how a text is split into tokens.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()):
        self._tokenizer = tokenizer
        self._stop = tuple(text for text in stop if text)
        self._tokens: list[int] = []
        self._start = 0  # of the tokens that are decoded together
        self._known = 0  # characters of their text that are read
        self._whole: list[int] = []  # where later ones may start: a character ends before
        self._waiting = ""
        self.text = ""
        self.is_stopped = False

    def push(self, token: int) -> str:
        """One more token; returns the text that is final now, perhaps none."""
        self._tokens.append(token)
        now = self._decode(self._start)
        unfinished = min(LONGEST, len(now) - len(now.rstrip(UNFINISHED)))
        last = self._whole[-1] if self._whole else self._start
        # Some tokenizers say it of all bytes in a row where the last ones are not a character yet.
        if unfinished and len(self._tokens) - last < REACH:
            return ""
        self._read(now, len(now) - unfinished)
        if not unfinished:
            self._whole.append(len(self._tokens))
            self._move_on()
        return self._give(is_end=False)

    def finish(self) -> str:
        """The rest: no token comes any more."""
        now = self._decode(self._start)
        self._read(now, len(now))
        return self._give(is_end=True)

    def _read(self, now: str, end: int) -> None:
        self._waiting += now[self._known : end]
        self._known = max(self._known, end)

    def _move_on(self) -> None:
        """Decode no more tokens the next time than are needed.

        Where a character ends: bytes that are torn off from it could spoil all that follow.
        """
        far = [place for place in self._whole if place <= len(self._tokens) - REACH]
        if far:
            self._start = far[-1]
            self._whole = [place for place in self._whole if place > self._start]
            self._known = len(self._decode(self._start))

    def _decode(self, start: int) -> str:
        # Not cleaned up: that would take spaces back which are given out.
        return self._tokenizer.decode(
            self._tokens[start:], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def _give(self, is_end: bool) -> str:
        if self.is_stopped:
            return ""
        places = [(self._waiting.find(stop), len(stop)) for stop in self._stop]
        found = [(place + length, place) for place, length in places if place >= 0]
        if found:
            self.is_stopped = True
            given, self._waiting = self._waiting[: min(found)[1]], ""
        else:
            kept = 0 if is_end else self._begun()
            cut = len(self._waiting) - kept
            given, self._waiting = self._waiting[:cut], self._waiting[cut:]
        self.text += given
        return given

    def _begun(self) -> int:
        """How many characters at the end may be the beginning of a stop."""
        longest = max(map(len, self._stop), default=1) - 1
        for size in range(min(longest, len(self._waiting)), 0, -1):
            if any(stop.startswith(self._waiting[-size:]) for stop in self._stop):
                return size
        return 0
