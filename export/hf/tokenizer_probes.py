"""Texts on which known tokenizers differ."""

# ruff: noqa: RUF001 (letters that look like others are the point)
from __future__ import annotations

import unicodedata

# Contractions, digits, cases, white space, scripts, marks, emoji, code, punctuation.
_TEXTS = (
    "Hello, world! It's you'LL we'Ve DON'T they're I'm 'tis 'S d'Artagnan isn’t",
    "1 12 123 1234 12345 1234567890 3.14159 1,000,000 0x1F 2nd ½ ² ٣٤٥ १२३ 5G v2.0b",
    "camelCase HTTPServer XMLHttpRequest snake_case_name __init__ iPhone McDonald ÉCOLE ǅungla",
    "  two   three    four \t tab\t\ttabs  \n\n\n three newlines \r\n\r\n crlf \n  indented\n \n",
    "trailing spaces   ",
    "\n\nleading newlines and a tail\n",
    "naïve café Zürich Ångström ﬁ ﬂ ß ẞ İi ñandú smörgåsbord Ελληνικά Русский язык Украї́на",
    "中文分词测试 日本語のテキスト カタカナ 한국어 텍스트 ภาษาไทย עברית العَرَبِيَّة हिन्दी தமிழ் ไทย123",
    "emoji 😀👩‍👩‍👧‍👦🇩🇪 ☃️ ✔︎ 🏳️‍🌈 zero\u200bwidth nbsp\u00a0here ideo\u3000graphic \ufeff bom",
    "for (int i=0;i<10;++i){a[i]*=2;} // x->y && z::w != NULL; #include <stdio.h>\n\treturn -1;\n",
    "$100 €50 £3 100% @user #tag a@b.co https://ex.com/a?b=c&d=e#f ... !!! ??! ---- ==== ~~ ```\\n",
    "“quotes” ‘single’ «guillemets» (paren) [brack] {brace} <tag> </end> a/b\\c ^|~ …—–",
    "e\u0301 combining \u0928\u093f g\u0308 x\u20d7 \u1e9b\u0323 Ａｆｕｌｌｗｉｄｔｈ１２３ ①② ⅷ ℃",
    " The quick brown fox jumps over the lazy dog. THE QUICK BROWN FOX! aaaa bbbbbb cCcCcC",
    "a\nb\n c\n\n d \r e \x0b f \x0c g \x00 h \x7f \u0085 \u2028 i",
)

# Unchanged, decomposed, and with compatibility forms resolved: normalizers differ on these.
PROBES = tuple(
    dict.fromkeys(
        (
            *_TEXTS,
            *(unicodedata.normalize("NFC", text) for text in _TEXTS),
            *(unicodedata.normalize("NFD", text) for text in _TEXTS),
            *(unicodedata.normalize("NFKD", text) for text in _TEXTS),
        )
    )
)
