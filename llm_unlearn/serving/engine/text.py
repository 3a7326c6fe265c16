"""From tokens to text, as far as it cannot change any more."""

from collections.abc import Sequence
from typing import Any

UNFINISHED = "\ufffd"  # what a tokenizer says of bytes that are not yet a character
REACH = 8  # tokens before a new one that its text may depend on


class TextStream:
    """The text of a growing list of tokens, cut off before the first of some texts.

    What is given out is final: bytes that may become another character, and text that may become a
    stop, wait for the next token.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()):
        self._tokenizer = tokenizer
        self._stop = tuple(text for text in stop if text)
        self._tokens: list[int] = []
        self._start = 0  # of the tokens that are decoded together
        self._read = 0  # tokens whose text is known
        self._waiting = ""
        self.text = ""
        self.is_stopped = False

    def push(self, token: int) -> str:
        """One more token; returns the text that is final now, perhaps none."""
        self._tokens.append(token)
        before = self._decode(self._start, self._read)
        now = self._decode(self._start, len(self._tokens))
        if now.endswith(UNFINISHED) and len(self._tokens) - self._read < REACH:
            return ""
        self._waiting += now[len(before) :]
        self._start = max(self._start, self._read - REACH)
        self._read = len(self._tokens)
        return self._give(is_end=False)

    def finish(self) -> str:
        """The rest: no token comes any more."""
        before = self._decode(self._start, self._read)
        self._waiting += self._decode(self._start, len(self._tokens))[len(before) :]
        self._read = len(self._tokens)
        return self._give(is_end=True)

    def _decode(self, start: int, end: int) -> str:
        return self._tokenizer.decode(self._tokens[start:end], skip_special_tokens=True)

    def _give(self, is_end: bool) -> str:
        if self.is_stopped:
            return ""
        found = [place for stop in self._stop if (place := self._waiting.find(stop)) >= 0]
        if found:
            self.is_stopped = True
            given, self._waiting = self._waiting[: min(found)], ""
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
