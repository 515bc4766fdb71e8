"""What README and ARCHITECTURE.md say is so."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import stoker
from stoker.runtime.options import GenerationOptions, LoadOptions
from stoker.runtime.options.option import as_markdown, default_of, rows

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
ARCHITECTURE = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")


def test_options_are_those_of_the_table() -> None:
    assert as_markdown(GenerationOptions) in README


def test_load_takes_the_options_of_the_table() -> None:
    """stoker.load spells its arguments out, for readers; they are LoadOptions' fields."""
    parameters = inspect.signature(stoker.load).parameters
    for row, _ in rows(LoadOptions):
        assert parameters[row.name].default == default_of(row), row.name
    assert set(parameters) - {row.name for row, _ in rows(LoadOptions)} == {
        "path",
        "onnx",
        "download",
    }


@pytest.mark.parametrize("table", [GenerationOptions, LoadOptions])
def test_options_are_documented(table: type) -> None:
    assert all(f"    {row.name}: {about.help}" in str(table.__doc__) for row, about in rows(table))


def test_files_that_are_named_exist() -> None:
    """Paths in ARCHITECTURE.md, but for the x in "where does X go"."""
    named = re.findall(r"(?<![\w/<])((?:[a-z_]+/)+[\w]+\.(?:py|cc|h|inc|sh|md))\b", ARCHITECTURE)
    absent = [
        path for path in named if not (ROOT / path).exists() and not re.search(r"[/_]x\.", path)
    ]
    inner = [path for path in absent if not list(ROOT.glob(f"*/{path}"))]
    assert inner == []
