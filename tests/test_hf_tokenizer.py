"""Tokenizers of Hugging Face folders: ids as Hugging Face's own library gives them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from stoker.export import hf_to_gguf
from stoker.export.tokenizer_probes import PROBES
from stoker.runtime import _core
from stoker.runtime.chat import ChatTemplate
from stoker.runtime.errors import ModelFileError, OptionError, UnsupportedModelError
from stoker.runtime.tokenizer import Tokenizer

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


def test_space_beside_special_tokens(folder: Path, tmp_path: Path) -> None:
    tokenizer = hf_models.byte_level()
    tokenizer["added_tokens"][1]["lstrip"] = True
    hf_models.save_byte_level(folder, tokenizer)
    made = hf_to_gguf.convert(folder, tmp_path / "m.gguf")
    assert made.notes == ["white space beside '<|im_start|>' is not treated as in tokenizer.json"]


def trained(folder: Path, cutter: Any, **model: Any) -> None:
    """A byte-level BPE trained by the library with this pre-tokenizer."""
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers, trainers

    library = Library(models.BPE(**model))
    library.pre_tokenizer = cutter
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
    # Llama 3 as its own file spells it.
    llama3 = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
        r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    # Another spelling of Qwen 2's.
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


@pytest.mark.parametrize("name", ["gpt-2", "smollm", "dbrx", "llama-bpe", "qwen2"])
def test_pre_tokenizers_are_recognised(folder: Path, tmp_path: Path, name: str) -> None:
    trained(folder, cutters()[name], ignore_merges=name == "llama-bpe")
    path = hf_to_gguf.convert(folder, tmp_path / "m.gguf").path
    assert tokenizer_of(path).pre == name
    same_ids(tokenizer_of(path), folder)


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
    tokenizer["model"]["merges"].append("ab c")  # now all that the vocabulary allows
    hf_models.save_byte_level(folder, tokenizer)
    path = hf_to_gguf.convert(folder, tmp_path / "m.gguf").path
    assert tokenizer_of(path).encode("abcabab", add_special=False) == [3, 9, 7, 7]


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
