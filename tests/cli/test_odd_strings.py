"""Files whose strings are not UTF-8 load, generate and are shown; their bytes are kept."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import stoker
import tiny_models
from stoker.runtime._core import GgufFile
from stoker.runtime.base.errors import (
    ChatTemplateError,
    ModelFileError,
    TokenizerError,
    UnsupportedModelError,
)
from stoker.runtime.cli.main import main


def replaced(path: Path, old: bytes, new: bytes) -> Path:
    """The file with one string's bytes put in place of another's of the same length."""
    data = path.read_bytes()
    whole = struct.pack("<Q", len(old)) + old
    assert len(new) == len(old) and data.count(whole) == 1
    path.write_bytes(data.replace(whole, struct.pack("<Q", len(new)) + new))
    return path


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return tiny_models.make(tmp_path / "tiny.gguf", "llama")


def template(old: bytes, new: bytes) -> tuple[bytes, bytes]:
    source = tiny_models.CHAT_TEMPLATE.encode()
    return source, source.replace(old, new)


def test_token_spellings(tiny: Path) -> None:
    tokens, _ = tiny_models.vocabulary()
    word = next(t for t in reversed(tokens) if len(t) == 3 and t.isascii())
    token = tokens.index(word)
    replaced(tiny, word.encode(), b"\xc3\xff\xa9")
    replaced(tiny, b"<|im_end|>", b"<|im\xfeend|>")
    model = stoker.load(tiny)
    assert model.tokenizer.token_bytes(token) == b"\xc3\xff\xa9"
    assert model.tokenizer.decode([token, token]) == "\ufffd\ufffd\ufffd" * 2
    assert model.tokenizer.token_bytes(2) == b"<|im\xfeend|>"
    assert model.tokenizer.decode_bytes(range(model.n_vocab))
    assert model.tokenizer.encode("<|im\udcfeend|>") == [2]
    assert model.generate(word, max_tokens=8).read() is not None
    assert model.chat(word, max_tokens=8).read() is not None


def test_a_chat_template(tiny: Path) -> None:
    replaced(tiny, *template(b"assistant", b"assist\xff\xfet"))
    model = stoker.load(tiny)
    assert model.chat("hello", max_tokens=4).read() is not None
    replaced(tiny, template(b"assistant", b"assist\xff\xfet")[1], template(b"{{ '", b"{{\xff'")[1])
    with pytest.raises(ChatTemplateError, match="line 1"):
        stoker.load(tiny).chat("hello", max_tokens=4)


def test_names_that_decide(tiny: Path) -> None:
    pre = GgufFile(str(tiny)).get("tokenizer.ggml.pre").encode()
    replaced(tiny, pre, b"\xff" * len(pre))
    with pytest.raises(TokenizerError, match=r"tokenizer.ggml.pre: unknown pre-tokenizer"):
        stoker.load(tiny).generate("hello", max_tokens=1)


@pytest.mark.parametrize("form", ["--json", "--tsv", "--full"])
def test_inspect(tiny: Path, form: str, capsys: pytest.CaptureFixture[str]) -> None:
    replaced(tiny, b"output_norm.weight", b"output_norm.\xff\xfeight")
    replaced(tiny, *template(b"assistant", b"assist\xff\xfet"))
    replaced(tiny, b"tokenizer.ggml.pre", b"tokenizer.ggml.\xffre")
    assert main(["inspect", str(tiny), form]) == 0
    shown = capsys.readouterr().out
    if form == "--json":
        document = json.loads(shown)
        assert "tokenizer.ggml.\ufffdre" in document["metadata"]
        assert "assist\ufffd\ufffdt" in document["metadata"]["tokenizer.chat_template"]
        assert "output_norm.\ufffd\ufffdight" in [t["name"] for t in document["tensors"]]
    elif form == "--tsv":
        assert "output_norm.\ufffd\ufffdight\tF32" in shown
    else:
        assert "assist\ufffd\ufffdt" in shown and "tokenizer.ggml.\ufffdre" in shown


def test_the_name_of_a_model(tiny: Path) -> None:
    replaced(tiny, b"tiny llama", b"tiny \xff\xfema\xc3")
    model = stoker.load(tiny)
    assert model.name == model.config["name"] == "tiny \udcff\udcfema\udcc3"
    assert model.generate("a", max_tokens=2).read() is not None


def test_an_architecture(tiny: Path) -> None:
    replaced(tiny, b"llama", b"l\xffama")
    with pytest.raises(UnsupportedModelError, match=r"general\.architecture: .* found l\\xffama"):
        stoker.load(tiny)


def test_a_tensor_and_a_path(tiny: Path, tmp_path: Path) -> None:
    replaced(tiny, b"blk.0.attn_norm.weight", b"blk.0.attn_norm.weigh\xff")
    odd = tmp_path / "mod\udcffel.gguf"
    tiny.rename(odd)
    with pytest.raises(ModelFileError, match=r"mod\\xffel\.gguf: .*blk\.0\.attn_norm\.weight"):
        stoker.load(odd)
