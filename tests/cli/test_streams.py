"""Standard streams: closed ones, empty ones, full disks; and files that results may not replace."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from stoker.runtime.cli import main as cli

posix = pytest.mark.skipif(sys.platform == "win32", reason="streams and devices of POSIX")


# Closed streams.

_EVERY_COMMAND = """
import io, json, os, sys
from stoker.runtime.cli.main import main
report = os.fdopen(int(sys.argv[1]), "w")
found = {}
for line in json.loads(sys.argv[2]):
    try:
        found[" ".join(line)] = main(line)
    except BaseException as error:
        found[" ".join(line)] = repr(error)
json.dump(found, report)
report.close()
"""


def every_command(tiny: Path) -> list[list[str]]:
    def walk(command: Any, name: list[str]) -> Iterator[list[str]]:
        if hasattr(command, "commands"):
            for part, inner in command.commands.items():
                yield from walk(inner, [*name, part])
        else:
            yield name

    lines = [[*name, "--help"] for name in walk(typer.main.get_command(cli.app), [])]
    assert len(lines) > 20
    return [
        *lines,
        [],
        ["--version"],
        ["run", str(tiny), "Hi", "-n", "3", "--stats", "--plan"],
        ["run", str(tiny), "Hi", "-n", "3", "--json"],
        ["run", str(tiny), "-", "-n", "3"],
        ["run", str(tiny), "-n", "3"],
        ["chat", str(tiny)],
        ["inspect", str(tiny)],
        ["doctor", "--no-storage"],
        ["perplexity", str(tiny), str(Path(__file__)), "--context", "32", "--max-chunks", "2"],
        ["pull", "list"],
        ["plan", str(tiny), "--memory", "1GB"],
        ["run", "no such model", "Hi"],
        ["run", str(tiny), "Hi", "--temperature", "-1"],
        ["no-command"],
    ]


@posix
@pytest.mark.parametrize("closed", [0, 1, 2, (0, 1, 2)], ids=["stdin", "stdout", "stderr", "all"])
def test_closed_streams(tiny: Path, tmp_path: Path, closed: int | tuple[int, ...]) -> None:
    gone = (closed,) if isinstance(closed, int) else closed
    read, write = os.pipe()
    shut = " ".join(f"{n}{'<' if n == 0 else '>'}&-" for n in gone)
    lines = every_command(tiny)
    running = subprocess.Popen(
        ["/bin/sh", "-c", f'exec "$@" {shut}', "sh", sys.executable, "-c", _EVERY_COMMAND,
         str(write), json.dumps(lines)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        pass_fds=[write],
        cwd=tmp_path,
    )  # fmt: skip
    os.close(write)
    out, err = running.communicate(timeout=300)
    with os.fdopen(read) as report:
        found = json.loads(report.read())
    assert len(found) == len(lines)
    for line, code in found.items():
        good = (0,) if "--help" in line else (0, 1, 2)
        assert code in good, line
    assert found[" ".join(["run", str(tiny), "Hi", "-n", "3", "--json"])] == 0
    assert "internal error" not in err and "Traceback" not in err
    for n, text in ((1, out), (2, err)):
        assert (n in gone) == (text == ""), n
    assert list(tmp_path.iterdir()) == []  # no file took a closed stream's descriptor


@posix
@pytest.mark.parametrize("command", ["run", "chat"])
@pytest.mark.parametrize("given", [None, b"", b"Hi \xff\n"], ids=["closed", "empty", "no UTF-8"])
def test_standard_input_that_says_nothing(tiny: Path, command: str, given: bytes | None) -> None:
    closed = "<&-" if given is None else ""
    done = subprocess.run(
        ["/bin/sh", "-c", f'exec "$@" {closed}', "sh", sys.executable, "-m",
         "stoker.runtime.cli.main", command, str(tiny), "-n", "3"],
        input=given,
        capture_output=True,
        timeout=120,
        check=False,
        env=os.environ | {"PYTHONIOENCODING": "utf-8"},
    )  # fmt: skip
    assert done.returncode == 2 and done.stdout == b""
    line = {
        (True, "run"): b"give a prompt, - for stdin, or --file",
        (True, "chat"): b"standard input: expected messages, found none",
        (False, "run"): b"-: expected UTF-8 text, found byte 3 not to be",
        (False, "chat"): b"standard input: expected UTF-8 text, found byte 3 not to be",
    }[not given, command]
    assert done.stderr == b"stoker: error: " + line + b"\n"


@posix
def test_devices_are_not_replaced(tiny: Path, tmp_path: Path, capsys: Any) -> None:
    """A complete result is renamed to its name, which would replace a device."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    results = tmp_path / "results.jsonl"
    results.write_text("{}\n")
    for line in (
        ["export", "quantize", str(tiny), str(pipe), "--type", "Q8_0", "--force"],
        ["export", "gguf", str(tmp_path), str(pipe), "--force"],
        ["export", "upcycle", str(tiny), str(pipe), "--experts", "4", "--used", "2", "--force"],
        ["export", "onnx", str(tiny), str(pipe), "--force"],
        ["export", "tflite", str(tiny), str(pipe), "--force"],
        ["export", "quantize-onnx", str(tiny), str(pipe), "--dynamic", "--force"],
        ["export", "imatrix", str(tiny), str(pipe), "--text", str(results), "--force"],
        ["report", str(results), "-o", str(pipe)],
        ["probe", "--quick", "--out", str(pipe)],
        ["bench", str(tiny), "--json", str(pipe), "--force"],
        ["run", str(tiny), "hi", "--trace", str(pipe), "-n", "2"],
    ):
        assert cli.main(line) in (1, 2), line
        assert pipe.is_fifo(), line
        message = capsys.readouterr().err
        assert message.startswith("stoker: error:") and "internal" not in message, line


@posix
@pytest.mark.parametrize("number", [1, 2])
def test_a_full_disk(tiny: Path, number: int) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full")
    with full.open("w") as where:
        streams: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        streams["stdout" if number == 1 else "stderr"] = where
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "stoker.runtime.cli.main",
                "run",
                str(tiny),
                "Hi",
                "-n",
                "3",
                "--stats",
            ],
            stdin=subprocess.DEVNULL,
            text=True,
            timeout=120,
            check=False,
            **streams,
        )
    assert done.returncode == 1
    if number == 1:
        assert re.fullmatch(r"stoker: error: .*No space left on device\n", done.stderr)
