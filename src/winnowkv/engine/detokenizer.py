"""How a request's tokens become text while they are generated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

REPLACEMENT_CHARACTER = "\ufffd"  # what a tokenizer makes of bytes that are not a whole character, or not yet
REDECODED_TOKENS = 16  # about so many tokens are decoded again with each new one


class TextStream:
    """Turns one request's tokens into text, piece by piece; text that was returned never changes.

    An incomplete character is held back, and so is the end of the text while it may be the beginning of a stop string.

    Parameters
    ----------
    tokenizer: decodes; special tokens have no text.
    stop: strings that end the text.
    min_tokens: a stop string counts only if it ends after so many tokens; one that ends earlier is text.

    Attributes
    ----------
    stopped: whether a stop string was found.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = (), min_tokens: int = 0) -> None:
        self.stopped = False
        self._tokenizer, self._stop, self._min_tokens = tokenizer, stop, min_tokens
        self._tokens: list[int] = []  # the latest, decoded together: the text of a token may depend on those before it
        self._whole_tokens = 0  # how many of them ended with a whole character when that was last so
        self._shown = 0  # characters of theirs that are in the text
        self._count = 0  # tokens taken
        self._text = ""
        self._given = 0  # characters of the text that were returned

    @property
    def text(self) -> str:
        """All that was returned."""
        return self._text[: self._given]

    def push(self, token: int) -> str:
        """Take the next token and return the text that is final now."""
        self._tokens.append(token)
        self._count += 1
        seen = len(self._text)
        self._text += self._decoded()
        if self._count > self._min_tokens and (end := self._stop_at(seen)) is not None:
            self.stopped, self._text = True, self._text[:end]
            return self._return_to(len(self._text))
        return self._return_to(len(self._text) - self._stop_prefix())

    def flush(self) -> str:
        """Return the text that was held back, after the last token."""
        if not self.stopped:
            self._text += self._decode()[self._shown :]
            self._tokens.clear()
            self._shown = 0
        return self._return_to(len(self._text))

    def _decode(self) -> str:
        text: str = self._tokenizer.decode(self._tokens, skip_special_tokens=True)
        return text

    def _decoded(self) -> str:
        """Whole characters that the newest token added."""
        decoded = self._decode()
        whole = decoded.rstrip(REPLACEMENT_CHARACTER)
        new = whole[self._shown :]
        self._shown = max(len(whole), self._shown)
        if len(whole) == len(decoded):
            self._forget()
            self._whole_tokens = len(self._tokens)
        return new

    def _forget(self) -> None:
        """Drop old tokens, up to a whole character before the newest token: a cut elsewhere would change the text."""
        if len(self._tokens) <= REDECODED_TOKENS:
            return
        rest = self._tokens[self._whole_tokens :]
        # Only if the rest has text: some tokenizers drop the blank before the first word, which would show up later.
        if shown := len(self._tokenizer.decode(rest, skip_special_tokens=True)):
            self._tokens, self._shown = rest, shown

    def _stop_at(self, seen: int) -> int | None:
        """Where the stop string begins that is complete first, of those that end after ``seen`` characters; None without."""
        found = [(self._text.find(stop, max(seen + 1 - len(stop), 0)), stop) for stop in self._stop]
        return min(((at + len(stop), at) for at, stop in found if at >= 0), default=(0, None))[1]

    def _stop_prefix(self) -> int:
        """How many characters at the end of the text may be the beginning of a stop string."""
        longest = min(max(map(len, self._stop), default=1) - 1, len(self._text))
        return next((n for n in range(longest, 0, -1) if any(s.startswith(self._text[-n:]) for s in self._stop)), 0)

    def _return_to(self, end: int) -> str:
        """The part of the text that was not returned yet, up to ``end``."""
        begin, self._given = self._given, max(end, self._given)
        return self._text[begin : self._given]
