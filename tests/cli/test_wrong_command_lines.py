"""Command lines with wrong values: exit code 2 (1 if the device failed), and one line that says
which; never a traceback. Most run in this process."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer
from stoker.runtime.cli import main as cli
from stoker.runtime.cli.main import main
from tiny_models import make

# Each option that takes a value gets these. No shell passes NUL, but other programs do.
VALUES = (
    "", "-1", "3.5", "nan", "inf", "9" * 30, "9" * 5000, "x", "\0", "\udcff\udcfe", "\ud800", "٣",
    " 1 ", "1,,2", "{0}", "[/red]", "a\nb", "\x1b[31m", "x" * 300, "loop", "folder", "missing/x",
    "text.txt/x", "~no-such-user/x", "latin.txt", "deep.json",
)  # fmt: skip
MISSING = "missing.gguf"
# The cheapest arguments that get as far as the options: commands that measure get no model.
COMMANDS: dict[str, list[str]] = {
    "run": ["tiny.gguf", "the cat", "-n", "1", "-t", "1"],
    "chat": ["tiny.gguf", "-n", "1", "-t", "1"],
    "batch": ["tiny.gguf", "missing.jsonl", "--out", "o.jsonl", "-n", "1", "-t", "1"],
    "inspect": ["tiny.gguf"],
    "pull": ["list"],
    "perplexity": ["tiny.gguf", "text.txt", "-c", "32", "-t", "1", "--max-chunks", "1"],
    "profile": [MISSING, "--out", "o.profile"],
    "bench": [MISSING],
    "bench-kernels": ["--formats", "none"],
    "plan": [MISSING],
    "probe": ["--path", "missing"],
    "report": ["missing.jsonl"],
    "sweep": ["missing.yaml"],
    "simulate": ["missing.csv"],
    "doctor": ["--no-storage"],
    "export upcycle": [MISSING, "o.gguf"],
    "export gguf": ["folder", "o.gguf"],
    "export quantize": [MISSING, "o.gguf", "--type", "Q4_0"],
    "export imatrix": [MISSING, "o.imatrix", "--text", "text.txt"],
    "export bitwidth": [MISSING, "o.gguf", "--text", "text.txt"],
    "export refactor": [MISSING, "o.gguf", "--text", "text.txt"],
    "export pregate": [MISSING, "o.gguf"],
    "export onnx": [MISSING, "o.onnx"],
    "export tflite": ["missing.tflite", "o.onnx"],
    "export quantize-onnx": ["missing.onnx", "o.onnx"],
    "export verify": [MISSING, "tiny.gguf"],
}
SHARES = 4
# Values with which these options begin to measure, which takes long.
SLOW = {("probe", "--path"): ("", " 1 ", "folder")}


@pytest.fixture(scope="module", autouse=True)
def _folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A folder of odd files, in which the commands run."""
    folder = tmp_path_factory.mktemp("odd")
    make(folder / "tiny.gguf", "llama", context=64)
    (folder / "text.txt").write_text("the cat sat on the mat and the dog " * 40)
    (folder / "latin.txt").write_bytes(b"caf\xe9 \xff\xfe" * 100)
    (folder / "deep.json").write_text("[" * 100_000)
    (folder / "loop").symlink_to("loop")
    (folder / "folder").mkdir()
    os.mkfifo(folder / "pipe.gguf")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("STOKER_CACHE", str(folder / "cache"))
        patch.delenv("STOKER_MODELS", raising=False)
        patch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
        # The commands are built once: building them takes longer than running most of them.
        patch.setattr(typer.main, "get_command", cache(typer.main.get_command))
        yield folder


def ran(arguments: Sequence[str], stdin: bytes = b"x\n") -> tuple[int, str]:
    """Exit code and stderr of a command line in this process; checks what always holds."""
    streams = [io.TextIOWrapper(io.BytesIO(b), encoding="utf-8") for b in (stdin, b"", b"")]
    kept = sys.stdin, sys.stdout, sys.stderr
    sys.stdin, sys.stdout, sys.stderr = streams
    try:
        code = main(arguments)
    finally:
        sys.stdin, sys.stdout, sys.stderr = kept
    out, err = (streams[i].buffer for i in (1, 2))
    streams[1].flush(), streams[2].flush()
    told = err.getvalue().decode() if isinstance(err, io.BytesIO) else ""
    assert isinstance(out, io.BytesIO) and b"Traceback" not in out.getvalue()
    assert code in (0, 1, 2), (code, told)
    assert "internal error" not in told and "Traceback" not in told, told
    if code:
        errors = [line for line in told.split("\n") if line.startswith("stoker: error: ")]
        assert len(errors) == 1 and errors[0].isprintable(), told
    return code, told


def commands() -> dict[str, Any]:
    """All commands by name, "export gguf" for those of a group."""
    found: dict[str, Any] = {}
    root: Any = typer.main.get_command(cli.app)
    for name, command in root.commands.items():
        for inner, one in getattr(command, "commands", {"": command}).items():
            found[f"{name} {inner}".strip()] = one
    return found


def test_every_command_is_here() -> None:
    assert set(commands()) == set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_of_a_command(name: str) -> None:
    words, given = name.split(), COMMANDS[name]
    begin = list(COMMANDS).index(name)
    for number, parameter in enumerate(commands()[name].params, begin):
        if parameter.param_type_name == "argument" or parameter.is_flag:
            continue
        option = max(parameter.opts, key=len)
        # Each option gets a share of the values; together the options of a command get all.
        for value in VALUES[number % SHARES :: SHARES]:
            if value not in SLOW.get((name, option), ()):
                ran([*words, *given, f"{option}={value}"])
    assert ran([*words, "--nothing"])[0] == 2
    assert ran([*words, *given, *("more",) * 9])[0] in ((1, 2) if name == "report" else (2,))


@pytest.mark.parametrize(
    "name", [n for n in COMMANDS if n not in ("doctor", "probe", "bench-kernels")]
)
def test_every_argument_of_a_command(name: str) -> None:
    words, given = name.split(), COMMANDS[name]
    for position in range(min(2, sum(not word.startswith("-") for word in given))):
        for value in (
            *VALUES[position::2],
            "/dev/null",
            "/proc/self/mem",
            "hf:",
            "hf:../../x",
            "http://[::1",
        ):
            if value and not value.startswith("-") and not given[position].startswith("-"):
                ran([*words, *given[:position], value, *given[position + 1 :]])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "pipe.gguf", "x"], "pipe.gguf: expected a GGUF file, found a device, pipe or"),
        (["run", "tiny.gguf", "x", "--top-k", "1099511627776"], "top_k must be between 0 and"),
        (["run", "tiny.gguf", "x", "-c", "9" * 30], "context must be between 1 and"),
        (["run", "tiny.gguf", "x", "--memory", "9" * 30], "memory must be bytes"),
        (
            ["run", "tiny.gguf", "-f", "/dev/zero"],
            "cannot read /dev/zero: expected at most 256 MiB",
        ),
        (["run", "tiny.gguf", "-f", "latin.txt"], "expected UTF-8 text, found byte 3 not to be"),
        (["run", "tiny.gguf", "x", "-f", "text.txt"], "give a prompt or --file, not both"),
        (["run", "tiny.gguf", "x", "--raw", "-s", "y"], "--system needs the chat format"),
        (["inspect", "tiny.gguf", "--json", "--tsv"], "give --json or --tsv, not both"),
        (["inspect", "a\nb\udcff.gguf"], "a\\nb\\udcff.gguf: no such file"),
        (["plan", "http://[::1"], "expected hf:owner/name/file.gguf or the URL of a file"),
        (["plan", "http://127.0.0.1:9/%2e%2e%2fx"], "expected hf:owner/name/file.gguf or the URL"),
        (["pull", "hf:../../x.gguf"], "expected hf:owner/name/file.gguf"),
        (["report", "deep.json"], "deep.json: no results: expected runs or a device profile"),
        (["perplexity", "tiny.gguf", "text.txt", "-c", "2"], "context must be at least 3, not 2"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_is_said(arguments: list[str], message: str) -> None:
    code, told = ran(arguments)
    assert code == 2 and message in told, told


# Environments, tested in other processes.


def process(
    arguments: Sequence[str | bytes],
    environment: dict[str, str],
    *,
    before: Sequence[str] = (),
    **others: Any,
) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command; environment: in addition to PATH."""
    done = subprocess.run(
        [*before, sys.executable, "-m", "stoker.runtime.cli.main", *arguments],
        env={"PATH": os.environ["PATH"], **environment},
        capture_output=True,
        timeout=120,
        check=False,
        **others,
    )
    out, err = done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")
    assert done.returncode >= 0, err
    assert "Traceback" not in err and "internal error" not in err, err
    return done.returncode, out, err


RUN = ["run", "tiny.gguf", "the cat", "-n", "3", "--temperature", "0", "--raw", "-t", "1"]


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"HOME": "/nonexistent", "TMPDIR": "/nonexistent"},
        {"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"COLUMNS": "0", "LINES": "-1"},
        {"COLUMNS": "garbage", "TERM": "garbage"},
        {"STOKER_CACHE": "/dev/null", "STOKER_MODELS": "\udcff", "HF_ENDPOINT": "\udcff"},
    ],
    ids=["empty", "no-home", "c-locale", "columns-0", "columns-garbage", "garbage"],
)
def test_surroundings_that_do_not_matter(environment: dict[str, str]) -> None:
    code, out, err = process(RUN, environment)
    assert code == 0 and out.strip(), err


@pytest.mark.parametrize(
    ("environment", "arguments", "code", "message"),
    [
        ({"STOKER_ISA": "sse9"}, RUN, 2, "STOKER_ISA"),
        (
            {"STOKER_MODELS": "~no-such-user/x"},
            ["run", "smollm2", "x"],
            2,
            "STOKER_MODELS must be a folder",
        ),
        ({"STOKER_MODELS": "/dev/null"}, ["pull", "smollm2"], 1, "/dev/null"),
        ({"HOME": "/proc"}, ["pull", "smollm2"], 1, "/proc/.cache"),
        ({"HF_ENDPOINT": "garbage"}, ["pull", "hf:a/b/c.gguf"], 2, "HF_ENDPOINT must be a URL"),
        ({"HF_ENDPOINT": "http://[::1"}, ["plan", "hf:a/b/c.gguf"], 2, "HF_ENDPOINT must be a"),
        (
            {"STOKER_CACHE": "/dev/null"},
            ["plan", "tiny.gguf", "--device", "x"],
            2,
            "x: No such file",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_surroundings_that_matter(
    environment: dict[str, str], arguments: list[str], code: int, message: str
) -> None:
    found, _, err = process(arguments, {"HOME": os.getcwd(), **environment})
    assert found == code and err.count("stoker: error: ") == 1 and message in err, err


def test_arguments_that_are_not_utf8() -> None:
    for locale in ({}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}):
        code, out, err = process([*RUN[:2], b"caf\xe9 \xff", *RUN[3:]], locale)
        assert code == 0 and out, err
        code, _, err = process(["run", b"\xff.gguf", "x"], locale)
        assert code == 2 and "udcff.gguf: no such file" in err, err


def test_without_proc(tmp_path: Path) -> None:
    """Without /proc, as in a jail, the machine's facts are unknown or found in other ways."""
    mount = f'mount --bind {tmp_path} /proc && exec "$@"'
    hidden = ["unshare", "--mount", "sh", "-c", mount, "-"]
    nothing = [sys.executable, "-c", "pass"]
    allowed = subprocess.run([*hidden, *nothing], capture_output=True, check=False)
    if allowed.returncode != 0:
        pytest.skip(f"unshare: {allowed.stderr.decode().strip()}")
    code, out, err = process(RUN, {}, before=hidden)
    assert code == 0 and out.strip(), err
    for arguments in (
        ["doctor"],
        ["doctor", "--json"],
        [*RUN, "--stats"],
        [*RUN, "--memory", "1GiB"],
    ):
        code, out, err = process(arguments, {}, before=hidden)
        assert code == 0, err
    code, _, err = process([*RUN, "--memory", "50%"], {}, before=hidden)
    assert code == 0 or (code == 2 and "memory 50%: this system does not tell" in err), err


def test_a_file_cut_while_it_is_used(tmp_path: Path) -> None:
    """Weights in memory still work; reading the cut ones is an error that says so."""
    import stoker

    sizes = {"n_embd": 256, "n_ff_expert": 512, "n_layer": 4, "head_dim": 64, "n_expert": 32}
    path = make(tmp_path / "cut.gguf", "qwen3moe", context=64, **sizes)
    with pytest.raises(stoker.BudgetError) as refused:
        stoker.load(path, threads=1, memory=1)
    least = next(int(w) for w in str(refused.value).split() if w.isdigit() and int(w) > 1 << 20)
    model = stoker.load(path, threads=1, memory=least + (4 << 20))
    assert model.offload is not None
    os.truncate(path, path.stat().st_size // 4)
    with pytest.raises((stoker.ModelFileError, stoker.DeviceError)) as caught:
        for _ in range(20):
            model.generate("the cat sat on", max_tokens=30, ignore_eos=True).read()
    assert str(caught.value).isprintable() and "cut.gguf" in str(caught.value)
