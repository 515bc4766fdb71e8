"""The command line: output, exit codes, one-line errors, the chat in a terminal, Ctrl-C."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import Terminal, command, finish, reciting
from stoker.runtime.terminal.terminal import WordWrap
from tiny_models import make


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("tiny") / "tiny.gguf", "llama")


@pytest.fixture
def recital(tmp_path: Path) -> str:
    """An existing file for the reciting model, which does not read it."""
    path = tmp_path / "recital.gguf"
    path.touch()
    return str(path)


# Help and usage.


def test_help_is_quick_and_has_examples() -> None:
    seconds = []  # processor time; the best of three, so that a busy machine matters little
    for _ in range(3):
        before = os.times()
        done = finish(command("--help"))
        after = os.times()
        seconds.append(sum(after[2:4]) - sum(before[2:4]))  # user and system time of children
    names = ("run", "chat", "inspect", "pull", "perplexity", "doctor")
    assert all(re.search(rf"^  {name} ", done.stdout, re.M) for name in names)
    for name in names:
        assert f"\n  stoker {name} " in finish(command(name, "--help")).stdout
    # A desktop takes a tenth of it. The next test checks which modules must not be loaded.
    assert min(seconds) < 1


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys\nfrom stoker.runtime.cli.main import main\nmain(['--help'])\n"
        "heavy = ('numpy', 'rich', 'tokenizers', 'jinja2', 'huggingface_hub', 'psutil')\n"
        "print([m for m in (*heavy, 'stoker.runtime._core') if m in sys.modules])"
    )
    assert finish([sys.executable, "-c", code]).stdout.splitlines()[-1] == "[]"


def test_version_and_bare_command() -> None:
    import stoker

    assert finish(command("--version")).stdout == f"stoker {stoker.__version__}\n"
    bare = finish(command())
    assert bare.returncode == 0
    assert bare.stdout.startswith("Usage: stoker")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "No such command 'nonsense'."),
        (["run"], "Missing argument 'MODEL'."),
        (["run", "m.gguf", "x", "--bogus"], "No such option"),
        (["run", "m.gguf", "x", "--top-k", "many"], "Invalid value for '--top-k'"),
        (["run", "m.gguf", "x", "--top-p", "2"], "top_p must be between 0 and 1, not 2"),
        (["run", "m.gguf", "x", "--threads", "0"], "threads must be between 1 and 1024, not 0"),
        (["run", "m.gguf", "x", "--file", "y"], "give a prompt or --file, not both"),
        (["run", "m.gguf", "--file", "/none"], "cannot read /none: No such file or directory"),
        (["run", "/none.gguf", "x"], "/none.gguf: no such file"),
        (["run", "/", "x"], "/: expected a GGUF file, found a directory"),
        (["inspect", "hf:broken"], "hf:broken: expected hf:owner/name/file.gguf[@revision]"),
        (["inspect", "m.gguf", "--json", "--tsv"], "give --json or --tsv, not both"),
        (["pull", "nonsense"], "nonsense: expected hf:owner/name/file.gguf or one of "),
        (["perplexity", "m.gguf", "/none"], "cannot read /none"),
    ],
)
def test_usage_errors_are_one_line(arguments: list[str], message: str) -> None:
    done = finish(command(*arguments))
    assert done.returncode == 2
    assert done.stderr.startswith(f"stoker: error: {message}")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


# Bad model files give one line with the file, what was expected and what was found; code 2.


def rewritten(data: bytes, old: bytes, new: bytes) -> bytes:
    assert len(old) == len(new) and old in data
    return data.replace(old, new)


@pytest.mark.parametrize("sub_command", ["run", "inspect"])
@pytest.mark.parametrize("harm", ["truncated", "magic", "version", "empty", "counts"])
def test_damaged_files(tiny: Path, tmp_path: Path, harm: str, sub_command: str) -> None:
    data = tiny.read_bytes()
    bad = {
        "truncated": data[: len(data) // 2],
        "magic": b"GGML" + data[4:],
        "version": data[:4] + struct.pack("<I", 99) + data[8:],
        "empty": b"",
        "counts": data[:8] + struct.pack("<Q", 1 << 60) + data[16:],
    }[harm]
    path = tmp_path / "bad.gguf"
    path.write_bytes(bad)
    done = finish(command(sub_command, str(path), *(["hi"] if sub_command == "run" else [])))
    assert done.returncode == 2
    assert re.fullmatch(r"stoker: error: .*bad\.gguf: .*expected .*found .*\n", done.stderr)


def test_flipped_bits_never_crash(tiny: Path, tmp_path: Path) -> None:
    """A flipped bit in the header or directory is refused in one line, or harmless."""
    data = tiny.read_bytes()
    path = tmp_path / "flipped.gguf"
    code = (
        "import random, sys\nfrom stoker.runtime.cli.main import main\n"
        "data, path = open(sys.argv[1], 'rb').read(), sys.argv[2]\n"
        "chance = random.Random(1)\ncodes = set()\n"
        "for _ in range(200):\n"
        "    bad = bytearray(data)\n"
        "    bad[chance.randrange(24000)] ^= 1 << chance.randrange(8)\n"
        "    open(path, 'wb').write(bad)\n"
        "    codes.add(main(['inspect', path, '--json']))\n"
        "print(sorted(codes), file=sys.stderr)\n"
    )
    done = finish([sys.executable, "-c", code, str(tiny), str(path)])
    assert len(data) > 24000
    lines = done.stderr.splitlines()
    assert lines[-1] == "[0, 2]"
    assert all(line.startswith("stoker: error: ") and "flipped.gguf" in line for line in lines[:-1])


def test_unsupported_models(tiny: Path, tmp_path: Path) -> None:
    data = tiny.read_bytes()
    path = tmp_path / "other.gguf"
    path.write_bytes(rewritten(data, b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0zebra"))
    done = finish(command("run", str(path), "hi"))
    assert done.returncode == 2
    assert re.fullmatch(r"stoker: error: .*other\.gguf: .*zebra.*\n", done.stderr)
    shown = finish(command("inspect", str(path)))
    assert shown.returncode == 0  # a model that cannot run can be inspected
    assert "zebra" in shown.stdout
    # Change the first F32 tensor's type to one that does not exist.
    name = b"token_embd.weight"
    at = data.index(name) + len(name)
    at += 4 + 8 * struct.unpack_from("<I", data, at)[0]
    path.write_bytes(data[:at] + struct.pack("<I", 4711) + data[at + 4 :])
    done = finish(command("run", str(path), "hi"))
    assert done.returncode == 2
    assert re.fullmatch(r"stoker: error: .*other\.gguf: .*4711.*\n", done.stderr)


def test_missing_shard(tiny: Path, tmp_path: Path) -> None:
    import gguf

    first = tmp_path / "model-00001-of-00002.gguf"
    writer = gguf.GGUFWriter(first, "llama")
    writer.add_uint16("split.no", 0)
    writer.add_uint16("split.count", 2)
    writer.add_int32("split.tensors.count", 0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    done = finish(command("inspect", str(first)))
    assert done.returncode == 2
    assert re.fullmatch(r"stoker: error: .*model-00002-of-00002\.gguf.*\n", done.stderr)


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    done = finish(command("run", "/none.gguf", "x"), STOKER_DEBUG="1")
    assert done.returncode == 2
    assert done.stderr.startswith("Traceback")
    assert done.stderr.splitlines()[-1] == "stoker: error: /none.gguf: no such file"


# run


def test_run_prints_the_answer(recital: str) -> None:
    done = finish(reciting("Grüße, 世界!", "run", recital, "hello"))
    assert (done.returncode, done.stdout, done.stderr) == (0, "Grüße, 世界!\n", "")


def test_run_reads_stdin_and_files(recital: str, tmp_path: Path) -> None:
    line = reciting("ok", "run", recital, "--json")
    tokens = []
    prompt = tmp_path / "prompt.txt"
    prompt.write_bytes(b"hello\n")
    for arguments, text in (
        (["hello"], None),
        (["-"], "hello\n"),
        ([], "hello"),
        (["-f", str(prompt)], None),
    ):
        done = finish([*line, *arguments], text=text)
        tokens.append(json.loads(done.stdout.splitlines()[-1])["stats"]["prompt_tokens"])
    assert tokens == [len("hello") + 2] * 4
    prompt.write_bytes(b"\xff\xfe")
    done = finish([*line, "-f", str(prompt)])
    assert done.returncode == 2
    assert "prompt.txt: expected UTF-8 text" in done.stderr


def test_run_json_lines(recital: str) -> None:
    done = finish(reciting("a🙂b", "run", recital, "x", "--json", "--logprobs", "2", "--seed", "5"))
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert "".join(row["text"] for row in rows[:-1]) == "a🙂b"
    assert all(len(row["top_logprobs"]) == 2 and row["logprob"] < 0 for row in rows[:-1])
    last = rows[-1]
    assert (last["done"], last["text"], last["finish_reason"]) == (True, "a🙂b", "stop")
    assert last["seed"] == 5
    assert last["stats"]["new_tokens"] == 6


def test_run_options_reach_the_model(recital: str) -> None:
    done = finish(reciting("one two three", "run", recital, "x", "--stop", "zzz", "--stop", "two"))
    assert done.stdout == "one \n"
    done = finish(reciting("one two", "run", recital, "x", "-n", "3", "--stats"))
    assert done.stdout == "one\n"
    assert re.match(r"load .* ms \| TTFT .* ms \| prompt 3 tokens .*answer 3 tokens", done.stderr)
    done = finish(reciting("one", "run", recital, "x", "--system", "be brief", "--json"))
    assert json.loads(done.stdout.splitlines()[-1])["stats"]["prompt_tokens"] == 3 + 9
    done = finish(reciting("one", "run", recital, "x<|answer|>", "--raw"))
    assert done.stdout == "one\n"
    done = finish(reciting("one", "run", recital, "x", "--raw", "--system", "s"))
    assert (done.returncode, done.stdout) == (2, "")


def test_run_too_long_prompt(recital: str) -> None:
    done = finish(reciting("one", "run", recital, "x" * 50, "-c", "20"))
    assert done.returncode == 2
    assert done.stderr.startswith("stoker: error: 52 tokens do not fit a context of 20")


def test_run_on_the_real_core(tiny: Path) -> None:
    line = command("run", str(tiny), "hello", "-n", "8", "--ignore-eos", "--temperature", "0")
    first, second = finish([*line, "--json"]), finish([*line, "--json"])
    assert first.returncode == 0, first.stderr
    summary = json.loads(first.stdout.splitlines()[-1])
    assert summary["finish_reason"] == "length"
    assert summary["stats"]["new_tokens"] == 8
    assert summary["text"] == json.loads(second.stdout.splitlines()[-1])["text"]


def test_interrupted_run(recital: str) -> None:
    line = reciting("a story that goes on", "run", recital, "slowly")
    with subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.read(7) == "a story"
        process.send_signal(signal.SIGINT)
        try:
            out, errors = process.communicate(timeout=300)
        finally:
            process.kill()
    assert process.returncode == 130
    assert out.endswith("\n")
    assert errors.strip() == ""


def test_closed_pipe_is_quiet(tiny: Path) -> None:
    line = command("inspect", str(tiny), "--tsv", "--full")
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(300) == 1


# inspect and perplexity


def test_inspect_formats(tiny: Path) -> None:
    table = finish(command("inspect", str(tiny)))
    assert table.returncode == 0, table.stderr
    assert re.search(r"^llama\.block_count +3$", table.stdout, re.M)
    assert re.search(r"^blk\.2\.attn_q\.weight +F32 +64 x 64 +16\.0 KiB$", table.stdout, re.M)
    assert re.search(r"^tokenizer\.ggml\.tokens +\[\d+\] .*\.\.\.$", table.stdout, re.M)
    assert max(map(len, table.stdout.splitlines())) < 200
    document = json.loads(finish(command("inspect", str(tiny), "--json")).stdout)
    assert document["metadata"]["general.architecture"] == "llama"
    tokens = document["metadata"]["tokenizer.ggml.tokens"]
    assert tokens["length"] > len(tokens["first"]) == 8
    full = json.loads(finish(command("inspect", str(tiny), "--json", "--full")).stdout)
    assert len(full["metadata"]["tokenizer.ggml.tokens"]) == tokens["length"]
    rows = finish(command("inspect", str(tiny), "--tsv")).stdout.splitlines()
    assert rows[0].split("\t") == ["name", "type", "shape", "offset", "nbytes", "shard"]
    assert len(rows) == len(document["tensors"]) + 1
    assert sum(int(row.split("\t")[4]) for row in rows[1:]) < tiny.stat().st_size
    short = finish(command("inspect", str(tiny), "--no-tensors", "--no-metadata"))
    assert short.stdout.count("\n") == 1
    assert "parameters in" in short.stdout


def test_inspect_shows_strange_text_safely(tmp_path: Path) -> None:
    import gguf

    path = tmp_path / "strange.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_string("evil.escape", "\x1b[31mred\x07 line\nbreak")
    writer.add_array("evil.bytes", ["ok", "\x00", "末"])
    writer.add_float32("evil.nan", float("nan"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    table = finish(command("inspect", str(path)))
    assert table.returncode == 0, table.stderr
    assert "\x1b" not in table.stdout and "\\x1b[31mred" in table.stdout
    assert "line\\nbreak" in table.stdout and "末" in table.stdout
    json.loads(finish(command("inspect", str(path), "--json")).stdout)
    ascii_only = finish(command("inspect", str(path)), PYTHONIOENCODING="ascii")
    assert ascii_only.returncode == 0


def test_perplexity(tiny: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog and goes home " * 12)
    line = command("perplexity", str(tiny), str(text), "-c", "64")
    done = finish(line)
    assert re.fullmatch(
        r"perplexity [\d.]+ \+/- [\d.]+ \(.* tokens scored in \d+ chunks\)\n", done.stdout
    )
    result = json.loads(finish([*line, "--json"]).stdout)
    assert done.stdout.startswith(f"perplexity {result['ppl']:.4f} ")
    assert result["tokens"] == 31 * result["chunks"]
    strided = json.loads(finish([*line, "--json", "--stride", "32"]).stdout)
    assert strided["tokens"] > result["tokens"]
    piped = finish(command("perplexity", str(tiny), "-", "-c", "64"), text=text.read_text())
    assert piped.stdout == done.stdout


# chat


def test_chat_from_a_pipe(recital: str) -> None:
    line = reciting("yes", "chat", recital)
    done = finish(line, text='hello\n\n/stats\n/system be kind\nagain\n"""two\nlines"""\n')
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == lines[3] == lines[4] == "yes"
    assert lines[1].startswith("TTFT ")
    assert lines[2] == "(system message: be kind)"
    assert len(lines) == 5
    done = finish(line, text="/bogus\n")
    assert done.returncode == 2
    assert done.stderr == "stoker: error: unknown command /bogus; /help lists them\n"
    assert finish(line, text="/quit\nhello\n").stdout == ""
    joined = finish([*line, "-c", "10"], text="1234567\\\n89\n")
    assert joined.stderr.startswith("stoker: error: 12 tokens do not fit a context of 10")


@pytest.fixture
def terminals() -> Iterator[list[Terminal]]:
    opened: list[Terminal] = []
    yield opened
    for terminal in opened:
        os.close(terminal.fd)


def test_chat_in_a_terminal(recital: str, terminals: list[Terminal]) -> None:
    line = reciting("A long answer in many words. ", "chat", recital, delay=0.01)
    terminal = Terminal(line)
    terminals.append(terminal)
    terminal.expect("/help lists the commands")
    terminal.expect("> ")
    terminal.type("/help\r")
    terminal.expect("Ctrl-C stops the answer.")
    terminal.expect("> ")
    terminal.type("hello\r")
    answer = terminal.expect("words. ")
    assert "\x1b[1;23r" in answer  # the last row is reserved for the status
    status = r"\d tokens \| [\d.]+ tok/s \| \d+ of 4096 tokens of context"
    assert re.search(status, terminal.statuses)
    rest = terminal.expect("> ")
    assert "\x1b[r" in rest  # and released again
    # Ctrl-C stops the answer, not the program; what was said is remembered.
    terminal.type("and more, slowly\r")
    terminal.expect("slowly")  # the echo
    terminal.expect("A long")
    terminal.type("\x03")
    stopped = terminal.expect("> ")
    assert "(stopped)" in stopped and "words" not in stopped
    terminal.type("/stats\r")
    terminal.expect("tok/s")
    terminal.expect("> ")
    # Ctrl-C is repeated: readline misses a signal between its prompt and its select().
    for _ in range(100):
        terminal.type("\x03")
        if terminal.comes("(Ctrl-D or /quit to leave)", 0.5):
            break
    terminal.expect("(Ctrl-D or /quit to leave)")
    terminal.expect("> ")
    terminal.type("/reset\r")
    terminal.expect("(the conversation is forgotten)")
    terminal.expect("> ")
    terminal.type('"""\rtwo\rlines"""\r')
    terminal.expect("words. ")
    terminal.expect("> ")
    terminal.type("\x04")
    assert terminal.wait() == 0


WRAPPED = [
    ("The quick brown fox jumps", "The quick brown fox\njumps"),
    ("Over the extraordinary", "Over the\nextraordinary"),
    ("one\n\n  two", "one\n\n  two"),
    ("supercalifragilisticexpialidocious", "supercalifragilisti\ncexpialidocious"),
    ("\u4e16\u754c" * 6, "\u4e16\u754c" * 4 + "\u4e16\n" + "\u754c\u4e16\u754c"),
    ("exactly nineteen ch exactly", "exactly nineteen ch\nexactly"),
]


@pytest.mark.parametrize(("text", "shown"), WRAPPED)
@pytest.mark.parametrize("piece", [1, 4, 100])
def test_words_are_not_broken(
    text: str, shown: str, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    out = io.StringIO()
    wrap = WordWrap(out)
    for i in range(0, len(text), piece):
        wrap.write(text[i : i + piece])
    screen = ""  # the text that a terminal would show
    for part in re.split(r"(\x1b\[\d+D\x1b\[K)", out.getvalue()):
        back = re.fullmatch(r"\x1b\[(\d+)D\x1b\[K", part)
        screen = screen[: -int(back[1])] if back else screen + part
    assert [line.rstrip() for line in screen.split("\n")] == shown.split("\n")


def test_chat_survives_a_full_context(recital: str, terminals: list[Terminal]) -> None:
    terminal = Terminal(reciting("fine", "chat", recital, "-c", "20"))
    terminals.append(terminal)
    terminal.expect("> ")
    terminal.type("this is far too long for it\r")
    terminal.expect("tokens do not fit a context of 20")
    terminal.expect("> ")
    terminal.type("short\r")
    terminal.expect("fine")
    terminal.expect("> ")
    terminal.type("/quit\r")
    assert terminal.wait() == 0


def test_model_cannot_steer_the_terminal(recital: str, terminals: list[Terminal]) -> None:
    terminal = Terminal(reciting("a\x1b]0;title\x07b\x9b31mc\n", "run", recital, "x"))
    terminals.append(terminal)
    assert "a]0;titleb31mc" in terminal.expect("c\r\n")
    assert terminal.wait() == 0


def test_base_model_without_a_template(tmp_path: Path) -> None:
    import gguf

    source = make(tmp_path / "tiny.gguf", "llama")
    # The template is removed, and the marks are not ChatML's.
    data = source.read_bytes()
    data = data.replace(b"tokenizer.chat_template", b"tokenizer.chat_templatx")
    data = data.replace(b"<|im_start|>", b"<|xx_start|>").replace(b"<|im_end|>", b"<|xx_end|>")
    source.write_bytes(data)
    assert gguf.GGUFReader(source).get_field("tokenizer.chat_template") is None
    done = finish(command("chat", str(source)), text="hi\n")
    assert done.returncode == 2
    assert "tiny.gguf has no chat template" in done.stderr
    done = finish(command("run", str(source), "the", "--chat"))
    assert done.returncode == 2
    assert "tiny.gguf has no chat template" in done.stderr
    done = finish(command("run", str(source), "the", "-n", "2", "--temperature", "0"))
    assert done.returncode == 0, done.stderr


# pull


def test_pull_list() -> None:
    done = finish(command("pull", "list"), STOKER_MODELS="/nowhere")
    assert done.returncode == 0
    assert "smollm2-135m-instruct (smollm2, smollm2-135m)" in done.stdout
    assert done.stdout.count("not downloaded") == 2
