"""Pictures: matplotlib draws them, the page colours them.

matplotlib's output is turned into SVG that is part of the page: text stays text in the page's font,
colours become the page's (light or dark), unused ids are removed, and the same figure gives the
same bytes.
"""

from __future__ import annotations

import io
import re
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from ...runtime.base.errors import OptionError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

POINT = 1 / 72  # inch: a point of a figure is a pixel of the page
FONT = 10.5  # points

# Colours to draw with, and their names in the page's style sheet. The values are ones that nothing
# else draws with, so that a colour in the picture is one of these.
INK, QUIET, RULE, PAPER = "#010101", "#010102", "#010103", "#010104"
WAIT, WAIT_TEXT, ON_WAIT = "#010105", "#010106", "#010107"
_VARIABLES = {INK: "ink", QUIET: "quiet", RULE: "rule", PAPER: "paper"}
_VARIABLES |= {WAIT: "wait", WAIT_TEXT: "wait-text", ON_WAIT: "on-wait"}
_ENGINES = {"stoker": "#010201", "llama-cpp": "#010202", "onnx": "#010203"}
_OTHERS = ("#010204", "#010205")
_VARIABLES |= {colour: f"e-{engine}" for engine, colour in _ENGINES.items()}
_VARIABLES |= {colour: f"e-other-{n}" for n, colour in enumerate(_OTHERS)}

_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "stoker",
    "text.parse_math": False,  # a "$" in a model's name is a "$"
    "font.size": FONT,
    "font.family": "DejaVu Sans",  # comes with matplotlib, so the layout is the same everywhere
    "text.color": INK,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.edgecolor": RULE,
    "axes.linewidth": 0.8,
    "axes.labelcolor": QUIET,
    "axes.labelsize": FONT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "grid.color": RULE,
    "grid.linewidth": 0.7,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": QUIET,
    "ytick.labelcolor": QUIET,
    "xtick.labelsize": FONT - 0.5,
    "ytick.labelsize": FONT - 0.5,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "lines.linewidth": 1.7,
    "lines.markersize": 5,
    "path.simplify": False,
}


@dataclass(frozen=True)
class Plot:
    """A picture: its caption, its description in words, and the <svg> element."""

    caption: str
    alt: str
    svg: str


def engine_variable(engine: str) -> str:
    """The style sheet's name of an engine's colour."""
    return _VARIABLES[engine_colour(engine)]


def engine_colour(engine: str) -> str:
    """The colour to draw an engine with; always the same."""
    return _ENGINES.get(engine) or _OTHERS[sum(engine.encode()) % len(_OTHERS)]


def engine_marker(engine: str) -> str:
    """The marker of an engine, for readers who cannot tell its colour."""
    return {"stoker": "o", "llama-cpp": "s", "onnx": "D"}.get(engine, "^")


@contextmanager
def drawing() -> Iterator[None]:
    """Context in which figures look like the page. Raises OptionError without matplotlib."""
    try:
        from matplotlib import style
    except ImportError:
        raise OptionError(
            "the page's plots need matplotlib: pip install 'stoker[bench]' "
            "(--markdown FILE alone does not)"
        ) from None
    with style.context(["default", _STYLE]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # characters that the layout's font lacks
        yield


def figure(width: float, height: float) -> Figure:
    """An empty figure of this size in points."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width * POINT, height * POINT))


def element(drawn: Figure, name: str, title: str, alt: str) -> str:
    """The figure as an <svg> element. name: distinguishes its ids from those of other pictures."""
    out = io.BytesIO()
    none = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    drawn.savefig(out, format="svg", metadata=none)
    root = ET.fromstring(out.getvalue())
    box = root.get("viewBox", "0 0 1 1")
    body = [_written(child, _ids(root, name)) for child in root]
    return (
        f'<svg viewBox="{box}" role="img" aria-labelledby="{name}-t {name}-d">'
        f'<title id="{name}-t">{escape(title)}</title><desc id="{name}-d">{escape(alt)}</desc>'
        f"{''.join(body)}</svg>"
    )


_REFERENCE = re.compile(r"url\(#([^)]+)\)")
_NUMBER = re.compile(r"-?\d+\.\d{2,}")
_COLOUR = re.compile(r"#[0-9a-f]{6}")
_FONT_FAMILY = re.compile(r"\s*font-family:[^;]*;?")
_FONT = re.compile(r"(?<![-\w])font:[^;]*?([\d.]+px)[^;]*")  # as matplotlib before 3.10 writes it
_LINK = "{http://www.w3.org/1999/xlink}href"


def _ids(root: ET.Element, name: str) -> dict[str, str]:
    """Maps the ids that something refers to to new ones."""
    used: dict[str, str] = {}
    for one in root.iter():
        found = [one.get(_LINK, "")[1:]] if _LINK in one.attrib else []
        found += _REFERENCE.findall(one.get("clip-path", ""))
        for old in found:
            used.setdefault(old, f"{name}-{len(used)}")
    return used


def _written(one: ET.Element, ids: dict[str, str]) -> str:
    tag = one.tag.rsplit("}", 1)[-1]
    if tag in ("metadata", "style"):
        return ""
    attributes = []
    for key, value in one.attrib.items():
        if key == "id":
            if value in ids:
                attributes.append(("id", ids[value]))
        elif key == _LINK:
            attributes.append(("href", "#" + ids[value[1:]]))
        elif key == "clip-path":
            attributes.append((key, f"url(#{ids[_REFERENCE.findall(value)[0]]})"))
        elif key == "style":
            attributes.append((key, _restyled(value)))
        elif key == "transform":
            if not value.startswith("rotate(-0 "):
                attributes.append((key, _rounded(value)))
        elif key in ("d", "x", "y", "width", "height"):
            attributes.append((key, _rounded(" ".join(value.split()))))
        else:
            attributes.append((key, value))
    inside = "".join(_written(child, ids) for child in one)
    text = escape((one.text or "").strip()) if tag == "text" else ""
    if tag in ("g", "defs") and not inside:
        return ""
    kept = "".join(f' {key}="{escape(value)}"' for key, value in attributes)
    if tag == "g" and not kept:
        return inside
    return f"<{tag}{kept}>{text}{inside}</{tag}>" if text or inside else f"<{tag}{kept}/>"


def _rounded(text: str) -> str:
    return _NUMBER.sub(lambda n: f"{float(n.group()):.1f}".removesuffix(".0"), text)


def _restyled(text: str) -> str:
    def colour(found: re.Match[str]) -> str:
        name = _VARIABLES.get(found.group())
        return f"var(--{name})" if name else found.group()

    plain = _FONT.sub(r"font-size: \1", _FONT_FAMILY.sub("", text))
    return _COLOUR.sub(colour, plain).strip()
