"""The names of tokens that end a turn or a generation, for files that do not name them by id.

The names are those that llama.cpp knows; end_tokens.py decides when one of them counts.
"""

from __future__ import annotations

# Names that end a turn; the first that a file has is its default tokenizer.ggml.eot_token_id.
EOT_NAMES = (
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "<｜end▁of▁sentence｜>",  # noqa: RUF001 (DeepSeek's spelling)
    "<end_of_utterance>",
)
EOM_NAMES = ("<|eom_id|>",)
# Names that end a generation, besides those above.
EOG_NAMES = (
    "<|return|>",
    "<|call|>",
    "<|flush|>",
    "<|calls|>",
    "</s>",
    "[EOS]",
    "<eos>",
    "<turn|>",
    "<|tool_response>",
    "[e~[",
)
# Fill-in-the-middle tokens after which nothing sensible follows: (metadata key, names).
FIM_END = (
    ("fim_pad_token_id", ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]")),
    (
        "fim_rep_token_id",
        ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    ),
    ("fim_sep_token_id", ("<|file_sep|>",)),
)
# All ids of fill-in-the-middle tokens that a file may name, the older keys among them.
FIM_IDS = (
    "fim_pre_token_id", "fim_suf_token_id", "fim_mid_token_id",
    "fim_pad_token_id", "fim_rep_token_id", "fim_sep_token_id",
    "prefix_token_id", "suffix_token_id", "middle_token_id",
)  # fmt: skip
FIM_NAMES = (
    "<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<｜fim▁begin｜>", "<PRE>", "▁<PRE>",  # noqa: RUF001
    "<|code_prefix|>", "<|prefix|>",
    "<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<｜fim▁hole｜>", "<SUF>", "▁<SUF>",  # noqa: RUF001
    "<|code_suffix|>", "<|suffix|>",
    "<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<｜fim▁end｜>", "<MID>", "▁<MID>",  # noqa: RUF001
    "<|code_middle|>", "<|middle|>",
)  # fmt: skip
