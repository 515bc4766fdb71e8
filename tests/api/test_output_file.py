"""Paths that a result may be written to."""

from __future__ import annotations

from pathlib import Path

import pytest
import stoker
from stoker.runtime.files import output_file


def test_only_the_name_itself_counts(tmp_path: Path) -> None:
    """A file with a hidden part's name is no result: nothing is replaced, no --force needed."""
    out = tmp_path / "net.gguf"
    output_file.check_output(out, force=False)
    out.with_name(output_file._PART.format(out.name)).write_text("{}")
    output_file.check_output(out, force=False)
    out.write_bytes(b"GGUF")
    with pytest.raises(stoker.OptionError, match="exists: choose another name"):
        output_file.check_output(out, force=False)
    output_file.check_output(out)
    with pytest.raises(stoker.OptionError, match="another file than what it is made from"):
        output_file.check_output(out, [out])


def test_names_too_long_for_their_parts(tmp_path: Path) -> None:
    with pytest.raises(stoker.OptionError, match="name too long"):
        output_file.check_output(tmp_path / ("n" * 250))
