"""Options of the commands that reach the chat template."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import finish, reciting
from stoker.runtime.base.errors import OptionError
from stoker.runtime.terminal.options import template_variables


@pytest.fixture
def recital(tmp_path: Path) -> str:
    """A file that exists, for the model that does not read it."""
    path = tmp_path / "recital.gguf"
    path.touch()
    return str(path)


def test_run_options_reach_the_template(recital: str) -> None:
    done = finish(reciting("one two", "run", recital, "x", "--prefill", "one "))
    assert done.stdout == "two\n"
    for arguments, tokens in ((["a<|end|>"], 10), (["a<|end|>", "--parse-special"], 4)):
        done = finish(reciting("one", "run", recital, *arguments, "--json"))
        assert json.loads(done.stdout.splitlines()[-1])["stats"]["prompt_tokens"] == tokens
    for arguments, message in (
        (["--template-var", "a=1"], "template variable 'a': chat template 'default' reads none"),
        (["--template-var", "tools=[]"], "template variable 'tools' is set by the prompt itself"),
        (["--template-var", "a"], "--template-var: expected NAME=VALUE, found 'a'"),
        (["--prefill", "a", "--raw"], "--prefill needs the chat format: leave out --raw"),
        (["--template-var", "a=1", "--raw"], "--template-var needs the chat format"),
    ):
        done = finish(reciting("one", "run", recital, "x", *arguments))
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(f"stoker: error: {message}")
    done = finish(reciting("one", "chat", recital, "--template-var", "a=1"), text="x\n")
    assert done.returncode == 2
    assert "template variable 'a'" in done.stderr


def test_template_variables() -> None:
    given = ["a=1", "b=false", "c=text", 'd="text"', "e=[1, 2]", "f=", "g=x=y", " h =null"]
    assert template_variables(given) == {
        "a": 1, "b": False, "c": "text", "d": "text", "e": [1, 2], "f": "", "g": "x=y", "h": None,
    }  # fmt: skip
    assert template_variables(None) is None
    with pytest.raises(OptionError, match="expected NAME=VALUE, found '=1'"):
        template_variables(["=1"])
