"""Tokenizers of Hugging Face folders give the ids of Hugging Face's own library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from stoker.export import hf_to_gguf
from stoker.export.hf.tokenizer_probes import PROBES
from stoker.runtime import _core
from stoker.runtime.base.errors import ModelFileError, OptionError, UnsupportedModelError
from stoker.runtime.text.chat import ChatTemplate
from stoker.runtime.text.tokenizer import Tokenizer

pytest.importorskip("safetensors", reason="needs safetensors (pip install safetensors)")

import hf_models


def tokenizer_of(path: Path) -> Tokenizer:
    return Tokenizer.from_metadata(_core.GgufFile(str(path)).get)


TRICKY = (*PROBES, "", " ", "\n", "a", "don't stop 12345 \t\r\n déjà vu 你好 🙂 the of and")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model that needs no PyTorch, with the byte-level tokenizer."""
    hf_models.smallthinker(tmp_path / "folder", window=0, softmax=False)
    return tmp_path / "folder"


def same_ids(ours: Tokenizer, folder: Path) -> None:
    from tokenizers import Tokenizer as Library

    library = Library.from_file(str(folder / "tokenizer.json"))
    for text in TRICKY:
        expected = library.encode(text, add_special_tokens=False).ids
        assert ours.encode(text, add_special=False) == expected, text


def test_byte_level_tokenizer(folder: Path, tmp_path: Path) -> None:
    path = hf_to_gguf.convert(folder, tmp_path / "m.gguf").path
    ours = tokenizer_of(path)
    assert (ours.kind, ours.pre) == ("gpt2", "qwen2")
    same_ids(ours, folder)
    assert ours.encode("<|im_start|>the<|im_end|>\n") == [1, *ours.encode("the"), 2, 3 + 10]
    assert (ours.bos_id, ours.eos_id, ours.add_bos) == (0, 2, False)
    assert ours.vocab_size == hf_models.N_VOCAB
    assert ours.id_to_token(hf_models.N_VOCAB - 1) == f"[PAD{hf_models.N_VOCAB - 1}]"
    file = _core.GgufFile(str(path))
    assert file.get("tokenizer.chat_template") == hf_models.tiny_models.CHAT_TEMPLATE
    assert file.get("general.name") == "folder"


SENTENCES = (*TRICKY, "<|im_start|>user\nhi<|im_end|>", "a<|endoftext|> b", "<|im_end", "<tool>x")


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece"])
def test_ids_are_those_of_transformers(folder: Path, tmp_path: Path, kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    if kind == "sentencepiece":
        pytest.importorskip("sentencepiece")
        hf_models.save_sentencepiece(folder, keep_model=False)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    path = hf_to_gguf.convert(folder, tmp_path / "m.gguf").path
    ours = tokenizer_of(path)
    for text in SENTENCES:
        expected = theirs.encode(text)
        assert ours.encode(text) == expected, text
        assert ours.decode(expected, skip_special=True) == theirs.decode(
            expected, skip_special_tokens=True, clean_up_tokenization_spaces=False
        ), text
    if kind == "byte-level":
        messages = [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "  Was  ist 1 + 1?\n"},
        ]
        chat = ChatTemplate.from_metadata(_core.GgufFile(str(path)).get, ours)
        for prompt in (True, False):
            wanted = theirs.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=prompt
            )
            assert chat.render(messages, add_generation_prompt=prompt) == wanted


def test_added_tokens_that_the_library_numbers_anew(folder: Path, tmp_path: Path) -> None:
    """Special tokens that the vocabulary lacks are put behind it, whatever id the file says."""
    tokenizer = hf_models.byte_level()
    for row in tokenizer["added_tokens"]:
        del tokenizer["model"]["vocab"][row["content"]]
    hf_models.save_byte_level(folder, tokenizer)
    message = hf_models.refused(folder, tmp_path / "out.gguf", ModelFileError)
    assert "added token '<|endoftext|>': expected id 312" in message
    assert message.endswith("found 0")


def test_flags_of_added_tokens(folder: Path, tmp_path: Path) -> None:
    tokenizer = hf_models.byte_level()
    tokenizer["added_tokens"][1]["lstrip"] = True
    vocab = tokenizer["model"]["vocab"]
    vocab |= {"<word>": len(vocab), "<norm>": len(vocab) + 1}
    tokenizer["added_tokens"] += [
        added(vocab["<word>"], "<word>", single_word=True),
        added(vocab["<norm>"], "<norm>", normalized=True),
    ]
    hf_models.save_byte_level(folder, tokenizer)
    made = hf_to_gguf.convert(folder, tmp_path / "m.gguf")
    assert made.notes == [
        "white space beside '<|im_start|>' is not treated as in tokenizer.json",
        "'<word>' is found within words, too, other than in tokenizer.json",
    ]


def trained(folder: Path, cutter: Any, normalizer: Any = None, **model: Any) -> None:
    """A byte-level BPE trained by the library with this pre-tokenizer and normalizer."""
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers, trainers

    library = Library(models.BPE(**model))
    library.pre_tokenizer = cutter
    if normalizer is not None:
        library.normalizer = normalizer
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=hf_models.N_VOCAB - 8,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>"],
        show_progress=False,
    )
    library.train_from_iterator(list(PROBES) * 3, trainer)
    library.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": None, "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def cutters() -> dict[str, Any]:
    from tokenizers import Regex, pre_tokenizers

    split = pre_tokenizers.Split
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    # Llama 3's pattern as its own file spells it.
    llama3 = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
        r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    # Another spelling of Qwen 2's pattern.
    qwen2 = (
        r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|"
        r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    sequence = pre_tokenizers.Sequence
    return {
        "gpt-2": gpt2,
        "smollm": sequence([pre_tokenizers.Digits(individual_digits=True), gpt2]),
        "dbrx": sequence([split(Regex(llama3), "isolated"), bytes_only]),
        "llama-bpe": sequence([split(Regex(llama3), "isolated"), bytes_only]),
        "qwen2": sequence([split(Regex(qwen2), "isolated"), bytes_only]),
        "": sequence([split(Regex(r"\w+|\W"), "isolated"), bytes_only]),
    }


@pytest.mark.parametrize(
    ("cutter", "nfc", "name"),
    [
        ("gpt-2", False, "gpt-2"),
        ("gpt-2", True, "olmo"),
        ("smollm", False, "smollm"),
        ("smollm", True, "command-r"),
        ("dbrx", False, "dbrx"),
        ("llama-bpe", False, "llama-bpe"),
        ("qwen2", True, "qwen2"),
        ("qwen2", False, "deepseek-r1-qwen"),
    ],
)
def test_pre_tokenizers_are_recognised(
    folder: Path, tmp_path: Path, cutter: str, nfc: bool, name: str
) -> None:
    """Names of the same patterns are told apart by the normalizer that they imply."""
    from tokenizers import normalizers

    normalizer = normalizers.Sequence([normalizers.NFC()]) if nfc else normalizers.Sequence([])
    trained(folder, cutters()[cutter], normalizer, ignore_merges=name == "llama-bpe")
    made = hf_to_gguf.convert(folder, tmp_path / "m.gguf")
    assert tokenizer_of(made.path).pre == name and not made.notes
    same_ids(tokenizer_of(made.path), folder)


def test_normalizers_that_no_name_implies(folder: Path, tmp_path: Path) -> None:
    from tokenizers import normalizers

    out = tmp_path / "m.gguf"
    for normalizer, found in (
        (normalizers.NFKC(), "NFKC"),
        (normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()]), "Lowercase"),
        (normalizers.Strip(), "Strip"),
    ):
        trained(folder, cutters()["qwen2"], normalizer)
        message = hf_models.refused(folder, out, UnsupportedModelError)
        assert f"normalizer: expected none or NFC, found {found}" in message
        with pytest.raises(UnsupportedModelError, match="normalizer: expected"):
            hf_to_gguf.convert(folder, out, pre="qwen2")
    # The patterns of Llama 3 and GPT-4 have names, but none of these normalizes.
    trained(folder, cutters()["dbrx"], normalizers.NFC())
    message = hf_models.refused(folder, out, UnsupportedModelError)
    assert "normalizer: expected none (as dbrx, llama-bpe" in message and "found NFC" in message
    with pytest.raises(UnsupportedModelError, match="--pre dbrx implies none"):
        hf_to_gguf.convert(folder, out, pre="dbrx")
    # The user may choose a name that normalizes although the file does not, with a note.
    trained(folder, cutters()["qwen2"])
    made = hf_to_gguf.convert(folder, out, pre="qwen2")
    assert any("--pre qwen2 is not what tokenizer.json does" in note for note in made.notes)


def test_padding_and_truncation_are_no_part_of_a_tokenizer(folder: Path, tmp_path: Path) -> None:
    tokenizer = hf_models.byte_level()
    padding = {
        "strategy": {"Fixed": 64}, "direction": "Left", "pad_to_multiple_of": 8,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "<|endoftext|>",
    }  # fmt: skip
    truncation = {
        "direction": "Left", "max_length": 4, "strategy": "LongestFirst", "stride": 0,
    }  # fmt: skip
    hf_models.save_byte_level(folder, tokenizer)
    plain = hf_to_gguf.convert(folder, tmp_path / "plain.gguf")
    hf_models.save_byte_level(folder, tokenizer | {"padding": padding, "truncation": truncation})
    hf_models.edit(
        folder / "tokenizer_config.json",
        padding_side="left", truncation_side="left", model_max_length=4, pad_to_multiple_of=8,
    )  # fmt: skip
    made = hf_to_gguf.convert(folder, tmp_path / "m.gguf")
    assert made.notes == plain.notes == []
    ours, same = tokenizer_of(made.path), tokenizer_of(plain.path)
    for text in TRICKY:
        assert ours.encode(text) == same.encode(text)
    assert _core.GgufFile(str(made.path)).metadata == _core.GgufFile(str(plain.path)).metadata


def added(i: int, text: str, **flags: bool) -> dict[str, Any]:
    """Makes a row of added_tokens."""
    usual = ("single_word", "lstrip", "rstrip", "normalized", "special")
    return {"id": i, "content": text, **dict.fromkeys(usual, False), **flags}


@pytest.mark.parametrize("listed", [False, True])
def test_added_tokens_beyond_the_embedding(folder: Path, tmp_path: Path, listed: bool) -> None:
    """Added tokens without a row are left out, also if model.vocab lists them."""
    tokenizer = hf_models.byte_level()
    vocab = tokenizer["model"]["vocab"]
    n = len(vocab)
    vocab |= {f"<fill {i}>": i for i in range(n, hf_models.N_VOCAB)}
    beyond = [added(hf_models.N_VOCAB + i, f"<image {i}>", special=i % 2 == 0) for i in range(4)]
    tokenizer["added_tokens"] += beyond
    if listed:
        vocab |= {row["content"]: row["id"] for row in beyond}
    hf_models.save_byte_level(folder, tokenizer)
    made = hf_to_gguf.convert(folder, tmp_path / "m.gguf")
    assert made.notes == [
        "4 added tokens beyond the 340 rows of the embedding are left out: '<image 0>', "
        "'<image 1>', '<image 2>', ..."
    ]
    ours = tokenizer_of(made.path)
    assert ours.vocab_size == hf_models.N_VOCAB
    assert max(ours.encode("a <image 0> b")) < n
    assert ours.decode(ours.encode("a <image 0> b")) == "a <image 0> b"


def test_types_of_added_tokens_are_those_of_the_folder(folder: Path, tmp_path: Path) -> None:
    """A token is special by its flag, a special-token name, or as an end; never by its look."""
    tokenizer = hf_models.byte_level()
    n = len(tokenizer["model"]["vocab"])
    names = ("<|look|>", "<pad>", "[named]", "<|extra|>", "<end>", "<flag>")
    tokenizer["model"]["vocab"] |= {name: n + i for i, name in enumerate(names)}
    tokenizer["added_tokens"] += [
        added(n + i, name, special=name == "<flag>") for i, name in enumerate(names)
    ]
    hf_models.save_byte_level(folder, tokenizer)
    hf_models.edit(
        folder / "tokenizer_config.json",
        additional_special_tokens=["[named]"],
        extra_special_tokens={"extra_token": "<|extra|>"},
    )
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, n + 4]}))
    ours = tokenizer_of(hf_to_gguf.convert(folder, tmp_path / "m.gguf").path)
    special = [name for i, name in enumerate(names) if ours.is_special(n + i)]
    assert special == ["[named]", "<|extra|>", "<end>", "<flag>"]
    assert {2, n + 4} <= ours.eog_ids
    ids = ours.encode("".join(names), add_special=False, parse_special=False)
    assert n in ids and n + 1 in ids and n + 2 not in ids


@pytest.mark.parametrize(
    ("single", "frame", "note"),
    [
        ("<|endoftext|> $A", (True, False), None),
        ("$A <|im_end|>", (False, True), None),
        ("<|endoftext|> $A <|im_end|>", (True, True), None),
        ("<|im_start|> $A", (False, False), "begin with '<|im_start|>' rather than with BOS"),
        ("<|endoftext|> <|im_start|> $A", (False, False), "'<|endoftext|> <|im_start|>'"),
        ("$A <|endoftext|>", (False, False), "end with '<|endoftext|>' rather than with EOS"),
    ],
)
def test_frames_of_post_processors(
    folder: Path, tmp_path: Path, single: str, frame: tuple[bool, bool], note: str | None
) -> None:
    from tokenizers import Tokenizer as Library
    from tokenizers import processors

    library = Library.from_file(str(folder / "tokenizer.json"))
    names = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    library.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[(name, i) for i, name in enumerate(names)]
    )
    library.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": names[0], "eos_token": names[2]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    made = hf_to_gguf.convert(folder, tmp_path / "m.gguf")
    ours = tokenizer_of(made.path)
    assert (ours.add_bos, ours.add_eos) == frame
    assert [note in found for found in made.notes] == ([] if note is None else [True])
    if note is None:
        assert ours.encode("the") == library.encode("the").ids
    # A frame token to which the folder gives no role gets one.
    if single == "<|endoftext|> $A":
        (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": names[2]}))
        ours = tokenizer_of(hf_to_gguf.convert(folder, tmp_path / "n.gguf").path)
        assert ours.bos_id == 0 and ours.encode("the") == library.encode("the").ids


def test_unknown_pre_tokenizer(folder: Path, tmp_path: Path) -> None:
    trained(folder, cutters()[""])
    message = hf_models.refused(folder, tmp_path / "m.gguf", UnsupportedModelError)
    assert "--pre NAME" in message
    made = hf_to_gguf.convert(folder, tmp_path / "m.gguf", pre="gpt-2")
    assert tokenizer_of(made.path).pre == "gpt-2"
    assert any("--pre gpt-2 is not what tokenizer.json does" in note for note in made.notes)
    with pytest.raises(OptionError, match="pre: expected one of"):
        hf_to_gguf.convert(folder, tmp_path / "n.gguf", pre="nonsense")


@pytest.mark.parametrize("keep_model", [True, False])
def test_sentencepiece_tokenizer(folder: Path, tmp_path: Path, keep_model: bool) -> None:
    pytest.importorskip("sentencepiece")
    model = hf_models.save_sentencepiece(folder, keep_model=keep_model)
    path = hf_to_gguf.convert(folder, tmp_path / "m.gguf").path
    ours = tokenizer_of(path)
    assert ours.kind == "llama"
    assert (ours.add_bos, ours.add_eos, ours.add_space_prefix) == (True, False, True)
    same_ids(ours, folder)
    for text in TRICKY:
        if "\0" not in text and text:
            assert ours.encode(text, add_special=False) == model.encode(text), text
    assert ours.encode("use <tool> now")[0] == ours.bos_id
    assert ours.token_to_id("<tool>") in ours.encode("use <tool> now")


def test_sentencepiece_model_alone(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("sentencepiece")
    model = hf_models.save_sentencepiece(folder, keep_model=True)
    (folder / "tokenizer.json").unlink()
    path = hf_to_gguf.convert(folder, tmp_path / "m.gguf").path
    for text in TRICKY[1:]:
        if "\0" not in text and text:
            assert tokenizer_of(path).encode(text, add_special=False) == model.encode(text)
    data = (folder / "tokenizer.model").read_bytes()
    for spoiled in (data[: len(data) // 2 + 1], b"", b"\xff" * 40, data + b"\x0a\xff"):
        (folder / "tokenizer.model").write_bytes(spoiled)
        assert "tokenizer.model: " in hf_models.refused(
            folder, tmp_path / "out.gguf", ModelFileError
        )


def test_merges_that_scores_cannot_say(folder: Path, tmp_path: Path) -> None:
    """ "ab" + "c" makes "abc" by SentencePiece's rule; this BPE knows only "a" + "bc"."""
    tokenizer = hf_models.byte_level()
    tokens = ["<unk>", "<s>", "</s>", "▁", "a", "b", "c", "ab", "bc", "abc"]
    for row, text in zip(tokenizer["added_tokens"], tokens, strict=False):
        row |= {"content": text}
    tokenizer["pre_tokenizer"] = tokenizer["decoder"] = None
    escape = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    prepend = {"type": "Prepend", "prepend": "▁"}
    tokenizer["normalizer"] = {"type": "Sequence", "normalizers": [prepend, escape]}
    tokenizer["model"] |= {
        "unk_token": "<unk>",
        "vocab": {token: i for i, token in enumerate(tokens)},
        "merges": ["a b", "b c", "a bc"],
    }
    hf_models.save_byte_level(folder, tokenizer)
    message = hf_models.refused(folder, tmp_path / "out.gguf", UnsupportedModelError)
    assert "best-scored" in message
    tokenizer["model"]["merges"].append("ab c")  # the merges now make all tokens of the vocabulary
    hf_models.save_byte_level(folder, tokenizer)
    path = hf_to_gguf.convert(folder, tmp_path / "m.gguf").path
    assert tokenizer_of(path).encode("abcabab", add_special=False) == [3, 9, 7, 7]


@pytest.mark.parametrize("keep_model", [True, False])
def test_sentencepiece_with_another_normalizer(
    folder: Path, tmp_path: Path, keep_model: bool
) -> None:
    pytest.importorskip("sentencepiece")
    hf_models.save_sentencepiece(folder, keep_model=keep_model)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    steps = tokenizer["normalizer"]["normalizers"]
    for step in ({"type": "NFKC"}, {"type": "Lowercase"}, {"type": "Strip", "strip_left": True}):
        tokenizer["normalizer"]["normalizers"] = [step | {"strip_right": True}, *steps]
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
        message = hf_models.refused(folder, tmp_path / "out.gguf", UnsupportedModelError)
        assert f"normalizer: expected none but spaces as '▁', found {step['type']}" in message


def test_tokens_beyond_the_embedding(folder: Path, tmp_path: Path) -> None:
    tokenizer = hf_models.byte_level()
    tokenizer["model"]["vocab"]["xyz"] = hf_models.N_VOCAB
    hf_models.save_byte_level(folder, tokenizer)
    assert "expected an id below" in hf_models.refused(
        folder, tmp_path / "out.gguf", ModelFileError
    )
    tokenizer["model"] = {"type": "WordPiece", "vocab": {}}
    hf_models.save_byte_level(folder, tokenizer)
    assert "expected BPE" in hf_models.refused(folder, tmp_path / "out.gguf", UnsupportedModelError)


def test_ends_of_an_answer_and_templates(folder: Path, tmp_path: Path) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 1, 0]}))
    (folder / "chat_template.jinja").unlink()
    templates = [
        {"name": "default", "template": "{{ a }}"},
        {"name": "tool_use", "template": "{{ b }}"},
    ]
    hf_models.edit(folder / "tokenizer_config.json", chat_template=templates, add_bos_token=True)
    path = hf_to_gguf.convert(folder, tmp_path / "m.gguf").path
    ours, get = tokenizer_of(path), _core.GgufFile(str(path)).get
    assert {0, 1, 2} <= ours.eog_ids
    assert ours.add_bos
    assert get("tokenizer.chat_template") == "{{ a }}"
    assert get("tokenizer.chat_template.tool_use") == "{{ b }}"
