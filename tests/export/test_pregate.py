"""Pre-gated mixtures: experts chosen a layer ahead, by gates that learn from the routers."""

from __future__ import annotations

import errno
import json
import os
import struct
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
import stoker
from offload_models import BACKENDS, Model, TinyMixture, consistent, engine, prompt, run
from oracle import Oracle
from stoker.export.mixture import gates as gating
from stoker.export.mixture.gates import Agreement, Gate, Routing, fit_gates
from stoker.export.pregate import Pregated, pregate, resumable_part
from stoker.export.quantize import quantize
from stoker.offload.profile.profile import make_profile, measure, predictor_state
from stoker.offload.profile.profile_fit import Recording, Shape, fit_linear
from stoker.runtime import _core
from stoker.runtime.base.errors import (
    DeviceError,
    ModelFileError,
    OptionError,
    StokerError,
    UnsupportedModelError,
)
from stoker.runtime.cli.main import app
from tiny_models import N_TOKENS, VARIANTS, make, some_tokens
from typer.testing import CliRunner

Array = npt.NDArray[Any]
TOKENS = some_tokens(N_TOKENS)
TEXT = "the cat sat on the mat and the dog ran in the fog; you are the one who said it. " * 30
FAMILIES = {
    "mixtral": "llama",
    "mixtral-top4": "llama",
    "qwen2moe-top4": "qwen2moe",
    "qwen3moe-top3": "qwen3moe",
    "olmoe": "olmoe",
    "smallthinker": "smallthinker",
    "smallthinker-sigmoid": "smallthinker",
    "smallthinker-window": "smallthinker",
}
MIN_MARGIN = 2e-4  # least margin of scores: no choice depends on rounding (1e-5 of one)
Build = Callable[..., Path]


def quick(base: Path, out: Path, **options: Any) -> Pregated:
    """A pre-gated model made from little text."""
    chosen: dict[str, Any] = {"text": TEXT, "tokens": 400, "threads": 1}
    return pregate(base, out, **(chosen | options))


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """bases(variant) -> a mixture's path."""
    folder = tmp_path_factory.mktemp("bases")

    @cache
    def build(variant: str) -> Path:
        family, overrides = VARIANTS[variant]
        return make(folder / f"{variant}.gguf", family, **overrides)

    return build


@pytest.fixture(scope="module")
def pregated(bases: Build, tmp_path_factory: pytest.TempPathFactory) -> Build:
    """pregated(variant) -> the mixture pre-gated."""
    folder = tmp_path_factory.mktemp("pregated")
    return cache(lambda variant: quick(bases(variant), folder / f"{variant}.gguf").path)


def with_gates(path: Path, gates: Callable[[int, int, int], Gate]) -> Path:
    """Writes gates(layer, n_expert, n_embd) into a file."""
    tensors = {t.name: t for t in gguf.GGUFReader(str(path)).tensors}
    places = {}
    for name, t in tensors.items():
        if name.endswith("ffn_pregate.weight"):
            n_embd, n_expert = (int(n) for n in t.shape)
            gate = gates(int(name.split(".")[1]), n_expert, n_embd)
            places[int(t.data_offset)] = gate.weight
            places[int(tensors[name.replace("weight", "bias")].data_offset)] = gate.bias
    assert places
    with path.open("r+b") as file:
        for offset, values in places.items():
            file.seek(offset)
            file.write(np.ascontiguousarray(values, dtype=np.float32).tobytes())
    return path


def random_gate(layer: int, n_expert: int, n_embd: int) -> Gate:
    rng = np.random.default_rng([7, layer])
    weight = rng.standard_normal((n_expert, n_embd)) / np.sqrt(n_embd)
    return Gate(weight.astype(np.float32), rng.standard_normal(n_expert).astype(np.float32))


def logits(path: Path, tokens: Array = TOKENS, **options: Any) -> Array:
    options = {"threads": 1, "kv_type": "f32", "context": 256, **options}
    return _core.Engine(_core.GgufFile(str(path)), **options).sequence().eval_all(tokens)


# The engine's results.


@pytest.mark.parametrize("variant", FAMILIES)
def test_logits_equal_the_oracle(pregated: Build, tmp_path: Path, variant: str) -> None:
    path = tmp_path / "random.gguf"
    path.write_bytes(pregated(variant).read_bytes())
    with_gates(path, random_gate)
    oracle = Oracle(path)
    expected = oracle.logits(TOKENS)
    assert min(r.margin.min() for r in oracle.routes) > MIN_MARGIN, "choose another seed"
    assert np.abs(logits(path) - expected).max() <= 1e-3
    # Random choices change the result, so the engine obeys the gates.
    assert np.abs(expected - Oracle(pregated(variant)).logits(TOKENS)).max() > 0.1


def test_gates_have_no_say_where_all_experts_are_used(bases: Build, tmp_path: Path) -> None:
    """The layer's own router weighs all experts: the result is the base's, bit for bit."""
    base = bases("mixtral-all")
    out = with_gates(quick(base, tmp_path / "out.gguf").path, random_gate)
    assert logits(out).tobytes() == logits(base).tobytes()


@pytest.mark.parametrize("variant", ["mixtral", "olmoe", "smallthinker"])
def test_the_next_router_as_gate_equals_the_base(tmp_path: Path, variant: str) -> None:
    """Layer 0 of 2 adds nothing, so the next router's input is its own."""
    family, overrides = VARIANTS[variant]
    base = make(tmp_path / "base.gguf", family, **{**overrides, "n_layer": 2})
    tensors = {t.name: t for t in gguf.GGUFReader(str(base)).tensors}
    # Down projections of all experts and attention's output are 0; norms before the routers alike.
    parts = {"attn_output.weight": None, "ffn_down_exps.weight": None}
    with base.open("r+b") as file:
        for name in parts:
            t = tensors[f"blk.0.{name}"]
            file.seek(int(t.data_offset))
            file.write(bytes(int(t.n_bytes)))
        first, second = (tensors[f"blk.{i}.ffn_norm.weight"] for i in (0, 1))
        file.seek(int(first.data_offset))
        file.write(np.array(second.data).tobytes())
        # The second layer's attention adds nothing before its router either.
        t = tensors["blk.1.attn_output.weight"]
        file.seek(int(t.data_offset))
        file.write(bytes(int(t.n_bytes)))
    out = quick(base, tmp_path / "out.gguf").path
    router = np.array(tensors["blk.1.ffn_gate_inp.weight"].data)
    exact = with_gates(out, lambda _, n, d: Gate(router, np.zeros(n, np.float32)))
    assert logits(exact).tobytes() == logits(base).tobytes()
    assert logits(with_gates(out, random_gate)).tobytes() != logits(base).tobytes()


@pytest.mark.parametrize("variant", ["mixtral", "olmoe", "smallthinker", "smallthinker-sigmoid"])
def test_unlikely_experts_count_in_full(tmp_path: Path, variant: str) -> None:
    """All experts are the same, so only the sum of their weights can go wrong."""
    family, overrides = VARIANTS[variant]
    base = make(tmp_path / "base.gguf", family, **overrides)
    with base.open("r+b") as file:
        for t in gguf.GGUFReader(str(base)).tensors:
            values = np.array(t.data)
            if "_exps" in t.name:
                values[:] = values[0]
            elif "ffn_gate_inp" in t.name:
                values *= 20  # nearly all others' probabilities are below the least sum
            file.seek(int(t.data_offset))
            file.write(values.tobytes())
    out = quick(base, tmp_path / "out.gguf").path
    with_gates(out, random_gate)
    np.testing.assert_allclose(logits(out), Oracle(out).logits(TOKENS), atol=1e-3)
    if "sigmoid" not in variant:  # there the base's own sums can be below 1
        np.testing.assert_allclose(logits(out), logits(base), atol=1e-3)


def test_a_constant_gate_chooses_always_the_same(pregated: Build, tmp_path: Path) -> None:
    path = tmp_path / "constant.gguf"
    path.write_bytes(pregated("qwen3moe-top3").read_bytes())

    def constant(layer: int, n_expert: int, n_embd: int) -> Gate:
        bias = np.zeros(n_expert, np.float32)
        bias[[layer, layer + 2, layer + 5]] = 1.0
        return Gate(np.zeros((n_expert, n_embd), np.float32), bias)

    with_gates(path, constant)
    e = engine(path, 1 << 30)
    e.record_routing(True)
    e.sequence().eval(prompt(e))
    routing = e.take_routing()
    for layer in (1, 2):
        chosen = set(routing["expert"][routing["layer"] == layer].tolist())
        assert chosen == {layer - 1, layer + 1, layer + 4}
    assert len(set(routing["expert"][routing["layer"] == 0].tolist())) > 3
    # The routers weigh the experts, and the best come first.
    ordered = routing["weight"][routing["layer"] == 1].reshape(-1, 3)
    assert (np.diff(ordered, axis=1) <= 0).all() and ordered.std(axis=0).min() > 0.01


@pytest.mark.parametrize("variant", FAMILIES)
def test_pieces_of_a_prompt_do_not_matter(pregated: Build, variant: str) -> None:
    e = engine(pregated(variant))
    expected = run(e)
    for pieces in (3, 60):
        assert run(e, pieces=pieces) == expected
    assert run(engine(pregated(variant), threads=2)) == expected


@pytest.fixture(scope="module")
def mixtures(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Model]:
    """mixtures(variant) -> a quantized pre-gated model, with what it computes resident."""

    @cache
    def build(variant: str) -> Model:
        folder = tmp_path_factory.mktemp(variant)
        base = TinyMixture(variant, "Q8_0").write(folder)
        out = quick(base, folder / "pregated.gguf").path
        return Model(with_gates(out, random_gate) if variant == "olmoe" else out)

    return build


@pytest.mark.parametrize("variant", ["mixtral-top4", "qwen2moe", "olmoe", "smallthinker-window"])
@pytest.mark.parametrize("predictor", ["none", "next_gate", "history"])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_offloaded_equals_resident(
    mixtures: Callable[[str], Model], variant: str, predictor: str, share: float
) -> None:
    model = mixtures(variant)
    for prefetch in ("on", "auto") if predictor != "none" else ("off",):
        e = model.offloaded(share, predictor=predictor, prefetch=prefetch)
        assert run(e) == model.expected()
        counts = e.offload
        consistent(counts)
        if predictor == "none":
            assert counts["prefetches"] == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_backends_give_the_same(mixtures: Callable[[str], Model], backend: str) -> None:
    model = mixtures("mixtral-top4")
    assert run(model.offloaded(0.2, io=backend)) == model.expected()


def test_announced_experts_are_asked_for_in_time(mixtures: Callable[[str], Model]) -> None:
    """With room to keep them, hardly any expert is missed after the first layer."""
    model = mixtures("mixtral-top4")
    found = {}
    for prefetch in ("off", "on"):
        e = model.offloaded(0.6, predictor="next_gate", prefetch=prefetch, io="pread_pool")
        run(e)
        found[prefetch] = e.offload
    assert found["on"]["prefetches_used"] > 0
    assert found["on"]["decode_misses"] < found["off"]["decode_misses"] / 2


# The file.


def test_all_else_is_the_base(bases: Build, pregated: Build) -> None:
    mine, base = (gguf.GGUFReader(str(f("qwen2moe-top4"))) for f in (pregated, bases))
    found, theirs = ({t.name: t for t in r.tensors} for r in (mine, base))
    new = [name for name in found if name not in theirs]
    assert new == [f"blk.{i}.ffn_pregate.{part}" for i in (0, 1) for part in ("weight", "bias")]
    for name, t in theirs.items():
        assert found[name].tensor_type == t.tensor_type
        assert found[name].data.tobytes() == t.data.tobytes()
    for key, field in base.fields.items():
        renamed = key.replace("qwen2moe.", "pregated-qwen2moe.")
        if not key.startswith(("GGUF.", "general.")):
            assert mine.fields[renamed].contents() == field.contents()
    file = _core.GgufFile(str(pregated("qwen2moe-top4")))
    assert file.get("general.architecture") == "pregated-qwen2moe"
    assert file.get("qwen2moe.block_count") is None
    assert engine(Path(file.path)).config["pregated"] is True


def test_shards_become_one_file(bases: Build, tmp_path: Path) -> None:
    base = TinyMixture("mixtral", shard_tensors=7).write(tmp_path / "shards")
    one = quick(bases("mixtral"), tmp_path / "one.gguf").path
    out = quick(base, tmp_path / "out.gguf").path
    assert logits(out).tobytes() == logits(one).tobytes()


def test_a_pregated_file_can_be_quantized(pregated: Build, tmp_path: Path) -> None:
    made = quantize(pregated("mixtral"), tmp_path / "q8.gguf", type="Q8_0")
    types = {t.name: t.type for t in _core.GgufFile(str(made.path)).tensors}
    assert types["blk.0.ffn_pregate.weight"] == types["blk.0.ffn_gate_inp.weight"] == "F32"
    assert types["blk.0.ffn_gate_exps.weight"] == "Q8_0"
    assert (logits(made.path).argmax(-1) == logits(pregated("mixtral")).argmax(-1)).mean() > 0.8


def test_llama_cpp_refuses_it(pregated: Build) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="needs llama-cpp-python")
    with pytest.raises(ValueError, match="Failed to load model"):
        llama_cpp.Llama(str(pregated("mixtral")), verbose=False)


def test_the_same_call_gives_the_same_bytes(bases: Build, pregated: Build, tmp_path: Path) -> None:
    again = quick(bases("mixtral"), tmp_path / "again.gguf").path
    assert again.read_bytes() == pregated("mixtral").read_bytes()


def test_an_interrupted_call_is_taken_up_again(
    bases: Build, pregated: Build, tmp_path: Path
) -> None:
    out = tmp_path / "out.gguf"

    def interrupt(what: str, done: int, total: int | None) -> None:
        if what == "tensors":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quick(bases("mixtral"), out, progress=interrupt)
    assert not out.exists() and resumable_part(out) is not None
    seen = set()
    made = quick(bases("mixtral"), out, progress=lambda what, *_: seen.add(what))
    assert "gates" not in seen and "tensors" in seen
    assert out.read_bytes() == pregated("mixtral").read_bytes()
    assert made.perplexity > 1
    assert [p.name for p in tmp_path.iterdir()] == ["out.gguf"]


# The fit.


def routing_of(rng: np.random.Generator, layers: int, sigmoid: bool) -> Routing:
    # Logits are a few units: if all sigmoids were 1, nothing would be left to choose.
    routers = {i: 0.1 * rng.standard_normal((12, 24), np.float32) for i in range(layers)}
    return Routing(routers, 3, sigmoid)


@pytest.mark.parametrize("sigmoid", [False, True])
def test_gates_find_what_a_linear_map_can_tell(sigmoid: bool) -> None:
    rng = np.random.default_rng(1)
    routing = routing_of(rng, 3, sigmoid)
    x = rng.standard_normal((4000, 24)) * np.linspace(0.1, 9, 24)  # columns of different sizes
    turn = rng.standard_normal((2, 24, 24)) / np.sqrt(24) / 3
    states = np.stack([x, x @ turn[0] + 0.3, (x @ turn[0] + 0.3) @ turn[1]]).astype(np.float16)
    gates = fit_gates(states[:, :3000], routing, seconds=60, seed=0)
    for a in gating.agreement(states[:, 3000:], routing, gates):
        assert a.found > 0.9 and a.weight > 0.99 and a.kl < 0.02, a


def test_distilling_beats_regression_where_weights_are_peaked() -> None:
    """Regression towards logits spends its effort on experts that no token uses."""
    rng = np.random.default_rng(2)
    routing = Routing({i: 4 * rng.standard_normal((12, 24), np.float32) for i in (0, 1)}, 2, False)
    x = rng.standard_normal((6000, 24))
    later = np.maximum(x @ rng.standard_normal((24, 24)) / 5, 0)  # not a linear map
    states = np.stack([x, later]).astype(np.float16)
    kept = states[:, 5000:]

    def fit(seconds: float) -> Agreement:
        gates = fit_gates(states[:, :5000], routing, seconds=seconds, seed=0)
        return gating.agreement(kept, routing, gates)[0]

    regression, distilled = fit(0.0), fit(60.0)
    assert distilled.weight > regression.weight + 0.005
    assert distilled.kl < regression.kl / 1.1


def test_the_report_counts_what_the_model_chose(bases: Build, tmp_path: Path) -> None:
    made = quick(bases("mixtral"), tmp_path / "out.gguf", test_text=TEXT[:700])
    assert [g.layer for g in made.gates] == [1, 2]
    oracle = Oracle(made.path)
    model = stoker.load(made.path, threads=1, context=256)
    tokens = model.tokenizer.encode(TEXT[:700], add_special=False, parse_special=False)
    tokens = tokens[: made.held_out]
    expected = oracle.logits(tokens)
    top = expected.max(axis=-1, keepdims=True)
    log_p = expected - top - np.log(np.exp(expected - top).sum(axis=-1, keepdims=True))
    nll = -np.mean([log_p[i, t] for i, t in enumerate(tokens[1:])])
    assert made.perplexity == pytest.approx(np.exp(nll), rel=1e-3)
    assert made.base_perplexity != made.perplexity
    for g in made.gates:
        assert 2 / 8 < g.found <= 1 and g.found < g.weight <= 1 and g.kl > 0


def test_the_model_can_write_the_text(bases: Build, tmp_path: Path) -> None:
    made = quick(bases("mixtral"), tmp_path / "out.gguf", text=None, tokens=600)
    assert made.tokens + made.held_out >= 600 and made.perplexity > 1


# Hints only.


def test_hints_leave_the_model_alone(bases: Build, tmp_path: Path) -> None:
    base = bases("mixtral")
    (tmp_path / "text.txt").write_text(TEXT)
    out = tmp_path / "hints.profile"
    arguments = ["export", "pregate", str(base), str(out), "--hint-only", "--text"]
    result = CliRunner().invoke(app, [*arguments, str(tmp_path / "text.txt"), "--json"])
    assert result.exit_code == 0, result.output
    assert {r["predictor"] for r in json.loads(result.stdout)["recalls"]} == {"next_gate", "linear"}
    file = _core.GgufFile(str(base))
    model = Model(base)
    hinted = engine(
        base,
        model.budgets.whole + out.stat().st_size,
        predictor="linear",
        predictor_state=predictor_state(out, "linear", file),
    )
    assert run(hinted) == model.expected()


def test_distilled_hints_find_more() -> None:
    """Regression towards peaked logits spends its effort on a few tokens' extremes."""
    rng = np.random.default_rng(3)
    n, n_embd, shape = 4000, 24, Shape(2, 24, 12, 2)
    hidden = rng.standard_normal((3, n, n_embd)).astype(np.float16)
    routers = rng.standard_normal((2, 12, n_embd), np.float32)
    logits = (hidden[:2].astype(np.float32) @ routers.transpose(0, 2, 1)) ** 5 / 1e3
    experts = np.argsort(-logits, axis=2, kind="stable")[:, :, :2].transpose(1, 0, 2)
    recording = Recording(
        shape, hidden, logits, experts.astype(np.int32), 0 * routers, np.zeros(n, dtype=bool)
    )
    found = []
    for seconds in (0.0, 60.0):
        state = fit_linear(recording.part(0, 3000), 1, seconds=seconds)
        recalls = measure(recording.part(3000, n), {"linear": state}, (2,), (1,))
        found.append(next(r.layers[1] for r in recalls if r.predictor == "linear"))
    assert found[0] is not None and found[1] is not None
    assert found[1] > found[0] + 0.02


def test_a_pregated_model_needs_no_profile(pregated: Build, tmp_path: Path) -> None:
    model = stoker.load(pregated("mixtral"), threads=1, context=256)
    with pytest.raises(OptionError, match="known without a profile"):
        make_profile(model, tmp_path / "p.profile", text=TEXT)


# The command.


def test_the_command_shows_the_cost(bases: Build, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    out = tmp_path / "out.gguf"
    arguments = ["export", "pregate", str(bases("mixtral")), str(out)]
    arguments += ["--text", str(tmp_path / "text.txt"), "--tokens", "400"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "perplexity " in result.stdout and " -> " in result.stdout
    assert out.exists()
    again = CliRunner().invoke(app, [*arguments, "--force", "--json"])
    report = json.loads(again.stdout)
    assert report["nbytes"] == out.stat().st_size and len(report["gates"]) == 2
    refused = CliRunner().invoke(app, arguments)
    assert refused.exit_code != 0 and "--force" in str(refused.exception)


# Bad input.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"minutes": 0.0}, "minutes: expected more than 0, found 0.0"),
        ({"minutes": float("nan")}, "minutes: expected more than 0, found nan"),
        ({"tokens": 10}, "tokens: expected at least 256, found 10"),
        ({"text": "too short"}, "text: expected at least 256 tokens"),
        ({"test_text": "x"}, "some to measure on"),
    ],
)
def test_bad_options(bases: Build, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        quick(bases("mixtral"), tmp_path / "out.gguf", **options)
    assert not list(tmp_path.iterdir())


def refused_base(base: Path, out: Path, error: type[StokerError], message: str) -> None:
    with pytest.raises(error, match=message):
        quick(base, out)
    assert not [p for p in out.parent.iterdir() if p != base]


def test_models_that_cannot_be_pregated(bases: Build, pregated: Build, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    dense = make(tmp_path / "dense.gguf", "llama")
    refused_base(dense, out, UnsupportedModelError, "mixture of experts in at least 2 layers")
    dense.unlink()
    one = make(tmp_path / "one.gguf", "llama-moe", n_layer=1)
    refused_base(one, out, UnsupportedModelError, "at least 2 layers, found 1")
    one.unlink()
    gemma = make(tmp_path / "gemma.gguf", "gemma3")
    refused_base(gemma, out, UnsupportedModelError, "expected one of llama, .* found gemma3")
    gemma.unlink()
    refused_base(pregated("mixtral"), out, UnsupportedModelError, "found pregated-llama")


def test_weights_that_are_not_finite(tmp_path: Path) -> None:
    for name, message in (
        ("blk.1.ffn_gate_inp.weight", "blk.1.ffn_gate_inp.weight has values that are not finite"),
        ("blk.0.ffn_norm.weight", "computes values that are not finite"),
    ):
        base = make(tmp_path / "base.gguf", "llama-moe")
        tensor = next(t for t in gguf.GGUFReader(str(base)).tensors if t.name == name)
        with base.open("r+b") as file:
            file.seek(int(tensor.data_offset))
            file.write(struct.pack("<f", float("nan")))
        refused_base(base, tmp_path / "out.gguf", ModelFileError, message)


def rewritten(path: Path, out: Path, change: Callable[[dict[str, Any]], Mapping[str, Any]]) -> Path:
    """Rewrites the file with other tensors; change: name -> values to the same."""
    reader = gguf.GGUFReader(str(path))
    writer = gguf.GGUFWriter(str(out), str(reader.fields["general.architecture"].contents()))
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            kind = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], kind)
    for name, values in change({t.name: np.array(t.data) for t in reader.tensors}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def test_damaged_pregated_files(bases: Build, pregated: Build, tmp_path: Path) -> None:
    path, out = pregated("mixtral"), tmp_path / "out.gguf"
    same = rewritten(path, out, lambda t: t)
    assert logits(same).tobytes() == logits(path).tobytes()
    gate = "blk.1.ffn_pregate.weight"
    without = rewritten(path, out, lambda t: {n: v for n, v in t.items() if n != gate})
    with pytest.raises(ModelFileError, match=gate):
        engine(without)
    wrong = rewritten(path, out, lambda t: t | {gate: t[gate][:4]})
    with pytest.raises(ModelFileError, match=r"ffn_pregate.weight: expected shape \[64, 8\]"):
        engine(wrong)
    extra = rewritten(path, out, lambda t: t | {"blk.2.ffn_pregate.weight": t[gate]})
    with pytest.raises(UnsupportedModelError, match=r"ffn_pregate\.weight: expected none"):
        engine(extra)
    # An ordinary model has no gates.
    stray = rewritten(bases("mixtral"), out, lambda t: t | {gate: t["blk.1.ffn_gate_inp.weight"]})
    with pytest.raises(UnsupportedModelError, match="expected none of this name"):
        engine(stray)
    # Gates with values that are not finite still choose experts that exist.
    same = rewritten(path, out, lambda t: t)
    with_gates(same, lambda i, n, d: Gate(np.full((n, d), np.nan), np.zeros(n)))
    assert np.isfinite(logits(same)).all()


@pytest.mark.parametrize("room", [1_000_000, 2_000_000])
def test_a_full_disk_leaves_nothing(
    bases: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    """Either the file does not fit, or it does and the hidden states do not."""
    allocate, given = os.posix_fallocate, 0

    def full(descriptor: int, offset: int, nbytes: int) -> None:
        nonlocal given
        given += nbytes
        if given > room:
            raise OSError(errno.ENOSPC, "No space left on device")
        allocate(descriptor, offset, nbytes)

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(DeviceError, match="no space left in"):
        quick(bases("mixtral"), tmp_path / "out.gguf", tokens=2500, text=TEXT * 4)
    assert not list(tmp_path.iterdir())
