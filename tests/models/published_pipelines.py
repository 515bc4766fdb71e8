"""Hugging Face pipelines of published tokenizers, and texts that are hard on them.

A pipeline is what a tokenizer.json says around the model: normalizer, pre-tokenizer, how its BPE
is set. They are written down here as published, independently of what the runtime knows under the
names of tokenizer.ggml.pre, and take the vocabulary and merges of a GGUF file. Sources:
tokenizer.json of Qwen/Qwen2-7B, meta-llama/Meta-Llama-3-8B, deepseek-ai/deepseek-llm-7b-base and
deepseek-coder-6.7b-instruct, openai-community/gpt2, smallcloudai/Refact-1_6B-fim (StarCoder's is
the same) and tiiuae/falcon-7b; transformers' models/{qwen3_5,gemma,cohere,gpt_neox}/tokenization_*
for Qwen 3.5, Gemma, Command-R and MPT.
"""

# ruff: noqa: RUF001 (the published patterns hold letters that look like others)
from __future__ import annotations

import random
import unicodedata
from collections.abc import Callable, Iterator
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

PIPELINES = (
    "qwen2", "qwen35", "llama-bpe", "gemma-4", "deepseek-llm", "deepseek-coder",
    "gpt-2", "refact", "starcoder", "falcon", "command-r", "mpt",
)  # fmt: skip

_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
_QWEN2 = (
    _CONTRACTION + r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN35 = (
    _CONTRACTION + r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = (
    _CONTRACTION + r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Ranges of code points rather than letters, which an editor might normalize.
_DEEPSEEK_LETTERS = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚ"
    "\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d"
    "\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3"
    "\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115"
    "\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149"
    "\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d"
    "\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17"
    "\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb"
    "\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_DEEPSEEK_CJK = "[一-龥ࠀ-一가-\ud7ff]+"
_DEEPSEEK = {
    "deepseek-llm": (
        "[\r\n]",
        rf"\s?[{_DEEPSEEK_LETTERS}]+",
        r"\s?[!-/:-~！-／：-～‘-‟\u3000-。]+".replace(r"\u3000", "\u3000"),
        r"\s+$",
        _DEEPSEEK_CJK,
    ),
    "deepseek-coder": ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _DEEPSEEK_CJK),
}


def steps(name: str) -> tuple[Any, Any]:
    """The normalizer (or None) and the pre-tokenizer of a published tokenizer.json."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    digits = pre_tokenizers.Digits(individual_digits=True)
    normalizer = None
    if name in ("qwen2", "qwen35", "command-r", "mpt"):
        normalizer = normalizers.NFC()
    if name == "gemma-4":
        cut = pre_tokenizers.Split(" ", "merged_with_previous")
        return normalizers.Replace(" ", "▁"), cut
    if name in ("gpt-2", "mpt"):
        return normalizer, gpt2
    if name in ("refact", "starcoder", "command-r"):
        return normalizer, pre_tokenizers.Sequence([digits, gpt2])
    if name == "falcon":
        return normalizer, pre_tokenizers.Sequence(
            [
                pre_tokenizers.Punctuation("contiguous"),
                gpt2,
                pre_tokenizers.Digits(individual_digits=False),
                pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), "isolated"),
            ]
        )
    if name in _DEEPSEEK:
        splits = [pre_tokenizers.Split(Regex(p), "isolated") for p in _DEEPSEEK[name]]
        cut = pre_tokenizers.Sequence([*splits, digits, byte_level])
        return normalizers.Sequence([]), cut
    pattern = {"qwen2": _QWEN2, "qwen35": _QWEN35, "llama-bpe": _LLAMA3}[name]
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    return normalizer, pre_tokenizers.Sequence([split, byte_level])


def pipeline(name: str, get: Callable[[str], Any]) -> Tokenizer:
    """The library's tokenizer of a published pipeline, over a GGUF file's vocabulary.

    get: a metadata key to its value, None where absent.
    """
    tokens = get("tokenizer.ggml.tokens")
    types = get("tokenizer.ggml.token_type")
    merges = [tuple(m.split(" ")) for m in get("tokenizer.ggml.merges")]
    vocab = {t: i for i, t in enumerate(tokens) if types[i] in (1, 6)}
    gemma = name == "gemma-4"
    if gemma:
        vocab["<unk>"] = tokens.index("<unk>")
    library = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=merges,
            ignore_merges=name == "llama-bpe",
            byte_fallback=gemma,
            fuse_unk=gemma,
            unk_token="<unk>" if gemma else None,
        )
    )
    normalizer, library.pre_tokenizer = steps(name)
    if normalizer is not None:
        library.normalizer = normalizer
    # The library numbers added tokens as the file does only where they follow the vocabulary, so
    # that ids are compared by spelling below.
    library.add_tokens(
        [AddedToken(t, normalized=False) for i, t in enumerate(tokens) if types[i] == 4]
    )
    library.add_special_tokens(
        [AddedToken(t, normalized=False) for i, t in enumerate(tokens) if types[i] == 3]
    )
    return library


def expected_ids(library: Tokenizer, ids: dict[str, int], text: str) -> list[int]:
    """What the library makes of a text, in the file's numbers. ids: of the file, by spelling."""
    found = library.encode(text, add_special_tokens=False)
    return [ids[token] for token in found.tokens]


def _chosen(spans: str) -> str:
    """Characters of ranges like "0041-005A 0300-036F", those that are assigned."""
    found = []
    for span in spans.split():
        first, _, last = span.partition("-")
        found += [chr(c) for c in range(int(first, 16), int(last or first, 16) + 1)]
    return "".join(c for c in found if unicodedata.category(c) != "Cn")


_EVERY = _chosen("0000-D7FF E000-FFFF 10000-1FFFF 20000-200FF 2F800-2F8FF E0020-E007F")
# Each a kind of trouble; a text mixes a few of them.
_KINDS: tuple[str, ...] = (
    _chosen("0020-007E"),
    _chosen("0041-005A 0061-007A"),
    "aeiouAEIOUnNsSoO" + _chosen("0300-0345 0360-036F"),  # letters and marks, in any order
    _chosen("0300-036F 0483-0489 0591-05BD 064B-065F 0E31-0E4E 1AB0-1ABE 1DC0-1DFF 20D0-20F0"),
    _chosen("00A0-024F 1E00-1EFF"),  # composed Latin
    _chosen("1100-11FF AC00-AE00"),  # Hangul, jamo and syllables
    _chosen("0370-03FF 0400-04FF 0530-058F 1F00-1FFF"),
    _chosen("0590-05FF 0600-06FF 0700-074F"),
    _chosen("0900-0DFF"),
    _chosen("0E00-0EFF 0F00-0FFF 1000-109F 1780-17FF"),
    _chosen("3040-30FF FF00-FFEF 4E00-4FFF 3400-34FF F900-FAFF 2F00-2FD5 3000-303F"),
    _chosen("2070-209C 2100-218F 2460-24FF 3200-33FF FB00-FB06 1D400-1D7FF"),  # compatibility
    _chosen("0030-0039 00B2 00B3 00B9 00BC-00BE 0660-0669 0966-096F 2160-2188 3007 FF10-FF19"),
    "      "
    + _chosen("0009-000D 0020 0085 00A0 1680 2000-200A 2028 2029 202F 205F 3000 200B FEFF"),
    "\n\n\n\r\t   ",
    _chosen("0000-001F 007F-009F 200B-200F 202A-202E 2060-206F FFF9-FFFD FE00-FE0F"),
    "\ufffd\ud800\udfff\udc80",  # lone surrogates become U+FFFD
    "😀👩👨👧🏽🏿❤☃🏳🇩🇪🇫🇷" + "\u200d\ufe0f\u20e3" * 3 + _chosen("1F300-1F5FF"),
    "'’`\"“”.,;:!?…-—–_/\\|()[]{}<>@#$%^&*+=~" + "sStTmMdDlLvVrReE",
    _EVERY,
)
_WORDS = (
    "don't", "they'LL", "I'VE", " the", " of", "    ", "\n\n", "\r\n", "12345678", "3.14", "://",
    "été", "Ångström", "naïve", "한국어", "日本語", "Việt", "ﬁne", "ẛ̣", "नमस्ते", "👩‍👩‍👧", "ĳ", "Ǆ",
)  # fmt: skip


def hard_texts(seed: int, count: int) -> Iterator[str]:
    """Texts of up to 60 characters of a few kinds, decomposed, composed or as they come."""
    chance = random.Random(seed)
    for _ in range(count):
        kinds = chance.sample(_KINDS, chance.randint(1, 4))
        parts: list[str] = []
        for _ in range(chance.randint(1, 12)):
            if chance.random() < 0.15:
                parts.append(chance.choice(_WORDS))
            else:
                parts += chance.choices(chance.choice(kinds), k=chance.randint(1, 5))
        text = "".join(parts)
        form = chance.choice(("", "", "NFD", "NFC", "NFKD"))
        yield unicodedata.normalize(form, text) if form else text
