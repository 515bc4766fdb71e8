"""Special tokens: types, ends, framing, and spellings and texts that are not UTF-8."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from stoker.runtime.base.errors import TokenizerError
from stoker.runtime.text.normalizers import PrecompiledMap
from stoker.runtime.text.tokenizer import Tokenizer
from tiny_vocabularies import byte_level, sentencepiece, spelled


def bytes_of(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a byte-level vocabulary without merges."""
    ids = [tokenizer.token_to_id(chr(b)) for b in text.encode("ascii")]
    return [i for i in ids if i is not None]


def test_special_tokens() -> None:
    tokenizer = byte_level(
        [], {"<|im_end|>": 3, "<a>": 3, "<a><b>": 3, "    ": 4, "<u>": 4},
        tokenizer__ggml__bos_token_id=10, tokenizer__ggml__add_bos_token=True,
    )  # fmt: skip
    assert spelled(tokenizer, tokenizer.encode("<a><b><a>", add_special=False)) == ["<a><b>", "<a>"]
    assert tokenizer.encode("")[:1] == [10] and len(tokenizer.encode("")) == 1
    # The end is known by its name, and not found in plain text.
    end = tokenizer.token_to_id("<|im_end|>")
    assert tokenizer.eot_id == end and end in tokenizer.eog_ids
    assert tokenizer.encode("<|im_end|>", add_special=False) == [end]
    assert end not in tokenizer.encode("<|im_end|>", parse_special=False)
    # User-defined tokens are text, and always found.
    plain = tokenizer.encode("x    <u>", add_special=False, parse_special=False)
    assert spelled(tokenizer, plain) == ["x", "    ", "<u>"]
    assert tokenizer.decode([*plain, end or 0], skip_special=True) == "x    <u>"
    assert tokenizer.decode([*plain, end or 0]) == "x    <u><|im_end|>"
    stream = tokenizer.stream(skip_special=True)
    assert [stream.push(i) for i in (end or 0, plain[0])] == ["", "x"]


def test_special_tokens_that_overlap() -> None:
    """The leftmost token wins, then the longest that begins there, as in Hugging Face's library."""
    from tokenizers import AddedToken, models
    from tokenizers import Tokenizer as Library

    names = ("<a", "<a>", "a><b>", "<b>", "<b><", "<<")
    tokenizer = byte_level([], dict.fromkeys(names, 4))
    vocab = {tokenizer.id_to_token(i): i for i in range(256)}
    library = Library(models.BPE(vocab=vocab, merges=[]))
    library.add_tokens([AddedToken(name, normalized=False) for name in names])
    for text in ("<a><b><a", "<a<b><b>", "<<a><b><<", "x<a>", "<b><b><a><b>x", "a><b", "<<<a"):
        assert spelled(tokenizer, tokenizer.encode(text)) == library.encode(text).tokens, text


def test_bytes_without_a_token_vanish_before_merging() -> None:
    from tokenizers import Tokenizer as Library
    from tokenizers import models, pre_tokenizers

    vocab = {"a": 0, "b": 1, "ab": 2}
    values = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": list(vocab),
        "tokenizer.ggml.merges": ["a b"],
    }
    library = Library(models.BPE(vocab=vocab, merges=[("a", "b")]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    for text in ("axb", "xx", "abxab", "a xb"):
        assert Tokenizer.from_metadata(values.get).encode(text) == library.encode(text).ids, text


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece"])
def test_a_text_that_is_framed_already(kind: str) -> None:
    """BOS and EOS that a text already spells are not added again."""
    flags = {"tokenizer__ggml__add_bos_token": True, "tokenizer__ggml__add_eos_token": True}
    if kind == "sentencepiece":
        tokenizer = sentencepiece({"▁": -3, "x": -4}, **flags)
        bos, eos, prefix = 1, 2, tokenizer.encode("x", add_special=False)
    else:
        tokenizer = byte_level(
            [], {"<s>": 3, "</s>": 3}, **flags,
            tokenizer__ggml__bos_token_id=256, tokenizer__ggml__eos_token_id=257,
        )  # fmt: skip
        bos, eos, prefix = 256, 257, tokenizer.encode("x", add_special=False)
    framed = [bos, *prefix, eos]
    for text in ("x", "<s>x", "x</s>", "<s>x</s>"):
        assert tokenizer.encode(text) == framed, text
    assert tokenizer.encode("<s><s>x") == [bos, *framed]  # two written ones are both kept
    assert tokenizer.encode("<s>") == tokenizer.encode("") == [bos, eos]
    assert tokenizer.encode("</s>") == [bos, eos]
    plain = tokenizer.encode("<s>x", parse_special=False)
    assert plain[0] == bos and plain[-1] == eos and plain.count(bos) == 1 and len(plain) > 4
    assert tokenizer.encode("<s>x", add_special=False) == framed[:-1]


def test_one_token_that_begins_and_ends() -> None:
    tokenizer = byte_level(
        [], {"<|endoftext|>": 3},
        tokenizer__ggml__bos_token_id=256, tokenizer__ggml__eos_token_id=256,
        tokenizer__ggml__add_bos_token=True, tokenizer__ggml__add_eos_token=True,
    )  # fmt: skip
    assert tokenizer.encode("") == tokenizer.encode("<|endoftext|>") == [256, 256]


@pytest.mark.parametrize("kind", ["gpt2", "llama", "rwkv", "t5", "bert", "gemma4"])
def test_spellings_that_are_not_utf8(kind: str) -> None:
    """Such a token gives its bytes unchanged; the others work as before."""
    odd = [b"\xff\xfe", b"<\xff>", b"ab\x80", b"\xc3"]
    names = ["<unk>", "<s>", "</s>", "[CLS]", "[SEP]", "a", "b", "▁", "▁a", "<0x61>"]
    tokens = names + [spelling.decode(errors="surrogateescape") for spelling in odd]
    n = len(names)
    values = {
        "tokenizer.ggml.model": kind,
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [2, 3, 3, 3, 3, *[1] * (n - 6), 6, 1, 3, 4, 1],
        "tokenizer.ggml.scores": [-float(i) for i in range(len(tokens))],
        "tokenizer.ggml.merges": ["\udcff \udcfe", "a b"],
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.cls_token_id": 3,
        "tokenizer.ggml.seperator_token_id": 4,
        "tokenizer.ggml.bos_token_id": 1,
        "general.name": "na\udcffme",
    }
    tokenizer = Tokenizer.from_metadata(values.get)
    for i, spelling in enumerate(odd, n):
        assert tokenizer.token_bytes(i) == spelling
        assert tokenizer.decode_bytes([i]) == spelling
        assert tokenizer.decode([i]) == spelling.decode(errors="replace")
        assert spelled(tokenizer, [i]) == [tokens[i]]
        stream = tokenizer.stream()
        assert stream.push(i) + stream.flush() == spelling.decode(errors="replace")
        assert tokenizer.token_to_id(tokens[i]) == i
    # Halves of characters join: C3 of one token and A9 of the next.
    stream = tokenizer.stream()
    assert stream.push(n + 3) == ""
    for text in ("a b ab\ufffd\udcff", "\udc80", "é<\ufffd>"):
        assert set(tokenizer.encode(text)) <= set(range(len(tokens)))
    # A chat template that writes such a control token spells it in the same way.
    assert n + 1 in tokenizer.encode("a<\udcff>a", add_special=False)
    assert n + 1 not in tokenizer.encode("a<\udcff>a", add_special=False, parse_special=False)


def test_half_a_surrogate_pair_in_a_spelling() -> None:
    with pytest.raises(TokenizerError, match=r"tokenizer.ggml.tokens: expected text .*U\+D83D"):
        byte_level([], {"\ud83d": 1})


def test_a_charsmap_of_a_sentencepiece_bpe_file() -> None:
    """If the file has a map, it is applied before merging, as SentencePiece does."""
    pieces = {"▁": -3.0, "f": -4.0, "i": -5.0, "▁f": -1.0, "fi": -2.0}
    plain = sentencepiece(pieces)
    mapped = sentencepiece(pieces, tokenizer__ggml__precompiled_charsmap=list(charsmap("ﬁ", "fi")))
    assert spelled(plain, plain.encode("ﬁ", add_special=False))[1:] == [
        f"<0x{b:02X}>" for b in "ﬁ".encode()
    ]
    assert mapped.encode("ﬁ f") == plain.encode("fi f")
    squeezed = sentencepiece(pieces, tokenizer__ggml__remove_extra_whitespaces=True)
    assert squeezed.encode("  f   fi ") == plain.encode("f fi")
    assert squeezed.encode("   ", add_special=False) == []
    with pytest.raises(TokenizerError, match="precompiled_charsmap: expected"):
        sentencepiece(pieces, tokenizer__ggml__precompiled_charsmap=[1, 2, 3])


def test_a_charsmap_leaves_user_defined_tokens_alone() -> None:
    """The longest token at a place wins, wherever it stands; an empty spelling is no token."""
    kept = PrecompiledMap(charsmap("ﬁ", "fi"), ["xﬁ", "ﬁﬁ!", "", "ﬁﬁ"])
    for text, mapped in (
        ("ﬁxﬁﬁ", "fixﬁfi"),
        ("ﬁﬁ!ﬁ", "ﬁﬁ!fi"),
        ("ﬁﬁﬁ", "ﬁﬁfi"),
        ("a.*ﬁ", "a.*fi"),
        ("", ""),
    ):
        assert kept.mapped(text) == mapped
    assert PrecompiledMap(charsmap("ﬁ", "fi")).mapped("ﬁxﬁﬁ") == "fixfifi"


def charsmap(source: str, target: str) -> bytes:
    """Makes a precompiled character map of one rule, in the layout of SentencePiece's builder.

    The double array gives every byte of `source` a block of 256 units of its own.
    """
    key = source.encode()
    units = [0] * (256 * (len(key) + 2))
    base = 0  # first index of the block that a node's children are in
    units[0] = 256 << 10  # the root: its children begin at 0 ^ 256
    node = 0
    for depth, byte in enumerate(key):
        base = 256 * (depth + 1)
        node = base ^ byte
        last = depth == len(key) - 1
        offset = node ^ (256 * (depth + 2))
        units[node] = byte | offset << 10 | (0x100 if last else 0)
    value = node ^ (units[node] >> 10)
    units[value] = 0x8000_0000  # a leaf: the position of the replacement
    trie = struct.pack(f"<{len(units)}I", *units)
    return struct.pack("<I", len(trie)) + trie + target.encode() + b"\0"


@pytest.mark.parametrize(
    ("kind", "facts", "ends"),
    [
        (1, {}, False),  # NORMAL: text, whatever it looks like
        (3, {}, True),
        (4, {}, False),
        (4, {"tokenizer.chat_template": "{{ x }}</s>"}, True),
        (4, {"tokenizer.chat_template": "{{ x }}"}, False),
        (4, {"tokenizer.chat_templates": ["rag"], "tokenizer.chat_template.rag": "</s>"}, True),
        (1, {"tokenizer.chat_template": "{{ x }}</s>"}, False),
        (1, {"tokenizer.ggml.eos_token_id": 256}, True),
        (1, {"tokenizer.ggml.eot_token_id": 256}, True),
        (1, {"tokenizer.ggml.token_type": None}, True),  # a file without types has only names
    ],
)
def test_what_makes_a_known_name_an_end(kind: int, facts: dict[str, Any], ends: bool) -> None:
    tokenizer = byte_level([], {"</s>": kind}, **facts)
    assert tokenizer.eog_ids == ({256} if ends else set())
    assert tokenizer.is_special(256) == ends
    found = [256] if ends or kind == 4 else bytes_of(tokenizer, "</s>")
    assert tokenizer.encode("</s>") == found


def test_fill_in_the_middle_tokens_that_the_file_types_or_names() -> None:
    names = ("<fim_prefix>", "<fim_pad>", "<reponame>")
    for kind, known in ((3, True), (4, False), (1, False)):
        tokenizer = byte_level([], dict.fromkeys(names, kind))
        assert tokenizer.eog_ids == ({257, 258} if known else set())
    tokenizer = byte_level([], dict.fromkeys(names, 1), tokenizer__ggml__fim_rep_token_id=258)
    assert tokenizer.eog_ids == {258} and tokenizer.is_special(258)
    # An end that the file gives by its id only, under an unknown name, stays text.
    tokenizer = byte_level([], {"stop": 1}, tokenizer__ggml__eos_token_id=256)
    assert tokenizer.eog_ids == {256} and not tokenizer.is_special(256)
    assert len(tokenizer.encode("stop")) == 4


def test_an_end_of_message_is_not_the_end() -> None:
    """In gpt-oss <|end|> ends one of several messages, <|return|> and <|call|> end the answer."""
    names = ("<|end|>", "<|return|>", "<|call|>")
    tokenizer = byte_level([], dict.fromkeys(names, 3))
    end, back, call = map(tokenizer.token_to_id, names)
    assert tokenizer.eog_ids == {back, call} and tokenizer.eot_id is None
    assert byte_level([], {"<|end|>": 3}).eog_ids == {end}


def test_phi_3_special_tokens_swallow_spaces() -> None:
    pieces: dict[str, float] = {"▁": -3, "x": -4, "▁x": -1}
    tokenizer = sentencepiece(pieces, {"<|end|>": 3}, general__architecture="phi3")
    assert spelled(tokenizer, tokenizer.encode("<|end|> \n x")) == ["<s>", "<|end|>", "▁x"]


def test_a_title_changes_no_ids() -> None:
    """The model's title does not matter: general.name is free text."""
    pieces: dict[str, float] = {"▁": -3, "x": -4, "▁x": -1}
    plain = sentencepiece(pieces, {"<|end|>": 3, "[MASK]": 3}, general__architecture="llama")
    for title in ("Phi3", "my phi-3 distilled", "modern-bert"):
        named = sentencepiece(
            pieces,
            {"<|end|>": 3, "[MASK]": 3},
            general__architecture="llama",
            general__name=title,
        )
        for text in ("<|end|> x", "x [MASK]"):
            assert named.encode(text) == plain.encode(text)
