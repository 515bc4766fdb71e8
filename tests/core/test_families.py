"""Every model family against the numpy oracle, on tiny models, and against itself.

F32 and F16 weights are compared as they are; for quantized weights the oracle rounds activations to
int8 as the engine documents. What is left is the rounding of float32: measured below 1e-4 of a
logit in F32.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from offload_models import MIXTURES
from oracle import Oracle
from oracle.forward import FAMILIES, SINK_TOKENS
from stoker.export.hf import names
from stoker.runtime import _core
from stoker.runtime.base.errors import ContextLengthError, ModelFileError, UnsupportedModelError
from tiny_models import N_TOKENS, VARIANTS, make, some_tokens, spec_of

Array = npt.NDArray[Any]
ROOT = Path(__file__).resolve().parents[2]
TOKENS = some_tokens(N_TOKENS)
CONTEXT = 256
F32_BOUND = 5e-4  # of a logit; logits reach about +-12
MIN_MARGIN = 1e-3  # of router logits: no expert choice hangs on rounding

# One dense and one mixture model of each kind of layer, for the tests that do not need them all.
FEW = ("llama", "qwen2moe", "qwen3moe-top3", "olmoe", "gemma3", "smallthinker-window")
BLOCK_FORMATS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "MXFP4")
K_FORMATS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS")
BUILD = Callable[..., Path]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> BUILD:
    """tiny(variant, quant="F32", **overrides) -> path of the model, written once a session."""
    folder = tmp_path_factory.mktemp("tiny")

    @cache
    def build(variant: str, quant: str = "F32", **overrides: Any) -> Path:
        family, shape = VARIANTS[variant]
        name = "-".join([variant, quant, *(f"{k}={v}" for k, v in overrides.items())])
        return make(folder / f"{name}.gguf", family, quant=quant, **{**shape, **overrides})

    return build


def open_engine(
    path: Path,
    *,
    threads: int = 1,
    kv_type: str = "f32",
    context: int = CONTEXT,
    precision: str = "balanced",
) -> _core.Engine:
    return _core.Engine(
        _core.GgufFile(str(path)),
        threads=threads,
        kv_type=kv_type,
        context=context,
        precision=precision,
    )


def all_logits(path: Path, tokens: Array = TOKENS, **options: Any) -> Array:
    return open_engine(path, **options).sequence().eval_all(tokens)


def same_bits(a: Array, b: Array) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


def same_best(a: Array, b: Array) -> float:
    return float((a.argmax(axis=-1) == b.argmax(axis=-1)).mean())


# THE list of families (arch/archs.inc), which these have rows of.


def test_every_family_has_its_rows() -> None:
    """Tiny models, oracle, conversion and README; tokenrouted files are made from llama's."""
    listed = set(_core.architectures())
    made = {"tokenrouted"}
    assert {spec_of(family).arch for family, _ in VARIANTS.values()} == listed - made
    assert listed == FAMILIES
    assert {family.architecture for family in names.FAMILIES} == listed - made
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    families = re.search(r"\*\*Families\*\*: (.*)", readme)
    assert families is not None
    assert [arch for arch in listed - made if not re.search(rf"\b{arch}\b", families[1])] == []


def test_every_mixture_is_offloaded() -> None:
    tested = {spec_of(VARIANTS[m.variant][0]).arch for m in MIXTURES.values()}
    assert tested == {spec_of(f).arch for f, _ in VARIANTS.values() if spec_of(f).mixture}


# Against the oracle.


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_the_oracle(tiny: BUILD, variant: str) -> None:
    path = tiny(variant)
    oracle = Oracle(path, context=CONTEXT)
    expected = oracle.logits(TOKENS)
    assert expected.std() > 1.0, "the model says nothing: the comparison would prove nothing"
    for r in oracle.routes:
        assert r.margin.min() > MIN_MARGIN, "a router hesitates: choose another seed"
    assert np.abs(all_logits(path) - expected).max() < F32_BOUND


@pytest.mark.parametrize("variant", ["llama", "llama-rope-freqs", "qwen3", "gemma3-window-37"])
def test_long_prompts_equal_the_oracle(tiny: BUILD, variant: str) -> None:
    """Beyond any chunk of a prompt, block of attention or tile of the cache."""
    path = tiny(variant, context=1024)
    tokens = some_tokens(1000, seed=1)
    actual = all_logits(path, tokens, context=1024)
    assert np.abs(actual - Oracle(path).logits(tokens)).max() < F32_BOUND


@pytest.mark.parametrize("variant", FEW)
@pytest.mark.parametrize("quant", ["F16", "BF16"])
def test_half_precision_weights_equal_the_oracle(tiny: BUILD, variant: str, quant: str) -> None:
    path = tiny(variant, quant)
    assert np.abs(all_logits(path) - Oracle(path).logits(TOKENS)).max() < F32_BOUND


def prompt_errors(path: Path, oracle: Oracle, precision: str, length: int) -> Array:
    """Largest logit error of each of 25 prompts of 4 tokens (33 of 3)."""
    engine = open_engine(path, precision=precision)
    prompts = TOKENS[: len(TOKENS) // length * length].reshape(-1, length)
    return np.array(
        [np.abs(engine.sequence().eval_all(t) - oracle.logits(t)).max() for t in prompts]
    )


# A value that lies between two int8 steps may be rounded the other way in float32 than in the
# oracle's float64, which moves all later tokens by about 0.1. That is rare: most short prompts must
# be exact, and a long one must remain close. Other rounding moves every prompt.
def check_one_term(
    path: Path, precision: str, bound: float, exact_share: float, length: int = 4
) -> None:
    oracle = Oracle(path, precision=precision)
    assert (prompt_errors(path, oracle, precision, length) < bound).mean() >= exact_share
    if precision == "fast":
        assert prompt_errors(path, Oracle(path), precision, length).min() > 0.05
    else:
        for sink_tokens in (SINK_TOKENS - 1, SINK_TOKENS + 1):
            other = Oracle(path, precision=precision, sink_tokens=sink_tokens)
            assert prompt_errors(path, other, precision, length).min() > bound
    expected, actual = oracle.logits(TOKENS), all_logits(path, precision=precision)
    assert same_best(actual, expected) >= 0.96  # measured: 0.98 to 1
    assert np.median(np.abs(actual - expected).max(axis=-1)) < 0.25  # measured: at most 0.15


@pytest.mark.parametrize("variant", ["llama", "qwen3moe"])
@pytest.mark.parametrize("quant", BLOCK_FORMATS + K_FORMATS)
def test_quantized_weights_equal_the_oracle(tiny: BUILD, variant: str, quant: str) -> None:
    check_one_term(tiny(variant, quant), "fast", F32_BOUND, 0.6)  # measured: 0.75 to 1


@pytest.mark.parametrize("variant", FEW)
def test_fast_precision_equals_the_oracle(tiny: BUILD, variant: str) -> None:
    path = tiny(variant, "Q8_0", embedding_quant="Q4_0")
    check_one_term(path, "fast", F32_BOUND, 0.8)  # measured: 0.92 to 1


@pytest.mark.parametrize("variant", FEW)
def test_balanced_precision_equals_the_oracle(tiny: BUILD, variant: str) -> None:
    path = tiny(variant, "Q8_0", embedding_quant="Q4_0")
    # The second terms' own steps are 1e-4 of a logit, and make more of the first ones undecided:
    # those of the third token, as the first two have both terms throughout.
    check_one_term(path, "balanced", 4 * F32_BOUND, 0.12, length=3)  # measured: 0.15 to 0.85


@pytest.mark.parametrize("variant", FEW)
def test_high_precision_equals_exact_activations(tiny: BUILD, variant: str) -> None:
    path = tiny(variant, "Q8_0", embedding_quant="Q4_0")
    expected, actual = Oracle(path).logits(TOKENS), all_logits(path, precision="high")
    error = np.abs(actual - expected).max(axis=-1)
    # Measured: at most 0.01 but for one token of smallthinker, whose router hesitated.
    assert (error < 0.03).mean() > 0.9


@pytest.mark.parametrize("variant", FEW)
def test_half_precision_cache_equals_the_oracle(tiny: BUILD, variant: str) -> None:
    path = tiny(variant)
    expected = Oracle(path, half_cache=True).logits(TOKENS)
    full = Oracle(path).logits(TOKENS)
    error = np.abs(all_logits(path, kv_type="f16") - expected).max(axis=-1)
    assert np.median(error) < np.median(np.abs(full - expected).max(axis=-1))
    assert error.max() < 0.05


@pytest.mark.parametrize("variant", FEW)
def test_hidden_states_equal_the_oracle(tiny: BUILD, variant: str) -> None:
    path = tiny(variant)
    sequence = open_engine(path).sequence()
    actual = sequence.eval_hidden(TOKENS)
    assert np.abs(actual - Oracle(path).hidden(TOKENS)).max() < F32_BOUND
    assert same_bits(sequence.hidden(), actual[-1])


# The oracle itself: an option that changed nothing would make its test worthless.
@pytest.mark.parametrize(
    ("variant", "base"),
    [
        ("llama-rope-freqs", "llama"),
        ("llama-linear", "llama"),
        ("llama-yarn-attn-factor", "llama"),
        ("llama-longrope-short", "llama"),
        ("llama-longrope-long", "llama-longrope-short"),
        ("llama-attention-softcap", "llama"),
        ("llama-attention-scale", "llama"),
        ("qwen2-yarn", "qwen2"),
        ("gemma3-global", "gemma3"),
        ("gemma3-linear", "gemma3"),
        ("gemma3-local-base", "gemma3"),
        ("gemma3-final-softcap", "gemma3"),
        ("gemma3-partial-rope", "gemma3"),
        ("smallthinker-window", "smallthinker-window-4096"),
        ("smallthinker-pattern-3", "smallthinker-window"),
    ],
)
def test_options_matter(tiny: BUILD, variant: str, base: str) -> None:
    a, b = Oracle(tiny(variant)).logits(TOKENS), Oracle(tiny(base)).logits(TOKENS)
    assert np.abs(a - b).max() > 100 * F32_BOUND


# Against itself, bit for bit.


def test_experts_in_single_tensors_give_the_same_bits(tiny: BUILD) -> None:
    assert same_bits(all_logits(tiny("mixtral-split")), all_logits(tiny("mixtral")))


INVARIANT = [
    *((variant, quant) for variant in FEW for quant in ("F32", "Q4_0")),
    ("llama", "F16"),
    ("llama", "Q4_K"),
    ("llama", "Q6_K"),
    ("qwen3moe", "Q4_K"),
    ("qwen3moe", "Q8_0"),
    ("smallthinker", "MXFP4"),
]


@pytest.mark.parametrize("kv_type", ["f32", "f16"])
@pytest.mark.parametrize(("variant", "quant"), INVARIANT)
def test_chunks_give_the_same_bits(tiny: BUILD, variant: str, quant: str, kv_type: str) -> None:
    engine = open_engine(tiny(variant, quant), threads=2, kv_type=kv_type)
    whole = engine.sequence().eval_all(TOKENS)
    single = engine.sequence()
    one_by_one = np.concatenate([single.eval_all(TOKENS[i : i + 1]) for i in range(N_TOKENS)])
    assert same_bits(one_by_one, whole)
    rng = np.random.default_rng(7)
    for _ in range(3):
        cuts = np.unique(rng.integers(1, N_TOKENS, rng.integers(1, 12)))
        sequence = engine.sequence()
        parts = [sequence.eval_all(part) for part in np.split(TOKENS, cuts)]
        assert same_bits(np.concatenate(parts), whole), f"chunks cut at {cuts}"


@pytest.mark.parametrize("variant", FEW)
def test_long_chunks_give_the_same_bits(tiny: BUILD, variant: str) -> None:
    engine = open_engine(tiny(variant, "Q4_0", context=1024), threads=2, context=1024)
    tokens = some_tokens(1000, seed=1)
    whole = engine.sequence().eval_all(tokens)
    for size in (1, 7, 64, 333):
        sequence = engine.sequence()
        parts = [sequence.eval_all(tokens[i : i + size]) for i in range(0, len(tokens), size)]
        assert same_bits(np.concatenate(parts), whole), f"chunks of {size}"


@pytest.mark.parametrize(("variant", "quant"), INVARIANT)
def test_threads_give_the_same_bits(tiny: BUILD, variant: str, quant: str) -> None:
    path = tiny(variant, quant)
    one = all_logits(path, threads=1)
    for threads in (2, 3):
        assert same_bits(all_logits(path, threads=threads), one)


@pytest.mark.parametrize(("variant", "quant"), INVARIANT)
def test_truncation_leaves_no_trace(tiny: BUILD, variant: str, quant: str) -> None:
    sequence = open_engine(tiny(variant, quant), kv_type="f16").sequence()
    whole = sequence.eval_all(TOKENS)
    for position in (70, 33, 1, 0):
        sequence.truncate(position)
        assert sequence.position == position
        sequence.eval(some_tokens(20, seed=position + 1))  # something else first
        sequence.truncate(position)
        assert same_bits(sequence.eval_all(TOKENS[position:]), whole[position:])


@pytest.mark.parametrize("variant", FEW)
def test_timelines_do_not_disturb_each_other(tiny: BUILD, variant: str) -> None:
    engine = open_engine(tiny(variant))
    other = some_tokens(N_TOKENS, seed=3)
    expected = [engine.sequence().eval_all(t) for t in (TOKENS, other)]
    a, b = engine.sequence(), engine.sequence()
    rows: tuple[list[Array], list[Array]] = ([], [])
    for i in range(0, N_TOKENS, 10):
        rows[0].append(a.eval_all(TOKENS[i : i + 10]))
        rows[1].append(b.eval_all(other[i : i + 10]))
    assert same_bits(np.concatenate(rows[0]), expected[0])
    assert same_bits(np.concatenate(rows[1]), expected[1])


@pytest.mark.parametrize("variant", FEW)
def test_eval_forms_agree(tiny: BUILD, variant: str) -> None:
    engine = open_engine(tiny(variant))
    whole = engine.sequence().eval_all(TOKENS)
    sequence = engine.sequence()
    sequence.eval(TOKENS)
    assert same_bits(sequence.logits(), whole[-1])
    assert sequence.position == N_TOKENS
    nll = engine.sequence().eval_nll(TOKENS)
    x = whole.astype(np.float64)
    x -= x.max(axis=-1, keepdims=True)
    logprobs = x - np.log(np.exp(x).sum(axis=-1, keepdims=True))
    expected = -logprobs[np.arange(N_TOKENS - 1), TOKENS[1:]]
    np.testing.assert_allclose(nll, expected, rtol=1e-5, atol=1e-5)


ISA_PROGRAM = """
import json, sys
import numpy as np
from stoker.runtime import _core
assert _core.active_isa() == sys.argv[1], _core.active_isa()
tokens = np.array(json.loads(sys.argv[2]), np.int32)
for path in sys.argv[3:]:
    engine = _core.Engine(_core.GgufFile(path), threads=2, context=256)
    engine.sequence().eval_all(tokens).tofile(path + "." + sys.argv[1])
"""


def test_instruction_sets_give_the_same_bits(tiny: BUILD) -> None:
    paths = [tiny(variant, quant) for variant, quant in INVARIANT]
    usable = [name for name, usable in _core.isas() if usable]
    assert "scalar" in usable
    results: dict[str, list[bytes]] = {}
    for isa in usable:
        tokens = json.dumps(TOKENS[:40].tolist())
        subprocess.run(
            [sys.executable, "-c", ISA_PROGRAM, isa, tokens, *map(str, paths)],
            env={**os.environ, "STOKER_ISA": isa},
            check=True,
            timeout=500,
        )
        results[isa] = [Path(f"{path}.{isa}").read_bytes() for path in paths]
    for isa in usable:
        for path, a, b in zip(paths, results[isa], results["scalar"], strict=True):
            assert a == b, f"{path.name}: {isa} differs from scalar"


def test_context_is_a_limit(tiny: BUILD) -> None:
    sequence = open_engine(tiny("llama"), context=64).sequence()
    sequence.eval(TOKENS[:60])
    before = sequence.logits()
    with pytest.raises(ContextLengthError):
        sequence.eval(TOKENS[:5])
    assert sequence.position == 60, "a refused evaluation must leave the sequence as it was"
    assert same_bits(sequence.logits(), before)
    sequence.eval(TOKENS[60:64])
    assert sequence.position == 64


# Models that are not quite the family's: refused in one line, never run without what is missing or
# as if they did not hold what is unknown.


def refused(path: Path, kind: type[Exception]) -> str:
    """The message of loading, which names the file first."""
    with pytest.raises(kind) as caught:
        open_engine(path)
    assert type(caught.value) is kind
    file, _, message = str(caught.value).partition(": ")
    assert file == str(path)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("variant", "missing"),
    [
        ("gemma3", "blk.6.post_attention_norm.weight"),
        ("gemma3", "blk.3.post_ffw_norm.weight"),
        ("gemma3", "blk.5.attn_q_norm.weight"),
        ("gemma3", "blk.6.attn_k_norm.weight"),
        ("qwen3", "blk.2.attn_q_norm.weight"),
        ("qwen3moe", "blk.2.attn_k_norm.weight"),
        ("olmoe", "blk.1.attn_q_norm.weight"),
        ("olmoe", "blk.2.attn_k_norm.weight"),
        ("smallthinker", "blk.3.ffn_gate_inp.weight"),
        ("qwen2moe", "blk.1.ffn_gate_inp_shexp.weight"),
        ("llama-longrope-short", "rope_factors_short.weight"),
        ("llama-longrope-short", "rope_factors_long.weight"),
        ("llama-longrope-long", "rope_factors_short.weight"),
    ],
)
def test_a_missing_tensor_is_named(tmp_path: Path, variant: str, missing: str) -> None:
    family, shape = VARIANTS[variant]
    path = make(tmp_path / "m.gguf", family, drop=[missing], **shape)
    message = refused(path, ModelFileError)
    assert message == f"tensor '{missing}': expected, found no such tensor"


@pytest.mark.parametrize("family", ["gemma3", "olmoe"])
def test_a_model_without_its_norms_is_refused(tmp_path: Path, family: str) -> None:
    """None in any layer, as another conversion of the family may write it."""
    norms = {
        "gemma3": ("post_attention_norm", "post_ffw_norm", "attn_q_norm", "attn_k_norm"),
        "olmoe": ("attn_q_norm", "attn_k_norm"),
    }[family]
    layers = spec_of(family).n_layer
    for norm in norms:
        names = [f"blk.{layer}.{norm}.weight" for layer in range(layers)]
        path = make(tmp_path / f"{norm}.gguf", family, drop=names)
        assert f"tensor '{names[0]}': expected, found" in refused(path, ModelFileError)


@pytest.mark.parametrize(
    ("variant", "unknown", "n"),
    [
        ("llama", "blk.0.attn_q_norm.weight", 16),
        ("llama", "blk.2.post_attention_norm.weight", 64),
        ("qwen2", "blk.1.attn_k_norm.weight", 16),
        ("mixtral", "blk.2.ffn_gate_inp_shexp.weight", 64),
        ("gemma3", "blk.1.ffn_gate_inp.weight", 64),
        ("smallthinker", "blk.3.post_ffw_norm.weight", 64),
        ("llama-yarn", "rope_factors_long.weight", 16),
    ],
)
def test_an_unknown_tensor_is_named(tmp_path: Path, variant: str, unknown: str, n: int) -> None:
    family, shape = VARIANTS[variant]
    path = make(tmp_path / "m.gguf", family, extra={unknown: n}, **shape)
    assert refused(path, UnsupportedModelError) == (
        f"tensor {unknown}: expected none of this name in architecture {spec_of(family).arch}, "
        f"found [{n}]"
    )


def test_smallthinker_without_experts_is_refused(tmp_path: Path) -> None:
    path = make(tmp_path / "m.gguf", "smallthinker", n_expert=0)
    message = refused(path, ModelFileError)
    assert message == "smallthinker.expert_count: expected at least 1, found 0"


def test_the_command_line_refuses_another_model(tmp_path: Path) -> None:
    missing = "blk.6.post_attention_norm.weight"
    path = make(tmp_path / "m.gguf", "gemma3", drop=[missing])
    done = subprocess.run(
        [sys.executable, "-m", "stoker.runtime.cli.main", "run", str(path), "hi"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    line = rf"stoker: error: .*m\.gguf: tensor '{re.escape(missing)}': expected, found .*\n"
    assert re.fullmatch(line, done.stderr)
