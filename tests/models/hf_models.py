"""Tiny random Hugging Face folders of every family, saved by transformers, and their tokenizers.

    build("qwen3moe", folder)          # one of VARIANTS; returns the torch model

Weights are drawn wide enough that every part of a layer moves the logits.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tiny_models
from stoker.export import hf_to_gguf
from stoker.export.hf import names

Array = npt.NDArray[Any]

N_VOCAB = 340  # above the tokenizer's: the rest are unused tokens
TOKENS = np.random.default_rng(0).integers(0, N_VOCAB, 96, dtype=np.int32)

_SIZES: dict[str, Any] = {
    "vocab_size": N_VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_MOE: dict[str, Any] = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_OLMOE: dict[str, Any] = {"num_experts": 6, "num_experts_per_tok": 2, "norm_topk_prob": False}
_GEMMA: dict[str, Any] = {
    "num_hidden_layers": 7,
    "head_dim": 32,
    "query_pre_attn_scalar": 32,
    "sliding_window": 16,
    "tie_word_embeddings": True,
}


def _scaled(kind: str, **values: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **values}}


_LLAMA3 = _scaled(
    "llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
_YARN = _scaled("yarn", factor=4.0, original_max_position_embeddings=64)

# name -> (class of the config, class of the model, overrides of _SIZES)
VARIANTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {}),
    "llama-tied-mha": (
        "LlamaConfig",
        "LlamaForCausalLM",
        {"tie_word_embeddings": True, "num_key_value_heads": 4},
    ),
    "llama-biases": ("LlamaConfig", "LlamaForCausalLM", {"attention_bias": True, "head_dim": 32}),
    "llama-llama3": ("LlamaConfig", "LlamaForCausalLM", _LLAMA3),
    "llama-linear": ("LlamaConfig", "LlamaForCausalLM", _scaled("linear", factor=4.0)),
    "llama-yarn": ("LlamaConfig", "LlamaForCausalLM", _YARN),
    "llama-yarn-factor": (
        "LlamaConfig",
        "LlamaForCausalLM",
        _scaled("yarn", factor=8.0, original_max_position_embeddings=64, attention_factor=1.4),
    ),
    "mistral": ("MistralConfig", "MistralForCausalLM", {"head_dim": 32, "sliding_window": None}),
    "mixtral": (
        "MixtralConfig",
        "MixtralForCausalLM",
        {"num_local_experts": 6, "num_experts_per_tok": 2, "sliding_window": None},
    ),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {"tie_word_embeddings": True}),
    "qwen2-yarn": ("Qwen2Config", "Qwen2ForCausalLM", _YARN),
    "qwen2moe": (
        "Qwen2MoeConfig",
        "Qwen2MoeForCausalLM",
        {**_MOE, "shared_expert_intermediate_size": 48, "norm_topk_prob": False},
    ),
    "qwen2moe-dense-layer": (
        "Qwen2MoeConfig",
        "Qwen2MoeForCausalLM",
        {**_MOE, "shared_expert_intermediate_size": 48, "mlp_only_layers": [1]},
    ),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {"head_dim": 32}),
    "qwen3-biases": ("Qwen3Config", "Qwen3ForCausalLM", {"head_dim": 32, "attention_bias": True}),
    "qwen3moe": (
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        {**_MOE, "norm_topk_prob": True, "head_dim": 32},
    ),
    "olmoe": ("OlmoeConfig", "OlmoeForCausalLM", {**_OLMOE, "num_key_value_heads": 4}),
    "olmoe-gqa": ("OlmoeConfig", "OlmoeForCausalLM", _OLMOE),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", _GEMMA),
    "gemma3-initialized": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {**_GEMMA, "initializer_range": 0.04},
    ),
    "gemma3-pattern": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {
            **_GEMMA,
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "query_pre_attn_scalar": 64,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
            },
            "final_logit_softcapping": 5.0,
        },
    ),
}

_GLM: dict[str, Any] = {
    "head_dim": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "attention_bias": True,
    "routed_scaling_factor": 1.5,
}
VARIANTS["glm4moe"] = ("Glm4MoeConfig", "Glm4MoeForCausalLM", _GLM)
VARIANTS["glm4moe-head-norms"] = (
    "Glm4MoeConfig",
    "Glm4MoeForCausalLM",
    {**_GLM, "use_qk_norm": True, "n_group": 4, "topk_group": 2, "n_shared_experts": 2},
)

# Whose weights are as transformers initializes them; those of the others are drawn wider.
AS_INITIALIZED = frozenset({"gemma3-initialized"})


def architecture(variant: str) -> str:
    """GGUF's name of a variant's family."""
    _, model_class, _ = VARIANTS[variant]
    return next(f.architecture for f in names.FAMILIES if model_class in f.classes)


def build(variant: str, folder: Path, dtype: Any = None, **sizes: Any) -> Any:
    """Saves a variant with the tiny byte-level tokenizer; returns the model.

    dtype: torch's, None is float32. sizes: over those of the variant.
    """
    import torch
    import transformers

    config_class, model_class, overrides = VARIANTS[variant]
    torch.manual_seed(1)
    config = getattr(transformers, config_class)(
        **{**_SIZES, **overrides, **sizes}, attn_implementation="eager"
    )
    model = getattr(transformers, model_class)(config).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if variant in AS_INITIALIZED:
                break
            noise = torch.randn(value.shape)
            if value.ndim > 1:
                value.copy_(noise * (1.6 / value.shape[-1] ** 0.5))
            elif name.endswith("bias"):
                value.copy_(noise * 0.3)
            else:  # norms
                value.add_(noise * 0.15)
    if dtype is not None:
        model = model.to(dtype)
    model.save_pretrained(folder)
    save_byte_level(folder)
    return model


def logits(model: Any, tokens: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
    """[n, n_vocab] of transformers."""
    import torch

    with torch.no_grad():
        ids = torch.from_numpy(tokens.astype(np.int64))[None]
        return np.asarray(model(ids, use_cache=False).logits[0].float())


_saved: dict[str, tuple[Path, npt.NDArray[np.float32]]] = {}
_root = tempfile.TemporaryDirectory(prefix="stoker-hf-")


def saved(variant: str) -> tuple[Path, npt.NDArray[np.float32]]:
    """(a variant's folder, not to be changed; transformers' logits on TOKENS), made once."""
    if variant not in _saved:
        folder = Path(_root.name) / variant
        _saved[variant] = folder, logits(build(variant, folder), TOKENS)
    return _saved[variant]


# Sizes of whole 256-weight blocks.
WIDE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4}


def saved_as(variant: str, name: str, dtype: Any, **sizes: Any) -> Path:
    """The folder `name` of a variant with other sizes and another torch dtype, made once."""
    folder = Path(_root.name) / name
    if not folder.exists():
        build(variant, folder, dtype=dtype, **sizes)
    return folder


def byte_level() -> dict[str, Any]:
    """tokenizer.json of the tiny byte-level vocabulary, with Qwen's pattern."""
    tokens, merges = tiny_models.vocabulary()
    special = tiny_models.SPECIAL
    vocab = {t: i for i, t in enumerate(tokens)}
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
        r"\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    byte = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    return {
        "version": "1.0",
        "added_tokens": [
            {
                "id": vocab[t],
                "content": t,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for t in special
        ],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": pattern},
                    "behavior": "Isolated",
                    "invert": False,
                },
                {**byte, "use_regex": False},
            ],
        },
        "post_processor": None,
        "decoder": {**byte, "use_regex": False},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": vocab,
            "merges": merges,
        },
    }


def save_byte_level(folder: Path, tokenizer: dict[str, Any] | None = None) -> None:
    """The tokenizer's files and the chat template."""
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer or byte_level()))
    bos, _, eos = tiny_models.SPECIAL
    settings = {
        "add_bos_token": False,
        "bos_token": bos,
        "eos_token": {"__type": "AddedToken", "content": eos},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text(tiny_models.CHAT_TEMPLATE)


def save_sentencepiece(folder: Path, *, keep_model: bool) -> Any:
    """A SentencePiece BPE vocabulary trained on a few lines, as transformers saves Llama's.

    keep_model: with tokenizer.model; else tokenizer.json alone. Returns the SentencePiece model.
    """
    import sentencepiece
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

    lines = folder / "lines.txt"
    rng = np.random.default_rng(3)
    words = "the quick brown fox jumps over a lazy dog while stokers feed furnaces ahead of fire"
    picked = [" ".join(rng.choice(words.split(), 9)) + "." for _ in range(400)]
    lines.write_text("\n".join([*picked, "Été, 123 cafés! ночь 中文 don't\ttab"] * 2))
    sentencepiece.SentencePieceTrainer.train(
        input=str(lines),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=N_VOCAB,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        character_coverage=0.999,
        hard_vocab_limit=False,
        user_defined_symbols=["<tool>"],
        minloglevel=2,
    )
    lines.unlink()
    (folder / "tokenizer.vocab").unlink()
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    pieces = [model.id_to_piece(i) for i in range(len(model))]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    # Every way to cut a piece in two is a merge; the best-scored piece comes first.
    cuts = [
        (-model.get_score(i), vocab[p[:k]], vocab[p[k:]], p[:k], p[k:])
        for p, i in vocab.items()
        if not (model.is_control(i) or model.is_unknown(i) or model.is_byte(i) or p == "<tool>")
        for k in range(1, len(p))
        if p[:k] in vocab and p[k:] in vocab
    ]
    library = Tokenizer(
        models.BPE(
            vocab,
            [(left, right) for *_, left, right in sorted(cuts)],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    library.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    library.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    library.add_special_tokens(["<unk>", "<s>", "</s>"])
    library.add_tokens([AddedToken("<tool>", normalized=False)])
    library.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocab["<s>"])]
    )
    library.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if not keep_model:
        (folder / "tokenizer.model").unlink()
    return model


def smallthinker(folder: Path, *, window: int, softmax: bool) -> dict[str, Array]:
    """A SmallThinker folder (transformers has no such class); returns its weights."""
    from safetensors.numpy import save_file

    n, width, experts, n_ff, head = 5, 64, 8, 48, 16
    rng = np.random.default_rng(5)

    def matrix(rows: int, cols: int, gain: float = 1.5) -> Array:
        return (rng.standard_normal((rows, cols)) * gain / np.sqrt(cols)).astype(np.float32)

    def norm() -> Array:
        return (1 + 0.15 * rng.standard_normal(width)).astype(np.float32)

    weights = {
        "model.embed_tokens.weight": matrix(N_VOCAB, width, 3.0),
        "model.norm.weight": norm(),
    }
    for il in range(n):
        b = f"model.layers.{il}."
        weights[b + "input_layernorm.weight"] = norm()
        weights[b + "post_attention_layernorm.weight"] = norm()
        for part, (rows, cols) in {
            "q": (4 * head, width),
            "k": (2 * head, width),
            "v": (2 * head, width),
            "o": (width, 4 * head),
        }.items():
            weights[f"{b}self_attn.{part}_proj.weight"] = matrix(rows, cols)
        weights[b + "block_sparse_moe.primary_router.weight"] = matrix(experts, width, 0.4)
        for e in range(experts):
            x = f"{b}block_sparse_moe.experts.{e}."
            weights[x + "gate.weight"] = matrix(n_ff, width)
            weights[x + "up.weight"] = matrix(n_ff, width)
            weights[x + "down.weight"] = matrix(width, n_ff)
    layout = [int(bool(window) and il % 4 != 0) for il in range(n)]
    config = {
        "architectures": ["SmallThinkerForCausalLM"],
        "hidden_size": width,
        "num_hidden_layers": n,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": head,
        "vocab_size": N_VOCAB,
        "max_position_embeddings": 512,
        "moe_ffn_hidden_size": n_ff,
        "moe_num_primary_experts": experts,
        "moe_num_active_primary_experts": 3,
        "moe_primary_router_apply_softmax": softmax,
        "rope_theta": 10000.0,
        "rope_layout": layout if window else [1] * n,
        "sliding_window_layout": layout,
        "sliding_window_size": window,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors")
    save_byte_level(folder)
    return weights


def in_shards(folder: Path, to: Path, n: int = 3) -> Path:
    """A copy of a folder with its tensors spread over n shards, and an index."""
    from safetensors.numpy import load_file, save_file

    copied(folder, to)
    weights = load_file(to / "model.safetensors")
    (to / "model.safetensors").unlink()
    names = sorted(weights, key=lambda name: hashlib.sha256(name.encode()).digest())
    where: dict[str, str] = {}
    for i in range(n):
        file = f"model-{i + 1:05}-of-{n:05}.safetensors"
        save_file({name: weights[name] for name in names[i::n]}, to / file)
        where |= dict.fromkeys(names[i::n], file)
    (to / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return to


def copied(folder: Path, to: Path) -> Path:
    """A copy of a folder's files that a test may spoil."""
    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def refused(folder: Path, out: Path, kind: type[Exception], **options: Any) -> str:
    """The message, one line; nothing may be left beside the output."""
    with pytest.raises(kind) as caught:
        hf_to_gguf.convert(folder, out, **options)
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    assert not list(out.parent.glob(f"*{out.name}*"))
    return str(caught.value)
