"""Parsers of the preprocessing options of images and arrays: sizes and numbers from text."""

from __future__ import annotations

from ...base.errors import OptionError


def height_and_width(text: str | None) -> tuple[int, int] | None:
    """Parses 224x192, or 224 for a square, to (height, width); None stays None."""
    if text is None:
        return None
    height, _, width = text.lower().partition("x")
    try:
        return int(height), int(width or height)
    except ValueError as error:
        raise OptionError(f"size: expected HEIGHTxWIDTH, found {text}") from error


def numbers(option: str, text: str) -> tuple[float, ...]:
    """Parses 1/255 or 0.5,0.4,0.3 to numbers."""
    found = []
    for part in text.split(","):
        above, _, below = part.partition("/")
        try:
            found.append(float(above) / float(below or 1))
        except (ValueError, ZeroDivisionError) as error:
            raise OptionError(f"{option}: expected a number, N/M or three, found {text}") from error
    return tuple(found)
