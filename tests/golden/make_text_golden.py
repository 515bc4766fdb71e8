"""Makes tests/data/golden_tokens.json and golden_chat.json with the reference programs.

usage: make_text_golden.py tokens FOLDER   (needs llama-cpp-python; made with 0.3.36)
       make_text_golden.py chat FOLDER     (needs transformers; made with 5.23.0)
FOLDER holds llama.cpp's vocabulary files ggml-vocab-*.gguf, and templates/*.jinja.
"""

from __future__ import annotations

import hashlib
import json
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

DATA = Path(__file__).parents[1] / "data"
TEXTS = (
    "First Citizen:\nBefore we proceed any further, hear me speak.",
    "def f(x):\n\tif x >= 1000000:\n\t\treturn x**2  # 12345678\n\n\n    return 'it' + \"don't\"",
    "naïve café — “quoted” … ﬁne №5 Ⅷ ²³ µ 𝒳 Ünïcödé",  # noqa: RUF001
    "한국어 텍스트",
    "日本語のテキスト、中文文本。ไทย हिन्दी العربية עברית Ελληνικά",
    "🙂👩‍👩‍👧🏽 🇫🇷  \u2003\u00a0tabs\t\t\tend   ",
    "<s>Hello</s><|im_start|>user\nHi<|im_end|>\n<|endoftext|> <|eot_id|><unk>[MASK]<mask> x",
    "<start_of_turn>user\nHi<end_of_turn>\n<|user|>\n ok <|end|> \n<|assistant|>",
    "",
    " ",
    "\n\n",
    "a",
)

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Weather <b>&'é\"",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "where"}},
                "required": ["city"],
            },
        },
    }
]
USER = {"role": "user", "content": "Hello <there> & 'x' é"}
REST = [{"role": "assistant", "content": "Hi!"}, {"role": "user", "content": "2+2?"}]
SYSTEM = {"role": "system", "content": "Be brief"}
# name: (messages, tools, add_generation_prompt)
CASES: dict[str, tuple[list[dict[str, str]], list[dict[str, Any]] | None, bool]] = {
    "one": ([USER], None, True),
    "three": ([USER, *REST], None, True),
    "closed": ([USER, *REST[:1]], None, False),
    "system": ([SYSTEM, USER, *REST], None, True),
    "tools": ([SYSTEM, USER], TOOLS, True),
}


def fixed_date(pattern: str) -> str:
    """Replaces strftime_now(): the day is always the same."""
    return datetime(2026, 1, 2).strftime(pattern)


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def make_tokens(folder: Path) -> None:
    import llama_cpp

    found = {}
    for path in sorted(folder.glob("*.gguf")):
        model = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
        vocab = model._model.vocab
        found[path.name] = {
            "eog": [i for i in range(model.n_vocab()) if llama_cpp.llama_vocab_is_eog(vocab, i)],
            "bos": model.token_bos(),
            "eos": model.token_eos(),
            "add_bos": llama_cpp.llama_vocab_get_add_bos(vocab),
            "plain": [model.tokenize(t.encode(), add_bos=False, special=False) for t in TEXTS],
            "special": [model.tokenize(t.encode(), add_bos=True, special=True) for t in TEXTS],
        }
    text = json.dumps(found, separators=(",", ":")).replace('},"', '},\n"')
    (DATA / "golden_tokens.json").write_text(text + "\n")


def make_chat(folder: Path) -> None:
    from transformers.utils import chat_template_utils

    class FixedDay(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> FixedDay:
            return cls(2026, 1, 2)

    chat_template_utils.datetime = FixedDay
    found: dict[str, dict[str, str | None]] = {}
    for path in sorted((folder / "templates").glob("*.jinja")):
        source = path.read_text(encoding="utf-8")
        found[path.name] = {}
        for name, (messages, tools, prompt) in CASES.items():
            try:
                text = chat_template_utils.render_jinja_template(
                    [messages],
                    chat_template=source,
                    tools=tools,
                    add_generation_prompt=prompt,
                    bos_token="<s>",
                    eos_token="</s>",
                )[0][0]
            except Exception:
                found[path.name][name] = None
            else:
                found[path.name][name] = digest(text)
    text = json.dumps(found, separators=(",", ":")).replace('},"', '},\n"')
    (DATA / "golden_chat.json").write_text(text + "\n")


if __name__ == "__main__":
    {"tokens": make_tokens, "chat": make_chat}[sys.argv[1]](Path(sys.argv[2]))
