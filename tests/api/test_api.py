"""The Python API over the real core: on tiny models, and on downloaded catalogue models."""

from __future__ import annotations

import math
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import stoker
from stoker.models import cache, catalogue
from stoker.models.catalogue import Entry
from stoker.runtime.perplexity import windows
from tiny_models import make, some_tokens


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("tiny") / "llama.gguf", "llama", context=256)


@pytest.fixture(scope="module")
def model(path: Path) -> stoker.Model:
    return stoker.load(path, threads=2)


def downloaded(name: str) -> tuple[Entry, Path]:
    """A catalogue model that is in the cache; skips the test if it is not."""
    entry = catalogue.find(name)
    assert entry is not None
    path = cache.cached(entry)
    if path is None:
        pytest.skip(f"{entry.file} is not in {cache.directory()}: run `stoker pull {name}`")
    return entry, path


def test_public_names() -> None:
    assert set(stoker.__all__) <= set(dir(stoker))
    for name in stoker.__all__:
        assert getattr(stoker, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        stoker.nothing  # noqa: B018
    assert issubclass(stoker.OptionError, ValueError)
    assert issubclass(stoker.DeviceError, OSError)


def test_importing_is_light() -> None:
    code = (
        "import sys, stoker; print('numpy' in sys.modules, 'stoker.runtime._core' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_a_chat_takes_little_before_the_model() -> None:
    """Interpreter, libraries and vocabulary of `stoker chat smollm2`: 37 MiB measured."""
    downloaded("smollm2")
    line = [sys.executable, "-m", "stoker.runtime.cli.main", "chat", "smollm2", "--plan", "-n", "1"]
    done = subprocess.run(
        [*line, "--memory", "200MB"], input="hi\n", capture_output=True, text=True, check=True
    )
    found = re.search(r"^process +([\d.]+) MiB before the model", done.stderr, re.M)
    assert found is not None, done.stderr
    assert float(found[1]) <= 42


def test_model_tells_about_itself(model: stoker.Model, path: Path) -> None:
    assert model.path == path
    assert model.name == "tiny llama"
    assert model.config["architecture"] == "llama"
    assert model.config["context"] == model.plan["context"] == 256
    assert model.plan["threads"] == 2
    assert model.metadata["llama.block_count"] == model.config["n_layer"] == 3
    with pytest.raises(TypeError):
        model.config["n_layer"] = 4  # type: ignore[index]
    assert model.load_s > 0


def test_greedy_is_repeatable_and_the_session_agrees(model: stoker.Model) -> None:
    prompt = some_tokens(20, seed=3)
    first = model.generate(prompt, temperature=0, max_tokens=20, ignore_eos=True)
    first.read()
    assert len(first.tokens) == 20
    again = model.generate(list(prompt), temperature=0, max_tokens=20, ignore_eos=True)
    again.read()
    assert again.tokens == first.tokens
    session = model.session()
    session.append(prompt)
    halves = []
    for _ in range(2):
        part = session.generate(temperature=0, max_tokens=10, ignore_eos=True)
        part.read()
        halves += part.tokens
    assert halves == first.tokens
    # The probabilities reported for each token are those of logits().
    rows = model.logits([*map(int, prompt), *first.tokens])
    rows[:, list(model.tokenizer.eog_ids)] = -np.inf
    assert rows[19:-1].argmax(axis=1).tolist() == first.tokens


def test_seed_decides(model: stoker.Model) -> None:
    def tokens(seed: int) -> list[int]:
        run = model.generate(some_tokens(5), seed=seed, temperature=1.5, top_k=0, max_tokens=30)
        run.read()
        return run.tokens

    assert tokens(1) == tokens(1) != tokens(2)


def test_truncated_session_goes_on_alike(model: stoker.Model) -> None:
    ids = some_tokens(40, seed=1)
    session = model.session()
    session.append(ids)
    expected = session.logits()
    session.append(some_tokens(30, seed=2))
    session.truncate(40)
    np.testing.assert_array_equal(session.logits(), expected)
    session.truncate(10)
    session.append(ids[10:])
    np.testing.assert_allclose(session.logits(), expected, atol=1e-4)


def test_logits_embed_shapes(model: stoker.Model) -> None:
    ids = some_tokens(12)
    rows = model.logits(ids)
    assert rows.shape == (12, model.n_vocab) and rows.dtype == np.float32
    vector = model.embed(ids)
    assert vector.shape == (model.config["n_embd"],) and vector.dtype == np.float32
    unit = model.embed(ids, normalize=True)
    assert np.linalg.norm(unit) == pytest.approx(1, abs=1e-5)
    np.testing.assert_allclose(unit * np.linalg.norm(vector), vector, rtol=1e-4, atol=1e-6)
    with pytest.raises(stoker.OptionError, match="no tokens"):
        model.logits([])
    with pytest.raises(stoker.ContextLengthError, match="257 tokens do not fit a context of 256"):
        model.logits([1] * 257)


def test_perplexity_counts_what_it_says(model: stoker.Model) -> None:
    ids = some_tokens(100, seed=5)

    def nll(tokens: Any, first: int) -> list[float]:
        rows = model.logits(tokens).astype(np.float64)
        rows -= np.log(np.exp(rows).sum(axis=1, keepdims=True))
        return [-rows[i - 1, tokens[i]] for i in range(first, len(tokens))]

    # As in llama.cpp, windows of 32 have the tokens after position 16 scored; 4 are left out.
    scored = [x for begin in (0, 32, 64) for x in nll(ids[begin : begin + 32], 17)]
    got = model.perplexity(ids, context=32)
    assert (got.tokens, got.chunks) == (len(scored), 3) == (45, 3)
    assert got.nll == pytest.approx(np.mean(scored), abs=1e-5)
    assert got.ppl == pytest.approx(math.exp(got.nll))
    # With a stride every token but the first is scored once.
    scored = nll(ids[:32], 1)
    for end in range(40, 100, 8):
        scored += nll(ids[end - 32 : end], 24)
    scored += nll(ids[68:100], 28)
    progress: list[tuple[int, int, float]] = []
    got = model.perplexity(
        ids, context=32, stride=8, progress=lambda *state: progress.append(state)
    )
    assert (got.tokens, got.chunks) == (99, len(progress))
    assert got.nll == pytest.approx(np.mean(scored), abs=1e-5)
    assert progress[-1][:2] == (got.chunks, got.chunks)
    assert progress[-1][2] == pytest.approx(got.ppl)
    short = model.perplexity(ids[:20], context=32)
    assert (short.tokens, short.chunks) == (19, 1)
    assert model.perplexity(ids, context=32, max_chunks=2).chunks == 2


@pytest.mark.parametrize("n", [2, 5, 31, 32, 33, 64, 100])
@pytest.mark.parametrize("stride", [1, 7, 31])
def test_strided_windows_score_every_token_once(n: int, stride: int) -> None:
    scored: list[int] = []
    for begin, end, first in windows(n, 32, stride):
        assert end - begin <= 32 and begin < first < end
        scored += range(first, end)
    assert scored == list(range(1, n))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"context": 1}, "context must be at least 2, not 1"),
        ({"context": 1000}, "context must be at most the 256 tokens"),
        ({"context": 32, "stride": 32}, "stride must be between 1 and 31, not 32"),
        ({"max_chunks": 0}, "max_chunks must be at least 1"),
    ],
)
def test_bad_perplexity_options(
    model: stoker.Model, arguments: dict[str, int], message: str
) -> None:
    with pytest.raises(stoker.OptionError, match=message):
        model.perplexity(some_tokens(100), **arguments)  # type: ignore[arg-type]
    with pytest.raises(stoker.OptionError, match="perplexity needs at least 2"):
        model.perplexity([1])


def test_threads_with_a_session_each(model: stoker.Model) -> None:
    """Eight threads on one model each get the answer that they would get alone."""

    def answer(i: int) -> list[int]:
        session = model.session()
        session.append(some_tokens(10 + i, seed=i))
        run = session.generate(temperature=0, max_tokens=40, ignore_eos=True)
        run.read()
        return run.tokens

    alone = [answer(i) for i in range(8)]
    together: dict[int, list[int]] = {}
    threads = [
        threading.Thread(target=lambda i=i: together.__setitem__(i, answer(i))) for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert [together.get(i) for i in range(8)] == alone


def test_load_errors(tmp_path: Path, path: Path) -> None:
    with pytest.raises(stoker.ModelFileError, match="no such file"):
        stoker.load(tmp_path / "none.gguf")
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(stoker.ModelFileError, match=r"bad\.gguf: .*expected.*found") as caught:
        stoker.load(bad)
    assert "\n" not in str(caught.value)
    with pytest.raises(stoker.OptionError, match="threads must be between 1 and 1024, not 0"):
        stoker.load(path, threads=0)


def test_tokens_of_kind(model: stoker.Model) -> None:
    """Any integers are accepted as tokens, and nothing else."""
    for tokens in ([1, 2], (1, 2), np.array([1, 2], np.int64), [np.int32(1), np.int32(2)]):
        assert model.logits(tokens).shape[0] == 2
    for bad in ([1.5], [[1, 2]], [True], [None], 5):
        with pytest.raises(stoker.OptionError):
            model.logits(bad)  # type: ignore[arg-type]


INTERRUPTED = """
import sys, threading, stoker
model = stoker.load(sys.argv[1], context=4096)
session = model.session()
session.append("before")
held = session.position
more = session.append("x " * 1500)
session.truncate(held)
try:
    print("ready", flush=True)
    while True:
        session.append("x " * 1500)
        session.truncate(held)
except KeyboardInterrupt:
    pass
# Nothing of an interrupted text is left (unless it had just been completed).
assert session.position in (held, held + more), session.position
assert session.position == session._sequence.position
session.truncate(held)
print(repr(session.generate(" and after", temperature=0, max_tokens=5).read()), flush=True)
"""


def test_interrupt_within_the_core(tmp_path: Path) -> None:
    """SIGINT in the middle of a prompt raises KeyboardInterrupt soon; the session goes on."""
    sizes: dict[str, Any] = {
        "n_layer": 8,
        "n_embd": 256,
        "n_ff": 1024,
        "head_dim": 64,
        "context": 4096,
    }
    path = make(tmp_path / "m.gguf", "llama", **sizes)
    with subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert len(out) > 2


@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
def test_golden_text(name: str) -> None:
    entry, path = downloaded(name)
    golden = entry.golden
    model = stoker.load(path)
    limits = {"temperature": 0.0, "max_tokens": golden["max_tokens"]}
    if "chat" in golden:
        generation = model.chat(golden["chat"], **limits)
    else:
        generation = model.generate(golden["prompt"], **limits)
    assert generation.read() == golden["text"]


def test_catalogue_name_loads_from_the_cache(tmp_path: Path) -> None:
    entry, path = downloaded("smollm2")
    environment = os.environ | {"STOKER_MODELS": str(path.parent)}
    code = "import stoker; print(stoker.load('SmolLM2').path)"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(path)
    empty = os.environ | {"STOKER_MODELS": str(tmp_path)}
    failed = subprocess.run(
        [sys.executable, "-c", code], env=empty, capture_output=True, text=True, check=False
    )
    assert f"run `stoker pull {entry.name}`" in failed.stderr.splitlines()[-1]


def test_chat_on_a_real_model() -> None:
    _, path = downloaded("smollm2")
    model = stoker.load(path)
    session = model.session(system="You are a helpful assistant.")
    first = session.chat("Name a colour.", temperature=0, max_tokens=20)
    first.read()
    second = session.chat("Name another one.", temperature=0, max_tokens=20)
    text = second.read()
    assert second.stats.reused_tokens >= first.stats.prompt_tokens
    # The KV cache changes nothing: the same conversation in a new session has the same answer.
    assert model.session().chat(session.messages[:-1], temperature=0, max_tokens=20).read() == text


def test_embeddings_on_a_real_model() -> None:
    """Texts near in meaning have embeddings near in angle."""
    _, path = downloaded("smollm2")
    model = stoker.load(path)
    texts = ("A cat sleeps on the sofa.", "A kitten naps on the couch.", "Stocks fell on Monday.")
    cat, kitten, stocks = (model.embed(text, normalize=True) for text in texts)
    assert cat @ kitten > cat @ stocks
