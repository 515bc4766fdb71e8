"""Stop strings: holds back text that may yet turn out to be the beginning of one."""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Passes streamed text on, up to the first occurrence of any of the stop strings.

    Text is compared as text, not as tokens, so that a stop string may span any number of tokens
    and share a token with the text before it.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""  # undecided: a proper prefix of at least one stop string
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """Adds `text`; returns what is now certain to belong to the output.

        Sets `matched` (and drops the rest) when a stop string is complete; the one that begins
        first wins, the longest of those that begin at the same place.
        """
        if self.matched is not None:
            return ""
        if not self._stops:
            return text
        text = self._held + text
        begin = -1
        for stop in self._stops:
            at = text.find(stop)
            if at < 0:
                continue
            if begin < 0 or at < begin or (at == begin and len(stop) > len(self.matched or "")):
                begin, self.matched = at, stop
        if self.matched is not None:
            self._held = ""
            return text[:begin]
        keep = self._undecided(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """The end of the text: what was held back is no stop string after all."""
        held, self._held = self._held, ""
        return held

    def _undecided(self, text: str) -> int:
        """Length of the longest end of `text` that some stop string begins with."""
        longest = min(len(text), max(len(s) for s in self._stops) - 1)
        for n in range(longest, 0, -1):
            tail = text[-n:]
            if any(s.startswith(tail) for s in self._stops):
                return n
        return 0
