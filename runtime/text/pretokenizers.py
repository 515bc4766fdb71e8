"""The pre-tokenizer kinds of GGUF files, which cut a text into words before merges are applied.

`tokenizer.ggml.pre` names a kind. A kind is a list of patterns: each one in turn cuts every
segment that the patterns before it left, and both what it matches and what lies between matches
are segments ("isolated" in the terms of Hugging Face tokenizers). The patterns are those of the
models' own published tokenizer.json; the kinds' names and flags are those of llama.cpp.
"""

# ruff: noqa: RUF001 (the published patterns hold letters that look like others)
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from ..base.errors import TokenizerError

# This stands for a pattern: runs of punctuation as the library's Punctuation step finds them. Its
# Unicode version is older than the one behind \p{P}.
PUNCTUATION = "punctuation"


@dataclass(frozen=True)
class PreTokenizer:
    """One kind of pre-tokenizer.

    patterns: regular expressions in Oniguruma syntax, or PUNCTUATION, applied in order; empty for
        `escaped`.
    ignore_merges: a word that is itself a token is taken whole, without merging.
    add_bos: the default of tokenizer.ggml.add_bos_token.
    nfc: text is brought to Unicode's normalization form C first.
    escaped: tokens are plain text with "▁" for space (as in SentencePiece), not the byte
        alphabet of GPT-2, and only runs of newlines are cut out.
    """

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False
    nfc: bool = False
    escaped: bool = False


_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_CJK_KANA = "[一-龥぀-ゟ゠-ヿ]+"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_ASCII_PUNCTUATION = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"""
# This groups digits in threes from the right: 1234567 is 1, 234, 567.
_DIGITS_FROM_RIGHT = r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))"


def _contracted(number: str, spaces: str = _SPACES, head: str = f"{_CONTRACTION}|") -> str:
    """Returns the pattern of the Llama 3 and Qwen 2 families; `number` is what differs."""
    return head + r"[^\r\n\p{L}\p{N}]?\p{L}+|" + number + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|" + spaces


def _cased(
    number: str,
    contraction: str = f"{_CONTRACTION}?",
    upper: str = _UPPER,
    lower: str = _LOWER,
    head: str = "",
) -> str:
    """Returns the pattern of o200k and Tekken, which also cuts where upper case follows lower."""
    start = r"[^\r\n\p{L}\p{N}]?"
    return (
        f"{head}{start}{upper}*{lower}+{contraction}|{start}{upper}+{lower}*{contraction}|"
        + number
        + r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|"
        + _SPACES
    )


def _marked(punctuation: str) -> str:
    """Returns the last pattern of the DeepSeek V3 family, with combining marks as letters."""
    return (
        _ASCII_PUNCTUATION
        + r"[A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+"
        + punctuation
    )


# A letter is escaped if normalization would turn it into another one.
_DEEPSEEK_LETTERS = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ"
    "-Ὅὐ-ὗὙὛὝὟ-\u1F7Dᾀ-ᾴᾶ-ᾼ\u1FBEῂ-ῄῆ-ῌῐ-\u1FD3ῖ-\u1FDBῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ\u212A-ℭℯ-ℴℹ"
    "ℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)  # fmt: skip

_DEFAULT = PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _WORDS, r"\p{N}+", "[0-9][0-9][0-9]"))
_GPT2 = PreTokenizer((_WORDS,))
_DIGITS_APART = PreTokenizer((r"\p{N}", _WORDS))
_LLAMA3 = PreTokenizer((_contracted(r"\p{N}{1,3}"),), ignore_merges=True, add_bos=True)
_THREE_DIGITS = PreTokenizer((_contracted(r"\p{N}{1,3}"),))
_ONE_DIGIT = PreTokenizer((_contracted(r"\p{N}"),))
_QWEN2 = replace(_ONE_DIGIT, nfc=True)
_DEEPSEEK3 = PreTokenizer((r"\p{N}{1,3}", _CJK_KANA, _marked(rf"[\r\n]*|{_SPACES}")))
_GPT4O = PreTokenizer((_cased(r"\p{N}{1,3}"),))
_BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"
_BAILING = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]|\s+(?!\S)|\s+"
)
_ESCAPED = PreTokenizer((), escaped=True)

# `nfc` is set if the published tokenizer is known to have it: Qwen 2, 2.5, 3 and 3.5, Command-R,
# GPT-NeoX and its kin (OLMo, MPT, ModernBERT) in transformers' own classes for them, StableLM 2
# and Hunyuan in their tokenization_arcade100k.py and tokenization_hy.py. Those of Llama 3,
# DeepSeek, GPT-2 and StarCoder are known to have none. It is unset for the other names, for which
# this could not be established: deepseek-r1-qwen, kormo, f2llmv2 and megrez cut as Qwen 2 does, but
# their published files were not available.
_KINDS: tuple[tuple[str, PreTokenizer], ...] = (
    ("default", _DEFAULT),
    ("llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano", _LLAMA3),
    ("minicpm5", PreTokenizer((r"\p{N}{1,3}", _contracted(r"\p{N}+")), ignore_merges=True)),
    (
        "jais-2",
        PreTokenizer(
            (
                _contracted(
                    r"\p{N}{1,3}",
                    r"\s*[\r\n]+|"
                    + "".join(rf"\s{{{n}}}(?!\S)|" for n in (512, 256, 128, 64, 32, 16, 8, 4))
                    + r"\s{1,2}(?!\S)|\s{1}",
                ),
            )
        ),
    ),
    ("dbrx smaug-bpe chatglm-bpe", _THREE_DIGITS),
    ("glm4 glm5", PreTokenizer(_THREE_DIGITS.patterns, ignore_merges=True)),
    (
        "deepseek-llm",
        PreTokenizer(
            (
                r"[\r\n]",
                rf"\s?[{_DEEPSEEK_LETTERS}]+",
                r"\s?[!-/:-~！-／：-～‘-‟　-。]+",
                r"\s+$",
                "[一-龥ࠀ-一가-퟿]+",
                r"\p{N}",
            )
        ),
    ),
    (
        "deepseek-coder",
        PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}")),
    ),
    ("deepseek-v3 hunyuan-dense joyai-llm hy_v4", _DEEPSEEK3),
    (
        "spark2_5",
        PreTokenizer(
            (r"\p{N}{1,3}", _CJK_KANA, _marked(r"|[\r\n]|\s+(?!\S)|\s+"), r"\p{N}"),
        ),
    ),
    (
        "youtu",
        PreTokenizer(
            (
                "[가-힣ㄱ-ㆎ]+|[！…“”‘’—：；，、-〿︰-﹏]+|[ㄅ-ㄯ]+|" + _CJK_KANA,
                _cased(r"\p{N}"),
            ),
            ignore_merges=True,
        ),
    ),
    ("falcon", PreTokenizer((PUNCTUATION, _WORDS, "[0-9][0-9][0-9]"))),
    (
        "starcoder refact smollm codeshell exaone minerva-7b mellum2",
        _DIGITS_APART,
    ),
    ("command-r", replace(_DIGITS_APART, nfc=True)),
    (
        "gpt-2 phi-2 jina-es jina-de gigachat jina-v1-en jina-v2-code jina-v2-es jina-v2-de "
        "roberta-bpe a.x-4.0 mellum jais trillion granite-docling exaone4",
        _GPT2,
    ),
    ("olmo mpt modern-bert", replace(_GPT2, nfc=True)),
    ("qwen2 stablelm2 hunyuan", _QWEN2),
    ("deepseek-r1-qwen kormo f2llmv2 megrez solar-open grok-2", _ONE_DIGIT),
    (
        "qwen35",
        PreTokenizer(
            (
                rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}|"
                rf" ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}",
            ),
            nfc=True,
        ),
    ),
    ("ufakzeka", PreTokenizer((_contracted(r"\p{N}", head=""),))),
    ("laguna", PreTokenizer((r"[^\n]+|[\n]+", _contracted(r"\p{N}")))),
    (
        "seed-coder",
        PreTokenizer(
            (
                rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|"
                rf" ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}",
            )
        ),
    ),
    ("bailingmoe bailingmoe2 llada-moe", PreTokenizer((_BAILING,))),
    (
        "exaone-moe",
        PreTokenizer(
            (
                rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|"
                r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+",
            )
        ),
    ),
    ("poro-chat bloom gpt3-finnish", PreTokenizer((_BLOOM,))),
    ("viking", PreTokenizer((_BLOOM, r"\p{N}"))),
    (
        "tekken",
        PreTokenizer((_cased(r"\p{N}", contraction=""),), ignore_merges=True, add_bos=True),
    ),
    ("gpt-4o llama4 kanana2 talkie minimax-m2", _GPT4O),
    ("granite-embed-multi-97m", PreTokenizer(_GPT4O.patterns, ignore_merges=True)),
    ("tiny_aya cohere2moe", PreTokenizer((_DIGITS_FROM_RIGHT, _cased(r"\p{N}{1,3}")))),
    (
        "kimi-k2",
        PreTokenizer(
            (
                _cased(
                    r"\p{N}{1,3}",
                    upper=r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]",
                    lower=r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]",
                    head=r"\p{Han}+|",
                ).replace(r"[\r\n/]*", r"[\r\n]*"),
            )
        ),
    ),
    ("superbpe", PreTokenizer((r"\p{N}+", r"(?=(\d{3})+(?!\d))"))),
    (
        "afmoe",
        PreTokenizer(
            (
                _DIGITS_FROM_RIGHT,
                "[一-鿿㐀-䶿\uf900-\ufaff぀-ゟ゠-ヿ･-ﾟ⼀-⿟เ-๿຀-໿ក-៿က-႟ꩠ-ꩿꧠ-꧿가-힯ᄀ-ᇿ]+",
                _marked(rf"[\r\n]*|{_SPACES}"),
            )
        ),
    ),
    (
        "chameleon",
        PreTokenizer(
            (
                "<sentinel:[0-9]+>",
                "(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z",
                r"([\t\n]|    |  )",
                r"\p{N}",
                r"[\p{P}!-/:-@\[-`{-~]",
                _WORDS,
            ),
            add_bos=True,
        ),
    ),
    ("gemma4 granite-embed-multi-311m sarvam-moe", _ESCAPED),
)

PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    name: kind for names, kind in _KINDS for name in names.split()
}


def pre_tokenizer(name: str) -> PreTokenizer:
    """Returns the kind that tokenizer.ggml.pre calls `name`. TokenizerError if it is unknown."""
    kind = PRE_TOKENIZERS.get(name)
    if kind is None:
        raise TokenizerError(
            f"tokenizer.ggml.pre: unknown pre-tokenizer {name!r}; known: "
            + ", ".join(sorted(PRE_TOKENIZERS))
        )
    return kind


def byte_level_words(kind: PreTokenizer) -> Callable[[str], list[str]]:
    """Returns a function that cuts a text into `kind`'s words, in GPT-2's byte alphabet."""
    from tokenizers import Regex, pre_tokenizers

    steps: list[pre_tokenizers.PreTokenizer] = [
        pre_tokenizers.Punctuation("contiguous")
        if pattern == PUNCTUATION
        else pre_tokenizers.Split(Regex(pattern), "isolated")
        for pattern in kind.patterns
    ]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    split = pre_tokenizers.Sequence(steps).pre_tokenize_str
    return lambda text: [word for word, _ in split(text)]
