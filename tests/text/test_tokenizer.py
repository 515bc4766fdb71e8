"""Tokenizers: llama.cpp's vocabulary files and vectors, and small vocabularies made here."""

from __future__ import annotations

import json
import struct
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from make_text_golden import TEXTS
from stoker.runtime._core import GgufFile
from stoker.runtime.base.errors import TokenizerError
from stoker.runtime.text.normalizers import PrecompiledMap
from stoker.runtime.text.pretokenizers import PRE_TOKENIZERS, byte_level_words, pre_tokenizer
from stoker.runtime.text.subword import EscapedBpe, Merges, byte_fallback
from stoker.runtime.text.tokenizer import Tokenizer
from tiny_vocabularies import byte_level, sentencepiece, spelled

GOLDEN: dict[str, dict[str, Any]] = json.loads(
    (Path(__file__).parents[1] / "data" / "golden_tokens.json").read_text()
)
VECTORS = (
    "bert-bge", "command-r", "deepseek-coder", "deepseek-llm", "falcon", "gemma-4", "gpt-2",
    "llama-bpe", "llama-spm", "mpt", "phi-3", "qwen2", "qwen35", "refact", "starcoder",
)  # fmt: skip

NFC = ("command-r", "mpt", "qwen2", "qwen35")  # their published tokenizer.json has this normalizer
# llama.cpp makes these control and end tokens by their spelling, although the file says
# otherwise: Qwen's "</s>" is NORMAL, Phi-3's is USER_DEFINED and its chat template never writes it.
TEXT_HERE = {
    "ggml-vocab-qwen2.gguf": 128247,
    "ggml-vocab-qwen35.gguf": 128247,
    "ggml-vocab-phi-3.gguf": 2,
}
QWEN_HTML = [522, 82, 29]  # "</s>" in the tokenizer.json of Qwen 2, where it is not an added token

_built: dict[str, Tokenizer] = {}


def published(vocab_dir: Path, name: str) -> Tokenizer:
    if name not in _built:
        _built[name] = Tokenizer.from_metadata(GgufFile(str(vocab_dir / name)).get)
    return _built[name]


def streamed(tokenizer: Tokenizer, ids: list[int]) -> str:
    stream = tokenizer.stream(at_start=True)
    return "".join(map(stream.push, ids)) + stream.flush()


# The published files.


@pytest.mark.parametrize("name", VECTORS)
def test_published_vectors(vocab_dir: Path, name: str) -> None:
    file = f"ggml-vocab-{name}.gguf"
    tokenizer = published(vocab_dir, file)
    texts = (vocab_dir / f"{file}.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    lines = (vocab_dir / f"{file}.out").read_text().splitlines()
    if texts[-1] == "":
        texts.pop()  # the file ends with a separator
    assert len(texts) == len(lines) >= 46
    decomposed = 0
    for text, line in zip(texts, lines, strict=True):
        expected = [int(i) for i in line.split()]
        normalized = unicodedata.normalize("NFC", text) if name in NFC else text
        if normalized != text:
            # llama.cpp has no normalizer: its vector is of the text as written.
            decomposed += 1
            assert tokenizer._subword.encode(text) == expected, text
            expected = tokenizer._subword.encode(normalized)
        ids = tokenizer.encode(text, add_special=False, parse_special=False)
        assert ids == expected, text
        if tokenizer.kind != "bert":  # bert does not keep spaces and case
            assert tokenizer.decode(ids) == normalized
            assert streamed(tokenizer, ids) == normalized
    assert decomposed == (3 if name == "qwen35" else 0)


def corrected(file: str, ids: list[int], bos: int) -> list[int]:
    """llama.cpp's ids of a text, corrected for special tokens that the file types otherwise."""
    if "qwen" in file and TEXT_HERE[file] in ids:
        at = ids.index(TEXT_HERE[file])
        ids = ids[:at] + QWEN_HTML + ids[at + 1 :]
    # A BOS that the text itself begins with suffices.
    return ids[1:] if ids[:2] == [bos, bos] else ids


@pytest.mark.parametrize("file", sorted(GOLDEN))
def test_same_as_llama_cpp(vocab_dir: Path, file: str) -> None:
    tokenizer = published(vocab_dir, file)
    golden = GOLDEN[file]
    assert sorted(tokenizer.eog_ids) == [i for i in golden["eog"] if i != TEXT_HERE.get(file)]
    assert (-1 if tokenizer.bos_id is None else tokenizer.bos_id) == golden["bos"]
    assert (-1 if tokenizer.eos_id is None else tokenizer.eos_id) == golden["eos"]
    assert tokenizer.add_bos == golden["add_bos"]
    for text, plain, special in zip(TEXTS, golden["plain"], golden["special"], strict=True):
        if tokenizer.kind == "bert" and any(
            unicodedata.category(c) == "Mc" or "HANGUL" in unicodedata.name(c, "") for c in text
        ):
            continue  # llama.cpp drops spacing marks and half of each syllable; BERT does not
        found = tokenizer.encode(text, add_special=False, parse_special=False)
        if "</s>" in text and "phi-3" in file:  # USER_DEFINED: found in plain text, too
            assert TEXT_HERE[file] in found
        else:
            assert found == plain, text
        assert tokenizer.encode(text) == corrected(file, special, golden["bos"]), text


# Small vocabularies.


def naive(word: str, cost: Callable[[str], float | None]) -> list[str]:
    """Merges by definition: repeatedly the cheapest pair, the leftmost among equals."""
    pieces = list(word)
    while True:
        pairs = [
            (c, i)
            for i in range(len(pieces) - 1)
            if (c := cost(f"{pieces[i]} {pieces[i + 1]}")) is not None
        ]
        if not pairs:
            return pieces
        _, i = min(pairs)
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]


letters = st.text(alphabet="ab▁", min_size=1, max_size=4)


@given(
    pairs=st.lists(st.tuples(letters, letters), max_size=25),
    costs=st.lists(st.integers(0, 5), min_size=25, max_size=25),
    word=st.text(alphabet="ab▁c", max_size=20),
)
@example(pairs=[("a", "▁"), ("a▁", "b"), ("▁", "b")], costs=[0, 1, 2] + [0] * 22, word="ba▁b▁b")
def test_merging_is_as_defined(pairs: list[tuple[str, str]], costs: list[int], word: str) -> None:
    table: dict[str, float] = {f"{a} {b}": c for (a, b), c in zip(pairs, costs, strict=False)}
    tokens = sorted({a + b for a, b in pairs} | set("ab▁c"))
    ids = {token: i for i, token in enumerate(tokens)}
    merges = Merges(ids, table.get, " ", byte_fallback(ids, None))
    assert merges.word(word) == tuple(ids[piece] for piece in naive(word, table.get))
    # Cutting before "▁" changes nothing.
    bpe = EscapedBpe(
        ids, Merges(ids, table.get, " ", byte_fallback(ids, None)), "\0".join(ids), newlines=False
    )
    assert bpe.encode(word) == list(merges.word(word))


def test_byte_level_merges_in_rank_order() -> None:
    tokenizer = byte_level(["l l", "e ll", "H ell", "Ġ w"])
    assert spelled(tokenizer, tokenizer.encode("Hello wo")) == ["Hell", "o", "Ġw", "o"]
    # "e l" would come first in the text, but "l l" comes first in rank.
    assert spelled(byte_level(["l l", "e l"]), byte_level(["l l", "e l"]).encode("ell")) == [
        "e",
        "ll",
    ]


@pytest.mark.parametrize("pre", ["gpt-2", "llama3"])
def test_a_word_that_is_a_token(pre: str) -> None:
    """Llama 3 takes a word that is a token whole; GPT-2 must be able to merge it."""
    tokenizer = byte_level([], {"abc": 1}, tokenizer__ggml__pre=pre)
    expected = ["abc"] if pre == "llama3" else ["a", "b", "c"]
    assert spelled(tokenizer, tokenizer.encode("abc")) == expected


@given(st.text(max_size=60))
def test_byte_level_keeps_every_text(text: str) -> None:
    tokenizer = _built.setdefault("tiny", byte_level(["Ġ t", "h e", "Ġt he"]))
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert streamed(tokenizer, ids) == text


@given(st.text(alphabet=st.characters(codec="utf-8", exclude_characters="▁"), max_size=60))
def test_sentencepiece_keeps_every_text(text: str) -> None:
    tokenizer = _built.setdefault("tiny spm", sentencepiece({"▁": -3, "a": -4, "▁a": -1}))
    ids = tokenizer.encode(text, parse_special=False)
    assert tokenizer.decode(ids, skip_special=True) == text
    assert streamed(tokenizer, ids[1:]) == text


def test_lone_surrogates_become_replacement_characters() -> None:
    tokenizer = byte_level([])
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"


def test_sentencepiece_scores_ties_and_bytes() -> None:
    tokenizer = sentencepiece({"▁": -9, "a": -9, "aa": -1, "aaa": -1, "b": -9, "ab": -0.5})

    def plain(text: str) -> list[str]:
        return spelled(tokenizer, tokenizer.encode(text, add_special=False))

    assert plain("aaab") == ["▁", "aa", "ab"]  # the higher score first
    assert plain("aaa") == ["▁", "aaa"]  # then the leftmost of equals
    assert plain("é") == ["▁", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(tokenizer.encode("é a")) == "<s>é a"


def test_space_prefix() -> None:
    pieces = {"▁": -3.0, "x": -4.0, "▁x": -1.0}
    with_prefix = sentencepiece(pieces, {"<|sep|>": 3})
    assert spelled(with_prefix, with_prefix.encode("x<|sep|>x x")) == [
        "<s>", "▁x", "<|sep|>", "▁x", "▁x",
    ]  # fmt: skip
    without = sentencepiece(pieces, tokenizer__ggml__add_space_prefix=False)
    assert spelled(without, without.encode("x x")) == ["<s>", "x", "▁x"]
    assert without.decode(without.encode(" x", add_special=False)) == " x"
    # A continuation keeps its space, a beginning does not.
    x = with_prefix.token_to_id("▁x")
    assert x is not None
    assert with_prefix.stream().push(x) == " x"
    assert with_prefix.stream(at_start=True).push(x) == "x"
    assert with_prefix.decode([x, x]) == "x x"


def test_gemma_4_always_wants_bos() -> None:
    tokens = ["<bos>", "▁", "a", "▁a", "\n", "\n\n", "<0xC3>", "<0xA9>"]
    values = {
        "tokenizer.ggml.model": "gemma4",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 1, 1, 1, 1, 1, 6, 6],
        "tokenizer.ggml.merges": ["▁ a"],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
    }
    tokenizer = Tokenizer.from_metadata(values.get)
    ids = tokenizer.encode("a a\n\naé")
    # A run of newlines is looked up whole although no merge makes it.
    assert spelled(tokenizer, ids) == ["<bos>", "a", "▁a", "\n\n", "a", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(ids, skip_special=True) == "a a\n\naé"


def test_stream_never_breaks_a_character() -> None:
    tokenizer = byte_level([])
    ids = tokenizer.encode("é🙂")
    stream = tokenizer.stream()
    assert [stream.push(i) for i in ids] == ["", "é", "", "", "", "🙂"]
    assert stream.flush() == ""
    assert stream.push(ids[0]) == "" and stream.flush() == "\ufffd"
    assert b"".join(map(tokenizer.token_bytes, ids)) == "é🙂".encode()
    assert tokenizer.decode_bytes(ids[:3]) == "é".encode() + b"\xf0"


def test_unigram_takes_the_best_total() -> None:
    pieces = {"▁": -3.0, "a": -3.0, "b": -3.0, "▁a": -4.0, "ab": -1.0, "▁ab": -9.0}
    values = {
        "tokenizer.ggml.model": "t5",
        "tokenizer.ggml.tokens": ["<pad>", "</s>", "<unk>", *pieces],
        "tokenizer.ggml.token_type": [3, 3, 2, *[1] * len(pieces)],
        "tokenizer.ggml.scores": [0.0, 0.0, 0.0, *pieces.values()],
        "tokenizer.ggml.add_space_prefix": True,
        "tokenizer.ggml.remove_extra_whitespaces": True,
    }
    tokenizer = Tokenizer.from_metadata(values.get)
    assert spelled(tokenizer, tokenizer.encode("  ab ??  a ")) == [
        "▁", "ab", "▁", "<unk>", "▁a", "</s>",
    ]  # fmt: skip
    assert tokenizer.encode("", add_special=False) == []
    # Among equal paths the one that was found first stays: fewer, longer tokens.
    values["tokenizer.ggml.scores"] = [0.0, 0.0, 0.0, -3.0, -0.5, -0.5, -4.0, -1.0, -9.0]
    tokenizer = Tokenizer.from_metadata(values.get)
    assert spelled(tokenizer, tokenizer.encode("ab", add_special=False)) == ["▁", "ab"]


def test_wordpiece() -> None:
    values = {
        "tokenizer.ggml.model": "bert",
        "tokenizer.ggml.tokens": ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "▁uber", "▁cat", "s", "▁!"],
        "tokenizer.ggml.token_type": [3, 3, 3, 3, 1, 1, 1, 1],
        "tokenizer.ggml.unknown_token_id": 1,
        "tokenizer.ggml.cls_token_id": 2,
        "tokenizer.ggml.seperator_token_id": 3,
    }
    tokenizer = Tokenizer.from_metadata(values.get)
    assert spelled(tokenizer, tokenizer.encode("Über\tCATS! dog")) == [
        "[CLS]", "▁uber", "▁cat", "s", "▁!", "[UNK]", "[SEP]",
    ]  # fmt: skip


def test_rwkv_takes_the_longest_bytes() -> None:
    tokens = ["<s>", "a", "ab", "abcd", r"\n", r"\xc3", r"\xa9", r"\\"]
    values = {"tokenizer.ggml.model": "rwkv", "tokenizer.ggml.tokens": tokens}
    tokenizer = Tokenizer.from_metadata(values.get)
    ids = tokenizer.encode("abcabcd\né\\")
    assert spelled(tokenizer, ids) == ["ab", "abcd", r"\n", r"\xc3", r"\xa9", r"\\"]
    assert tokenizer.decode(ids) == "ababcd\né\\"


def test_kimi_without_merges_merges_by_id() -> None:
    tokenizer = byte_level(["b c", "a bc", "a b"])
    table = [tokenizer.id_to_token(i) for i in range(tokenizer.vocab_size)]
    values = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "kimi-k2",
        "tokenizer.ggml.tokens": table,
    }
    kimi = Tokenizer.from_metadata(values.get)
    assert spelled(kimi, kimi.encode("abcab")) == ["abc", "ab"]


# Pre-tokenizers.


@pytest.mark.parametrize("name", sorted(PRE_TOKENIZERS))
@settings(max_examples=15)
@given(text=st.text(max_size=40))
def test_pre_tokenizers_lose_nothing(name: str, text: str) -> None:
    kind = pre_tokenizer(name)
    if kind.escaped:
        assert kind.patterns == ()
        return
    tokenizer = _built.setdefault("bytes", byte_level([]))
    words = byte_level_words(kind)(text)
    ids = [tokenizer.token_to_id(c) for word in words for c in word]
    assert None not in ids
    assert tokenizer.decode([i for i in ids if i is not None]) == text


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gpt-2", ["it", "'s", "Ġ1234567", "ĠCamelCase", "Ġ", "Ġx", "!!", "Ċ"]),
        ("llama-bpe", ["it", "'s", "Ġ", "123", "456", "7", "ĠCamelCase", "Ġ", "Ġx", "!!Ċ"]),
        ("qwen2", ["it", "'s", "Ġ", *"1234567", "ĠCamelCase", "Ġ", "Ġx", "!!Ċ"]),
        ("gpt-4o", ["it's", "Ġ", "123", "456", "7", "ĠCamel", "Case", "Ġ", "Ġx", "!!Ċ"]),
        ("tekken", ["it", "'s", "Ġ", *"1234567", "ĠCamel", "Case", "Ġ", "Ġx", "!!Ċ"]),
        ("afmoe", ["it", "'s", "Ġ", "1", "234", "567", "ĠCamelCase", "Ġ", "Ġx", "!!Ċ"]),
        ("superbpe", ["it'sĠ", "1", "234", "567", "ĠCamelCaseĠĠx!!Ċ"]),
    ],
)
def test_words(name: str, words: list[str]) -> None:
    assert byte_level_words(pre_tokenizer(name))("it's 1234567 CamelCase  x!!\n") == words


# Bad metadata.


def metadata(**changes: Any) -> Callable[[str], Any]:
    values: dict[str, Any] = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", "a"],
        "tokenizer.ggml.scores": [0.0, 0.0, 0.0, -1.0],
        "tokenizer.ggml.token_type": [2, 3, 3, 1],
    }
    values |= {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    return values.get


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": None}, "tokenizer.ggml.model: expected one of .*gpt2.*, found none"),
        ({"model": "klingon"}, "found 'klingon'"),
        ({"model": 7}, "tokenizer.ggml.model: expected a string, found 7"),
        ({"tokens": None}, "tokenizer.ggml.tokens: expected a list of tokens, found none"),
        ({"tokens": []}, "expected a list of tokens"),
        ({"tokens": ["a", 1, 2, 3]}, "expected strings, found other values"),
        ({"scores": None}, "tokenizer.ggml.scores: expected 4 values, found none"),
        ({"scores": [0.0]}, "expected 4 values, found 1"),
        ({"scores": ["x"] * 4}, "tokenizer.ggml.scores: expected numbers"),
        ({"token_type": [1]}, "tokenizer.ggml.token_type: expected 4 values, found 1"),
        ({"token_type": [1, 2, 3, 999]}, "expected small integers"),
        ({"bos_token_id": "x"}, "tokenizer.ggml.bos_token_id: expected a token id, found 'x'"),
        ({"model": "gpt2", "pre": "default"}, "tokenizer.ggml.merges: expected a list"),
        ({"model": "gpt2", "pre": "nope"}, "unknown pre-tokenizer 'nope'; known: .*llama-bpe"),
        ({"model": "gpt2", "merges": [[1], "a b"]}, "tokenizer.ggml.merges: expected strings"),
        ({"model": "t5", "precompiled_charsmap": [1, 2, 3]}, "precompiled_charsmap: expected"),
        ({"model": "rwkv", "tokens": [r"\xzz"], "token_type": None}, "bad escape"),
    ],
)
def test_bad_metadata(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TokenizerError, match=message) as caught:
        Tokenizer.from_metadata(metadata(**changes))
    assert "\n" not in str(caught.value)


def test_ids_out_of_range() -> None:
    tokenizer = Tokenizer.from_metadata(metadata(bos_token_id=-1, padding_token_id=99))
    assert tokenizer.bos_id is None and tokenizer.pad_id is None
    assert tokenizer.encode("a") == tokenizer.encode("a", add_special=False)
    for token in (-1, 4):
        with pytest.raises(TokenizerError, match="outside the vocabulary of 4 tokens"):
            tokenizer.token_bytes(token)


def test_empty_spellings_get_a_name() -> None:
    tokenizer = Tokenizer.from_metadata(metadata(tokens=["<unk>", "<s>", "</s>", ""]))
    assert tokenizer.id_to_token(3) == "[EMPTY_3]"


@given(st.binary(max_size=200), st.binary(max_size=12))
def test_damaged_charsmaps_do_no_harm(blob: bytes, text: bytes) -> None:
    for data in (blob, struct.pack("<I", len(blob) // 4 * 4) + blob):
        try:
            charsmap = PrecompiledMap(data)
        except ValueError:
            continue
        found = charsmap.replace(text, 0)
        assert found is None or 1 <= found[1] <= len(text)
