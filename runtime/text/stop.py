"""Finds stop strings in streamed text; holds back text that may be the beginning of one."""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Passes streamed text on, up to the first occurrence of any of the stop strings.

    Text is compared as text, not as tokens, so that a stop string may span any number of tokens
    and share a token with the text before it. Special tokens print nothing, but a stop string may
    name them: it matches the text with their spellings in it, each of them whole, or the text
    without them.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""  # undecided text, with the spellings of special tokens
        self._inside: list[int] = []  # per character: 0 text, 1 a spelling's first, 2 its rest
        self.matched: str | None = None

    def push(self, text: str, *, special: bool = False) -> str:
        """Adds `text`; returns what is now certain to belong to the output.

        special: `text` is the spelling of one special token, which is never output.
        Sets `matched` (and drops the rest) when a stop string is complete; the one that begins
        first wins, the longest of those that begin at the same place.
        """
        if self.matched is not None or not text:
            return ""
        if not self._stops:
            return "" if special else text
        self._held += text
        self._inside += [1] + [2] * (len(text) - 1) if special else [0] * len(text)
        shown = [i for i, inside in enumerate(self._inside) if not inside]
        begin = self._match(shown)
        if begin is None:
            return self._release(self._undecided(shown), shown)
        text = "".join(self._held[i] for i in shown if i < begin)
        self._held, self._inside = "", []
        return text

    def flush(self) -> str:
        """Ends the text and returns what was held back, which is no stop string after all."""
        shown = [i for i, inside in enumerate(self._inside) if not inside]
        return self._release(len(self._held), shown)

    def _match(self, shown: list[int]) -> int | None:
        """Returns where the first complete stop string begins, None without one; sets `matched`."""
        best: tuple[int, int] | None = None  # (begin, -length)
        text = "".join(self._held[i] for i in shown) if len(shown) < len(self._held) else None
        for stop in self._stops:
            at = self._held.find(stop)
            while at >= 0 and (self._cuts(at) or self._cuts(at + len(stop))):
                at = self._held.find(stop, at + 1)
            begins = [at] if at >= 0 else []
            if text is not None and stop in text:
                begins.append(shown[text.find(stop)])
            for begin in begins:
                if best is None or (begin, -len(stop)) < best:
                    best, self.matched = (begin, -len(stop)), stop
        return None if best is None else best[0]

    def _undecided(self, shown: list[int]) -> int:
        """Returns where the longest end of the text starts that begins a stop string."""
        end = len(self._held)
        begin = next(
            (at for at in range(max(0, end - self._longest + 1), end)
             if not self._cuts(at) and self._begins(self._held[at:])),
            end,
        )  # fmt: skip
        if len(shown) == end:
            return begin
        text = "".join(self._held[i] for i in shown)
        at = next(
            (at for at in range(max(0, len(text) - self._longest + 1), len(text))
             if self._begins(text[at:])),
            len(text),
        )  # fmt: skip
        return min(begin, shown[at]) if at < len(text) else begin

    def _begins(self, text: str) -> bool:
        return any(stop.startswith(text) for stop in self._stops)

    def _cuts(self, position: int) -> bool:
        """Returns whether a position lies inside of a special token's spelling."""
        return position < len(self._inside) and self._inside[position] == 2

    def _release(self, end: int, shown: list[int]) -> str:
        """Returns the text held before `end` and holds it no longer."""
        text = "".join(self._held[i] for i in shown if i < end)
        self._held, self._inside = self._held[end:], self._inside[end:]
        return text
