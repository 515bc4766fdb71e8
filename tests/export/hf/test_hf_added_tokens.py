"""Tokens, ends and templates that files beside tokenizer.json name are those of transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
from stoker.export import hf_to_gguf
from stoker.runtime import _core
from stoker.runtime.base.errors import ModelFileError
from stoker.runtime.text.tokenizer import Tokenizer

pytest.importorskip("safetensors", reason="needs safetensors (pip install safetensors)")
pytest.importorskip("transformers", reason="needs transformers (pip install transformers)")

import hf_models
import transformers

N = len(hf_models.byte_level()["model"]["vocab"])  # the first id that is free


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    hf_models.smallthinker(tmp_path / "folder", window=0, softmax=False)
    return tmp_path / "folder"


def converted(folder: Path, tmp_path: Path) -> tuple[Tokenizer, hf_to_gguf.Converted]:
    made = hf_to_gguf.convert(folder, tmp_path / "m.gguf")
    return Tokenizer.from_metadata(_core.GgufFile(str(made.path)).get), made


def write(folder: Path, name: str, values: Any) -> None:
    (folder / name).write_text(json.dumps(values))


def decoder(*rows: tuple[str, bool]) -> dict[str, Any]:
    return {
        str(N + i): {
            "content": text,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": special,
        }
        for i, (text, special) in enumerate(rows)
    }


def named_by_decoder(folder: Path) -> None:
    rows = decoder(("<think>", True), ("<note>", False))
    hf_models.edit(folder / "tokenizer_config.json", added_tokens_decoder=rows)


def named_by_additional(folder: Path) -> None:
    more = ["<think>", "<note>"]
    hf_models.edit(folder / "tokenizer_config.json", additional_special_tokens=more)


def named_by_extra(folder: Path) -> None:
    roles = {"think_token": "<think>", "note_token": "<note>"}
    hf_models.edit(folder / "tokenizer_config.json", extra_special_tokens=roles)


def named_by_map(folder: Path) -> None:
    write(folder, "special_tokens_map.json", {"mask_token": "<think>", "sep_token": "<note>"})


def named_by_added(folder: Path) -> None:
    write(folder, "added_tokens.json", {"<think>": N, "<note>": N + 1})


TEXTS = ("a<think>b<note> c", "<note>", "the <thin k> <think>", "plain")


@pytest.mark.parametrize(
    "name",
    [named_by_decoder, named_by_additional, named_by_extra, named_by_map, named_by_added],
)
def test_added_tokens_of_other_files(folder: Path, tmp_path: Path, name: Any) -> None:
    name(folder)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    assert {"<think>", "<note>"} <= set(theirs.get_added_vocab())
    ours, _ = converted(folder, tmp_path)
    for text in TEXTS:
        ids = theirs.encode(text)
        assert ours.encode(text) == ids, text
        assert ours.decode(ids, skip_special=True) == theirs.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        ), text


def test_the_flag_of_the_settings_counts(folder: Path, tmp_path: Path) -> None:
    """A token's special is false in tokenizer.json and true in added_tokens_decoder."""
    tokenizer = hf_models.byte_level()
    tokenizer["model"]["vocab"]["<think>"] = N
    row = decoder(("<think>", False))[str(N)]
    tokenizer["added_tokens"].append({"id": N, **row})
    hf_models.save_byte_level(folder, tokenizer)
    hf_models.edit(
        folder / "tokenizer_config.json", added_tokens_decoder=decoder(("<think>", True))
    )
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    ours, _ = converted(folder, tmp_path)
    assert theirs.decode([N, 10], skip_special_tokens=True) == theirs.decode([10])
    assert ours.decode([N, 10], skip_special=True) == theirs.decode([10])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({str(N + 1): {"content": "<think>"}}, f"'<think>': expected id {N} "),
        ({str(N): "<think>"}, "expected an id and a row"),
        ({"x": {"content": "<think>"}}, "expected an id and a row"),
        ([], "added_tokens_decoder: expected an object"),
    ],
)
def test_added_tokens_that_make_no_sense(
    folder: Path, tmp_path: Path, rows: Any, message: str
) -> None:
    hf_models.edit(folder / "tokenizer_config.json", added_tokens_decoder=rows)
    assert message in hf_models.refused(folder, tmp_path / "o.gguf", ModelFileError)


@pytest.mark.parametrize("end", [1, 0, 40])  # <|im_start|>, <|endoftext|>, a piece of text
@pytest.mark.parametrize(
    ("config", "generation"), [(None, "{end}"), ("{end}", None), (7, "{end}"), (None, ["{end}"])]
)
def test_generation_ends_where_that_of_transformers_does(
    folder: Path, tmp_path: Path, config: Any, generation: Any, end: int
) -> None:
    """The GGUF file names the end with eot_token_id; the tokenizer's EOS, 2, stays one."""

    def value(given: Any) -> Any:
        return [end] if isinstance(given, list) else end if given == "{end}" else given

    hf_models.edit(folder / "config.json", eos_token_id=value(config))
    if generation is not None:
        write(folder, "generation_config.json", {"eos_token_id": value(generation)})
        theirs = transformers.GenerationConfig.from_pretrained(folder).eos_token_id
        assert theirs in (end, [end])
    ours, _ = converted(folder, tmp_path)
    assert ours.eos_id == 2
    assert {2, end} <= ours.eog_ids
    assert 7 not in ours.eog_ids


def test_named_templates_are_called_as_gguf_py_calls_them(folder: Path, tmp_path: Path) -> None:
    texts = {"tool-use": "{{ b }}", "RAG": "{{ c }}", "two words": "{{ d }}", "plain": "{{ e }}"}
    more = folder / "additional_chat_templates"
    more.mkdir()
    for name, text in texts.items():
        (more / f"{name}.jinja").write_text(text)
    _, made = converted(folder, tmp_path)
    writer = gguf.GGUFWriter(None, "llama")
    writer.add_chat_template([{"name": n, "template": t} for n, t in texts.items()])
    get = _core.GgufFile(str(made.path)).get
    prefix = "tokenizer.chat_template"
    for key, entry in writer.kv_data[0].items():
        if key.startswith(prefix + "."):
            assert get(key) == entry.value
    assert sorted(get(prefix + "s")) == sorted(writer.kv_data[0][prefix + "s"].value)
    assert [note for note in made.notes if "is called" in note] == [
        "the chat template 'tool-use' is called tool_use in the file",
        "the chat template 'two words' is called two_words in the file",
    ]


def test_templates_that_are_left_out_are_told(folder: Path, tmp_path: Path) -> None:
    rows = [
        {"name": "tool-use", "template": "{{ b }}"},
        {"name": "tool_use", "template": "{{ c }}"},
        {"name": "", "template": "{{ d }}"},
        {"name": "none"},
    ]
    hf_models.edit(folder / "tokenizer_config.json", chat_template=rows)
    _, made = converted(folder, tmp_path)
    left = [note for note in made.notes if "left out" in note]
    assert [note.rpartition(": ")[2] for note in left[1:]] == [
        "it has no name",
        "another has its name in the file",
    ]
    assert left[0].startswith("a chat template without a text is left out: {'name': 'none'}")
    assert _core.GgufFile(str(made.path)).get("tokenizer.chat_template.tool_use") == "{{ b }}"
