"""Values that Python can hold and the core cannot: each is used, or refused by name.

Whatever value an argument gets, a call works or raises a StokerError of one printable line: an
OptionError that names the argument if it is an option. The model and its sessions then answer as
they did before. STOKER_HYPOTHESIS=search looks further.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import stoker
from hypothesis import given
from hypothesis import strategies as st
from odd_values import CIRCLE, ODD, PATHS, Raises, breaking, iterators, values
from stoker.runtime.text.chat import ChatTemplate
from tiny_models import make

GENERATION = [f.name for f in fields(stoker.GenerationOptions)]
LOAD = [f.name for f in fields(stoker.LoadOptions)]
MESSAGES = [{"role": "user", "content": "hello"}]
TEXT = "the cat sat on the mat and the dog " * 3


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("tiny") / "llama.gguf", "llama", context=64)


@pytest.fixture(scope="module")
def model(path: Path) -> stoker.Model:
    return stoker.load(path, threads=1)


@pytest.fixture(scope="module")
def said(model: stoker.Model) -> Callable[[], tuple[str, str]]:
    """Function that gives the answers of the model and of a session with a past."""
    session = model.session()
    session.append("the dog")

    def say() -> tuple[str, str]:
        session.truncate(2)
        told = model.generate("the cat", temperature=0, max_tokens=4).read()
        return told, session.generate(" sat", temperature=0, max_tokens=4).read()

    return say


@pytest.fixture(scope="module", autouse=True)
def _unchanged(said: Callable[[], tuple[str, str]]) -> Iterator[None]:
    """Checks that the answers are the same afterwards."""
    before = said()
    yield
    assert said() == before


@contextmanager
def refusal(option: str = "") -> Iterator[None]:
    """Accepts a StokerError of one printable line; an OptionError must name the option."""
    try:
        yield
    except stoker.StokerError as error:
        assert str(error).isprintable(), repr(str(error))
        if option:
            assert isinstance(error, stoker.OptionError), repr(error)
            assert option in str(error), str(error)
            assert len(str(error)) < 400


def label(value: Any) -> str:
    """The name of a test's value; pytest cannot print every value."""
    return value if isinstance(value, str) and value.isidentifier() and value.isascii() else "-"


def each(call: Callable[[Any], object], option: str = "") -> None:
    """Calls with every odd value."""
    for value in [*ODD, *iterators()]:
        with refusal(option):
            call(value)


# The options.


@pytest.mark.parametrize("name", GENERATION)
def test_every_value_of_a_generation_option(name: str) -> None:
    each(lambda value: stoker.GenerationOptions(**{name: value}), name)


@pytest.mark.parametrize("name", LOAD)
def test_every_value_of_a_load_option(name: str) -> None:
    each(lambda value: stoker.LoadOptions(**{name: value}), name)


@given(st.dictionaries(st.sampled_from(GENERATION), values(), max_size=3))
def test_generation_options(model: stoker.Model, given: dict[str, Any]) -> None:
    try:
        options = stoker.GenerationOptions(**given)
    except stoker.OptionError as error:
        assert any(name in str(error) for name in given) and str(error).isprintable()
        return
    # Options that the class accepts the core accepts too, unless they depend on the model.
    try:
        model.generate("the", options=options, **{"max_tokens": 2}).read()
    except stoker.OptionError as error:
        assert "logit_bias" in str(error) or "logprobs" in str(error)


@given(st.dictionaries(st.sampled_from(LOAD), values(), max_size=2))
def test_load_options(path: Path, given: dict[str, Any]) -> None:
    try:
        stoker.load(path, **{"threads": 1, **given})
    except (stoker.OptionError, stoker.BudgetError) as error:
        assert any(name in str(error) for name in given) and str(error).isprintable()


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("top_k", 2**40, "top_k must be between 0 and 2147483647, not 1099511627776"),
        ("penalty_window", 2**31, "penalty_window must be between -1 and 2147483647"),
        ("max_tokens", 10**5000, "max_tokens must be .*, not an integer of 16610 bits"),
        ("max_tokens", 1.0, "max_tokens must be an integer, not 1.0"),
        ("temperature", 10**400, "temperature must be finite and at least 0"),
        ("temperature", np.array([0.5]), r"temperature must be a number, not array\(\[0.5\]\)"),
        ("temperature", "0.5", "temperature must be a number, not '0.5'"),
        ("top_p", np.timedelta64(1, "s"), "top_p must be a number"),
        ("seed", 2**64, "seed must be between 0 and 18446744073709551615"),
        ("seed", np.ones(2, int), r"seed must be an integer, not array\(\[1, 1\]\)"),
        ("logit_bias", {2**31: 1}, "logit_bias token must be between 0 and 2147483647"),
        ("logit_bias", {1: 10**400}, r"logit_bias\[1\] must be finite"),
        ("logit_bias", CIRCLE, r"logit_bias must map token ids to numbers, not \[\[\[\[\.\.\."),
        ("stop", [b"x"], "stop must be a string or a sequence of strings, not b'x'"),
        ("stop", Raises(ValueError), "stop must be a string or a sequence of strings, not "),
        ("ignore_eos", np.ones(2), "ignore_eos must be True or False"),
    ],
    ids=label,
)
def test_refused_generation_options(
    model: stoker.Model, option: str, value: object, message: str
) -> None:
    with pytest.raises(stoker.OptionError, match=message):
        model.generate("the", **{option: value})
    with pytest.raises(stoker.OptionError, match=message):
        model.session().chat("the", **{option: value})


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("context", 2**63, "context must be between 1 and 9223372036854775807"),
        ("context", 2**62, "context: expected 1 to 64 tokens"),
        ("threads", np.float32(2), "threads must be an integer"),
        ("memory", 10**5000, "memory must be below 2.62 bytes, not an integer of 16610 bits"),
        ("memory", np.arange(3), r"memory must be bytes, .* not array\(\[0, 1, 2\]\)"),
        ("kv_type", np.array(["f16", "f32"]), "kv_type must be one of f16, f32, not array"),
        ("profile", "a\0b", "profile must be a path without NUL characters"),
        ("profile", "\ud800", "profile must be a path that utf-8 can write, not '.ud800'"),
        ("profile", b"x", "profile must be a path, not b'x'"),
        ("policy", "x" * 70_000, "policy must be one of .*, not 'x*\\.\\.\\.x*'$"),
        ("io", "\udcff", r"io must be one of .*, not '\\udcff'"),
    ],
    ids=label,
)
def test_refused_load_options(path: Path, option: str, value: object, message: str) -> None:
    with pytest.raises(stoker.OptionError, match=message):
        stoker.load(path, **{option: value})


def test_numbers_of_other_types_mean_what_they_say(path: Path) -> None:
    """A numpy integer of 8 bits counts as a Python integer: nothing is computed in its type."""
    model = stoker.load(path, threads=np.int8(1), context=np.uint8(32), memory=np.int64(1 << 36))
    assert model.config["context"] == 32
    options = stoker.GenerationOptions(
        temperature=np.float16(0.5), top_k=np.array(3, ">i4"), max_tokens=np.uint8(3), seed=True + 1
    )
    assert [type(getattr(options, name)) for name in ("temperature", "top_k", "max_tokens")] == [
        float, int, int,
    ]  # fmt: skip
    assert len(model.generate("the", options=options, ignore_eos=np.True_).read()) > 0


def test_the_largest_numbers_are_only_large(model: stoker.Model) -> None:
    """A bias or penalty of any size leaves finite logits: it means always, or never."""
    for bias in (1e39, 1e300, 3.4e38):
        run = model.generate("the", temperature=0, max_tokens=3, logit_bias={70: bias})
        run.read()
        assert run.tokens == [70] * 3
        run = model.generate("the", top_k=0, max_tokens=3, logit_bias={70: -bias}, seed=1)
        run.read()
        assert 70 not in run.tokens
    for penalty in (0.01, 1e300):
        run = model.generate("the", max_tokens=20, repetition_penalty=penalty, ignore_eos=True)
        run.read()
        assert len(run.tokens) == 20
    everything = dict.fromkeys(range(model.n_vocab), float("-inf"))
    with pytest.raises(stoker.OptionError, match="logit_bias: expected a token to choose"):
        model.generate("the", logit_bias=everything).read()


# The model.


def test_every_value_of_a_prompt(model: stoker.Model, said: Callable[[], tuple[str, str]]) -> None:
    before = said()
    session = model.session(system="You are terse.")
    calls: tuple[Callable[[Any], object], ...] = (
        lambda value: model.generate(value, max_tokens=1).read(),
        lambda value: model.chat(value, max_tokens=1).read(),
        lambda value: model.chat("x", tools=value, max_tokens=1).read(),
        lambda value: model.generate_many(value, max_tokens=1).read(),
        lambda value: model.generate_many([value], max_tokens=1).read(),
        lambda value: model.rank(value, ["x"]),
        lambda value: model.rank("x", value),
        lambda value: model.rank("x", [value]),
        model.logits,
        model.embed,
        model.perplexity,
        session.append,
        lambda value: session.generate(value, max_tokens=1).read(),
        lambda value: session.chat(value, max_tokens=1).read(),
        lambda value: session.chat("x", tools=value, max_tokens=1).read(),
    )
    for call in calls:
        each(call)
        session.reset()
    assert said() == before


@given(values())
def test_prompts(model: stoker.Model, value: Any) -> None:
    with refusal():
        model.generate(value, max_tokens=1).read()
    with refusal():
        model.chat(value, max_tokens=1).read()


def test_every_value_of_an_argument(model: stoker.Model) -> None:
    each(lambda value: model.embed("x", pooling=value), "pooling")
    each(lambda value: model.embed("x", normalize=value), "normalize")
    each(lambda value: model.generate("x", options=value, max_tokens=1), "options")
    each(lambda value: model.generate_many(["x"], n=value), "n")
    each(lambda value: model.generate_many(["x"], parallel=value), "parallel")
    each(lambda value: model.session(system=value).chat("x", max_tokens=1).read())
    for name in ("context", "stride", "max_chunks"):
        each(lambda value: model.perplexity(TEXT, **{name: value}), name)  # noqa: B023
    with pytest.raises(stoker.OptionError, match="progress must be a function, not 5"):
        model.perplexity(TEXT, progress=5)  # type: ignore[arg-type]
    with pytest.raises(stoker.OptionError, match="context must be at least 3, not 2"):
        model.perplexity(TEXT, context=2)  # its second half has no token to score
    # A text that is shorter than the window is scored whole, as overlapping windows do.
    assert model.perplexity(TEXT, context=2, stride=1).tokens == model.perplexity(TEXT).tokens


def test_every_value_of_a_session(model: stoker.Model) -> None:
    session = model.session()
    session.append("the cat")
    each(lambda value: session.append("", add_special=value), "add_special")
    each(lambda value: session.append("", parse_special=value), "parse_special")

    def assign(value: Any) -> None:
        session.system = value

    each(assign, "system")
    session.system = None
    length = session.position
    for value in [*ODD, *iterators()]:
        with refusal("position"):
            session.truncate(value)
        session.reset()
        session.append("the cat")
    assert session.position == length


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([1, 2**64], "token 18446744073709551616 is outside the vocabulary of"),
        (np.array([1, 2**64 - 1], "u8"), "token 18446744073709551615 is outside"),
        (np.array([2**70], dtype=object), "token 1180591620717411303424 is outside"),
        (range(10**12), "token 3.. is outside the vocabulary of 3"),
        ([1, 0.5], "must be a string or a sequence of token ids, not 0.5 among others"),
        (np.array([1], "m8[s]"), "a string or a sequence of token ids, not array"),
        (bytearray(b"ab"), r"a string or a sequence of token ids, not bytearray\(b'ab'\)"),
        ({1: 2}, r"a string or a sequence of token ids, not \{1: 2\}"),
        (breaking(), "a string or a sequence of token ids, not <generator"),
    ],
    ids=label,
)
def test_refused_tokens(model: stoker.Model, tokens: Any, message: str) -> None:
    with pytest.raises(stoker.OptionError, match=message):
        model.generate(tokens)
    with pytest.raises(stoker.OptionError, match=message):
        model.logits(tokens)


def test_tokens_of_any_integers(model: stoker.Model) -> None:
    expected = model.logits([1, 2, 3])
    frozen = np.array([1, 2, 3], "i4")
    frozen.flags.writeable = False
    for tokens in (
        np.array([1, 2, 3], ">i8"), np.arange(7, dtype="u1")[1:4], np.arange(4)[:0:-1][::-1],
        np.array([1, 2, 3], dtype=object), frozen, range(1, 4), memoryview(frozen),
        np.ma.array([1, 2, 3]),
    ):  # fmt: skip
        np.testing.assert_array_equal(model.logits(tokens), expected)


# Tokenizer and template.


def test_every_value_of_the_tokenizer(model: stoker.Model) -> None:
    tokenizer = model.tokenizer
    for call in (
        tokenizer.decode, tokenizer.decode_bytes, tokenizer.token_bytes, tokenizer.id_to_token,
        tokenizer.is_special, lambda value: tokenizer.stream().push(value),
    ):  # fmt: skip
        each(call)
    each(tokenizer.encode, "text")
    each(tokenizer.token_to_id, "spelling")
    for name in ("add_special", "parse_special"):
        each(lambda value: tokenizer.encode("x", **{name: value}), name)  # noqa: B023
    each(lambda value: tokenizer.decode([1], skip_special=value), "skip_special")
    each(lambda value: tokenizer.stream(skip_special=value), "skip_special")
    each(lambda value: tokenizer.stream(at_start=value), "at_start")
    for token in (-1, tokenizer.vocab_size, 2**64, 10**5000):
        with pytest.raises(stoker.TokenizerError, match="outside the vocabulary of"):
            tokenizer.token_bytes(token)
    for token in (1.0, None, "1", np.array([1, 2])):
        with pytest.raises(stoker.OptionError, match="token must be an integer"):
            tokenizer.id_to_token(token)  # type: ignore[arg-type]


def hashable(value: object) -> bool:
    try:
        hash(value)
    except Exception:
        return False
    return True


def test_every_value_of_a_template(model: stoker.Model) -> None:
    template = model.chat_template
    assert template is not None
    each(template.render)
    each(lambda value: template.render(MESSAGES, add_generation_prompt=value))
    each(lambda value: template.render(MESSAGES, tools=value))
    each(lambda value: template.render(MESSAGES, template=value))
    each(lambda value: template.render(MESSAGES, variable=value))
    thinking = ChatTemplate("{{ messages[0].content }}{{ thinking }}{{ tools }}")
    each(thinking.prompt)
    each(lambda value: thinking.prompt(MESSAGES, variables=value), "template")
    each(lambda value: thinking.prompt(MESSAGES, variables={"thinking": value}))
    each(lambda value: thinking.prompt(MESSAGES, variables={value: 1}) if hashable(value) else None)
    each(lambda value: thinking.prompt(MESSAGES, tools=value))
    each(lambda value: thinking.prompt(MESSAGES, parse_special=value), "parse_special")
    each(lambda value: ChatTemplate(value).render(MESSAGES))
    each(lambda value: ChatTemplate("{{ bos_token }}", bos_token=value), "bos_token")
    each(lambda value: ChatTemplate("{{ variable }}").render(MESSAGES, variable=value))
    with pytest.raises(stoker.ChatTemplateError, match="tools: expected a list of tools, found"):
        model.chat("x", tools=5)  # type: ignore[arg-type]
    with pytest.raises(stoker.ChatTemplateError, match="messages: expected a list of messages"):
        model.chat({"role": "user"})  # type: ignore[arg-type]
    with pytest.raises(stoker.ChatTemplateError, match=r"messages\[0\]: expected a mapping"):
        model.chat([5])  # type: ignore[list-item]


def test_a_template_that_says_nothing(tmp_path: Path) -> None:
    path = make(tmp_path / "silent.gguf", "llama")
    with pytest.raises(stoker.ChatTemplateError, match="the chat template makes no prompt"):
        silent = stoker.load(path)
        silent._chat_template = ChatTemplate("")  # type: ignore[misc]
        silent.chat("hello")


# Files.


def test_every_value_of_a_path(path: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    each(stoker.load)
    each(lambda value: stoker.load(path, download=value), "download")
    each(lambda value: stoker.load(path, onnx=value))


def make_folder(path: Path) -> None:
    path.mkdir()


def make_loop(path: Path) -> None:
    path.symlink_to(path.name)


def make_broken_link(path: Path) -> None:
    path.symlink_to("nothing")


def make_child_of_a_file(path: Path) -> None:
    path.parent.touch()


@pytest.mark.parametrize("suffix", [".gguf", ".onnx"])
@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("folder", make_folder, "expected a GGUF file, found a directory"),
        ("empty", Path.touch, "expected .*, found an empty file"),
        ("loop", make_loop, "symbolic links"),
        ("link", make_broken_link, "no such file"),
        ("pipe", os.mkfifo, "expected a GGUF file, found a device, pipe or socket"),
        ("x" * 300, None, "File name too long"),
        ("\udcff\n\x1b[31m", None, r"udcff\\n\\x1b\[31m.*: no such file"),
        ("file/x", make_child_of_a_file, "no such file"),
    ],
    ids=label,
)
def test_files_that_are_none(
    tmp_path: Path,
    name: str,
    make: Callable[[Path], object] | None,
    suffix: str,
    message: str,
) -> None:
    file = tmp_path / f"{name}{suffix}"
    if make is not None:
        make(file)
    with pytest.raises(stoker.ModelFileError, match=message) as caught:
        stoker.load(file)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "spec", ["hf:../../x.gguf", "hf:a/./b.gguf", "hf:a/b//c.gguf", "hf:a/b/" + "x" * 300]
)
def test_hub_names_that_no_file_has(spec: str) -> None:
    with pytest.raises(stoker.OptionError, match=r"expected hf:owner/name/file\.gguf"):
        stoker.load(spec)


def test_odd_paths_of_recordings(model: stoker.Model) -> None:
    for value in PATHS:
        with refusal(), model.record(value):
            pass


def test_arguments_are_covered() -> None:
    """Every argument of a public call has a test here; a new one needs one, too."""
    known = {
        "generate": {"prompt", "options", "overrides"},
        "chat": {"messages", "tools", "template", "parse_special", "options", "overrides"},
        "generate_many": {"prompts", "n", "parallel", "options", "overrides"},
        "rank": {"prompt", "candidates"},
        "session": {"system"},
        "logits": {"tokens"},
        "embed": {"text", "pooling", "normalize"},
        "perplexity": {"text", "context", "stride", "max_chunks", "progress"},
        "record": {"path"},
        "run": {"inputs"},
        "forecast": set(),
    }
    for name, method in inspect.getmembers(stoker.Model, inspect.isfunction):
        if not name.startswith("_"):
            assert set(inspect.signature(method).parameters) - {"self"} <= known[name], name


# Functions that make files (stoker.export), with cheap arguments: most have no model.

SOURCE = "missing.gguf"
EXPORTS: dict[str, tuple[str, dict[str, Any]]] = {
    "quantize": ("quantize", {"source": SOURCE, "out": "q.gguf", "type": "Q8_0"}),
    "imatrix": ("collect", {"source": SOURCE, "out": "i.gguf", "text": TEXT}),
    "bitwidth": ("adapt", {"source": SOURCE, "out": "b.gguf", "text": TEXT, "bits": 3.5}),
    "upcycle": ("upcycle", {"base": SOURCE, "out": "u.gguf", "experts": 2, "used": 1}),
    "refactor": ("refactor", {"base": SOURCE, "out": "r.gguf", "text": [TEXT]}),
    "pregate": ("pregate", {"base": SOURCE, "out": "p.gguf"}),
    "hf_to_gguf": ("convert", {"folder": "missing", "out": "h.gguf"}),
    "hf_to_onnx": ("hf_to_onnx", {"folder": "missing", "out": "h.onnx"}),
    "to_onnx": ("gguf_to_onnx", {"source": SOURCE, "out": "o.onnx"}),
    "tflite": ("convert", {"source": "missing.tflite", "out": "t.onnx"}),
    "onnx_quantize": ("quantize", {"source": "missing.onnx", "out": "n.onnx"}),
    "verify": ("verify", {"a": SOURCE, "b": SOURCE}),
}


@pytest.mark.parametrize("module", EXPORTS)
def test_every_value_of_an_export(
    module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name, right = EXPORTS[module]
    function = getattr(import_module(f"stoker.export.{module}"), name)
    for argument in inspect.signature(function).parameters:
        for value in [*ODD, *iterators()]:
            with refusal():
                function(**{**right, argument: value})
        for value in (Raises(ValueError), object(), b"x", 1j):
            with pytest.raises(stoker.OptionError, match=f"^{argument} must be "):
                function(**{**right, argument: value})
    assert [path for path in tmp_path.iterdir() if not path.name.startswith(".")] == []


def test_an_export_of_other_types(path: Path, tmp_path: Path) -> None:
    """A path of any kind and a numpy number work like their plain values."""
    quantize = import_module("stoker.export.quantize").quantize
    quantize(path, tmp_path / "a.gguf", type="Q8_0", threads=np.int8(1))
    quantize(str(path), str(tmp_path / "b.gguf"), type=np.str_("Q8_0"))
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    with pytest.raises(stoker.OptionError, match=r"x{300}.*: File name too long"):
        quantize(path, tmp_path / ("x" * 300), type="Q8_0")
