"""Predictors: what they find, what they keep, and the profiles that teach them."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import stoker
from offload_models import CONTEXT, MIXTURES, Model, engine, prompt, run
from stoker.offload.profile import profile as profiles
from stoker.offload.profile.profile_fit import Recording, Shape, fit_linear, map_bytes
from stoker.offload.profile.profile_path import fit_path
from stoker.runtime import _core
from stoker.runtime.base import errors
from stoker.runtime.cli import main as cli

SHAPE = Shape(n_layer=4, n_embd=48, n_expert=16, n_expert_used=2)
LEARNING = ("linear", "path", "transition", "oracle")
TEXT = "the cat sat on the mat and the dog ran in the fog while it was hot; " * 60


def recording(
    experts: npt.NDArray[np.int32],
    hidden: npt.NDArray[np.float32] | None = None,
    logits: npt.NDArray[np.float32] | None = None,
    routers: npt.NDArray[np.float32] | None = None,
) -> Recording:
    """Of one sequence; experts [tokens, n_layer, used]."""
    n = len(experts)
    s = SHAPE
    if hidden is None:
        hidden = np.ones((s.n_layer + 1, n, s.n_embd), np.float32)
    if logits is None:
        logits = np.zeros((s.n_layer, n, s.n_expert), np.float32)
    if routers is None:
        routers = np.zeros((s.n_layer, s.n_expert, s.n_embd), np.float32)
    first = np.zeros(n, bool)
    first[0] = True
    return Recording(s, hidden.astype(np.float16), logits, experts, routers, first)


def recall(
    predictor: str, state: bytes, r: Recording, *, distance: int = 1, width: int = 2, skip: int = 0
) -> list[float]:
    """Of each layer."""
    found = _core.replay_predictor(
        predictor,
        state=state,
        hidden=r.hidden.astype(np.float32),
        experts=r.experts,
        routers=r.routers,
        distance=distance,
        width=width,
        count_from=skip,
    )
    return [f / a for f, a in zip(found["found"], found["asked"], strict=True)]


def learnt(predictor: str, r: Recording) -> bytes:
    """The state after a replay."""
    state = _core.replay_predictor(
        predictor,
        state=b"",
        hidden=r.hidden.astype(np.float32),
        experts=r.experts,
        routers=r.routers,
        distance=1,
        width=1,
    )["state"]
    assert isinstance(state, bytes)
    return state


def chosen(rng: np.random.Generator, n: int) -> npt.NDArray[np.int32]:
    """[n, 2] pairs of different experts."""
    a = rng.integers(0, 16, n)
    return np.stack([a, (a + rng.integers(1, 16, n)) % 16], axis=1).astype(np.int32)


def following(rng: np.random.Generator, n: int, rule: npt.NDArray[np.int64]) -> Any:
    """Experts [n, n_layer, 2]: each layer's are rule[those of the layer before]."""
    layers = [chosen(rng, n)]
    for _ in range(SHAPE.n_layer - 1):
        layers.append(rule[layers[-1]].astype(np.int32))
    return np.stack(layers, axis=1)


def oracle_of(experts: npt.NDArray[np.int32]) -> bytes:
    """State of the oracle for decoded tokens."""
    n, layers, used = experts.shape
    token, layer, rank = (i.ravel() for i in np.indices((n, layers, used)))
    columns = {
        "evaluation": token,
        "tokens": np.ones_like(token),
        "token": np.zeros_like(token),
        "layer": layer,
        "rank": rank,
        "expert": experts.ravel(),
    }
    return profiles.oracle_state(columns, SHAPE)


# --- transition -----------------------------------------------------------------------------------


def test_transition_learns_which_experts_follow() -> None:
    rng = np.random.default_rng(0)
    r = recording(following(rng, 1200, rng.permutation(16)))
    assert min(recall("transition", b"", r, skip=600)[1:]) > 0.97
    assert min(recall("transition", b"", r, distance=2, skip=600)[2:]) > 0.97
    # Of chance there is nothing to learn.
    by_chance = recording(np.stack([chosen(rng, 1200) for _ in range(4)], axis=1))
    assert max(recall("transition", b"", by_chance, skip=600)) < 0.25


def test_transition_looks_two_layers_back() -> None:
    rng = np.random.default_rng(1)
    experts = following(rng, 1200, rng.permutation(16))
    # Layers 2 and 3 follow 0 and 1; layer 1 has nothing to do with layer 0.
    experts[:, 1] = chosen(rng, 1200)
    experts[:, 3] = rng.permutation(16)[experts[:, 1]]
    found = recall("transition", b"", recording(experts), skip=600)
    assert found[1] < 0.25
    assert min(found[2:]) > 0.9


def test_transition_forgets_what_is_no_longer_so() -> None:
    rng = np.random.default_rng(2)
    before, after = (following(rng, 3000, rng.permutation(16)) for _ in range(2))
    r = recording(np.concatenate([before, after]))
    assert min(recall("transition", b"", r, skip=5400)[1:]) > 0.95


def test_transition_is_saved_and_loaded() -> None:
    rng = np.random.default_rng(3)
    rule = rng.permutation(16)
    state = learnt("transition", recording(following(rng, 600, rule)))
    fresh = recording(following(rng, 40, rule))
    assert min(recall("transition", state, fresh)[1:]) > 0.95
    assert max(recall("transition", b"", fresh)) < 0.7


# --- linear ---------------------------------------------------------------------------------------


def linear_recording(rng: np.random.Generator, n: int) -> Recording:
    """Every router reads the same states through a rotation that next_gate does not know."""
    s = SHAPE
    x = rng.standard_normal((n, s.n_embd)).astype(np.float32)
    x /= np.sqrt(np.mean(np.square(x), axis=1, keepdims=True))
    secret = np.random.default_rng(99)
    true = secret.standard_normal((s.n_layer, s.n_expert, s.n_embd)).astype(np.float32)
    routers = secret.standard_normal(true.shape).astype(np.float32)
    # Of the last layer, the router itself is right.
    routers[3] = true[3]
    logits = np.einsum("nd,led->lne", x, true)
    experts = np.argsort(-logits, axis=2)[:, :, :2].transpose(1, 0, 2).astype(np.int32)
    hidden = np.broadcast_to(x, (s.n_layer + 1, n, s.n_embd))
    return recording(np.ascontiguousarray(experts), hidden, logits, routers)


def test_linear_finds_what_the_next_router_cannot() -> None:
    rng = np.random.default_rng(4)
    state = fit_linear(linear_recording(rng, 1500), 3)
    fresh = linear_recording(rng, 300)
    assert min(recall("linear", state, fresh)) > 0.93  # the first from the embedding
    assert min(recall("linear", state, fresh, distance=3)[2:]) > 0.93
    gate = recall("next_gate", b"", fresh)
    assert gate[0] == 0
    assert max(gate[1:3]) < 0.3
    assert gate[3] > 0.95


def test_linear_starts_from_the_router_where_that_is_right() -> None:
    # Fewer tokens than a state has values: only the router itself can tell.
    rng = np.random.default_rng(5)
    state = fit_linear(linear_recording(rng, 40), 1)
    found = recall("linear", state, linear_recording(rng, 300))
    assert found[3] > 0.9
    assert found[2] < 0.7


def test_linear_takes_states_of_any_size() -> None:
    rng = np.random.default_rng(6)
    state = fit_linear(linear_recording(rng, 600), 1)
    fresh = linear_recording(rng, 100)
    scaled = Recording(
        fresh.shape,
        (fresh.hidden.astype(np.float32) * 100).astype(np.float16),
        fresh.logits,
        fresh.experts,
        fresh.routers,
        fresh.first,
    )
    assert recall("linear", state, scaled) == pytest.approx(
        recall("linear", state, fresh), abs=0.02
    )


def test_states_that_are_not_numbers_are_survived() -> None:
    rng = np.random.default_rng(7)
    r = linear_recording(rng, 300)
    states = {"linear": fit_linear(r, 2), "path": fit_path(r), "next_gate": b""}
    r.hidden[:, ::3] = np.nan
    r.hidden[:, 1::3] = np.inf
    for predictor, state in states.items():
        found = recall(predictor, state, r, width=16)
        assert all(f == 1 for f in found[1:]), predictor  # whatever the order: all are named


# --- path -----------------------------------------------------------------------------------------


def path_recording(rng: np.random.Generator, n: int) -> Recording:
    """A token's word decides the first two layers, the token before the last two."""
    secret = np.random.default_rng(98)
    words = secret.standard_normal((20, SHAPE.n_embd)).astype(np.float32)
    words /= np.sqrt(np.mean(np.square(words), axis=1, keepdims=True))
    routes = np.stack([chosen(secret, 20) for _ in range(4)], axis=1)
    word = rng.integers(0, 20, n)
    experts = routes[word]
    experts[1:, 2:] = routes[word[:-1], 2:]
    hidden = np.ones((SHAPE.n_layer + 1, n, SHAPE.n_embd), np.float32)
    hidden[0] = words[word]
    return recording(np.ascontiguousarray(experts), hidden)


def test_path_foresees_all_layers_from_the_token_and_the_one_before() -> None:
    rng = np.random.default_rng(8)
    r = path_recording(rng, 3000)
    state = fit_path(r)
    fresh = path_recording(rng, 400)
    for distance in (1, 3):
        found = recall("path", state, fresh, distance=distance)
        assert min(found[distance - 1 :]) > 0.9, (distance, found)
    assert fit_path(r) == state  # the seed decides everything


# --- oracle ---------------------------------------------------------------------------------------


def test_oracle_knows_everything_until_it_is_contradicted() -> None:
    rng = np.random.default_rng(9)
    experts = np.stack([chosen(rng, 50) for _ in range(4)], axis=1)
    state = oracle_of(experts)
    assert recall("oracle", state, recording(experts)) == [1.0] * 4
    assert recall("oracle", state, recording(experts), distance=3)[2:] == [1.0, 1.0]
    other = experts.copy()
    other[10, 2] = (other[10, 2] + 1) % 16
    # Token 10's layer 2 was still guessed, wrongly; what came before was right.
    found = recall("oracle", state, recording(other))
    assert found[0] == found[1] == pytest.approx(11 / 50)
    assert 10 / 50 <= found[2] <= 11 / 50
    assert found[3] == pytest.approx(10 / 50)
    # A run that goes on longer than the record.
    longer = np.concatenate([experts, experts[:5]])
    assert recall("oracle", state, recording(longer)) == [pytest.approx(50 / 55)] * 4


# --- states ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def states() -> dict[str, bytes]:
    rng = np.random.default_rng(10)
    r = linear_recording(rng, 300)
    return {
        "linear": fit_linear(r, 2),
        "path": fit_path(r),
        "transition": learnt("transition", r),
        "oracle": oracle_of(r.experts[:20]),
    }


def load(predictor: str, state: bytes, shape: Shape = SHAPE) -> Any:
    """The predictor's state after loading `state`, without a token."""
    s = shape
    return _core.replay_predictor(
        predictor,
        state=state,
        hidden=np.zeros((s.n_layer + 1, 0, s.n_embd), np.float32),
        experts=np.zeros((0, s.n_layer, s.n_expert_used), np.int32),
        routers=np.zeros((s.n_layer, s.n_expert, s.n_embd), np.float32),
        distance=1,
        width=1,
    )["state"]


@pytest.mark.parametrize("predictor", LEARNING)
def test_what_is_loaded_can_be_saved(states: dict[str, bytes], predictor: str) -> None:
    assert load(predictor, states[predictor]) == states[predictor]


@pytest.mark.parametrize("predictor", LEARNING)
def test_a_state_of_something_else_is_refused(states: dict[str, bytes], predictor: str) -> None:
    state = states[predictor]
    other = states["path" if predictor == "linear" else "linear"]
    for wrong, message in (
        (other, f"predictor {predictor}: expected a state of its own, found one of"),
        (b"GGUF" + state[4:], "found something else"),
        (state[:4] + struct.pack("<I", 2) + state[8:], "expected version 1, found 2"),
        (state + b"\0", "expected its end, found 1 more"),
    ):
        with pytest.raises(errors.OptionError, match=message):
            load(predictor, wrong)
    for part in (Shape(5, 48, 16, 2), Shape(4, 32, 16, 2), Shape(4, 48, 8, 2), Shape(4, 48, 16, 3)):
        with pytest.raises(errors.OptionError, match="expected one of a model with"):
            load(predictor, state, part)
    for length in [*range(1, 70), *np.linspace(70, len(state) - 1, 40, dtype=int)]:
        with pytest.raises(errors.OptionError):
            load(predictor, state[:length])


@pytest.mark.parametrize("predictor", LEARNING)
def test_damaged_states_are_refused_or_harmless(states: dict[str, bytes], predictor: str) -> None:
    rng = np.random.default_rng(11)
    r = linear_recording(rng, 6)
    for _ in range(300):
        state = bytearray(states[predictor])
        for at in rng.integers(0, min(len(state), rng.choice([80, len(state)])), 3):
            state[at] = rng.integers(0, 256)
        try:
            recall(predictor, bytes(state), r)
        except errors.OptionError:
            continue


@pytest.mark.parametrize("predictor", ["linear", "path", "oracle"])
def test_without_a_profile_the_command_is_named(predictor: str) -> None:
    with pytest.raises(errors.OptionError, match=f"predictor {predictor}: .*`stoker profile`"):
        load(predictor, b"")


def test_predictors_that_learn_nothing_take_no_state(states: dict[str, bytes]) -> None:
    for predictor in ("next_gate", "pre_attention"):
        with pytest.raises(errors.OptionError, match="learns nothing"):
            load(predictor, states["linear"])


def test_replay_refuses_arrays_that_disagree() -> None:
    good: dict[str, Any] = {
        "hidden": np.zeros((5, 3, 48), np.float32),
        "experts": np.zeros((3, 4, 2), np.int32),
        "routers": np.zeros((4, 16, 48), np.float32),
        "distance": 1,
        "width": 1,
    }
    _core.replay_predictor("next_gate", state=b"", **good)
    for wrong in (
        {"hidden": np.zeros((4, 3, 48), np.float32)},
        {"experts": np.zeros((2, 4, 2), np.int32)},
        {"experts": np.full((3, 4, 2), 16, np.int32)},
        {"routers": np.zeros((4, 1, 48), np.float32)},
        {"distance": 0},
        {"width": 0},
    ):
        with pytest.raises(errors.OptionError):
            _core.replay_predictor("next_gate", state=b"", **(good | wrong))
    for predictor in ("none", "crystal_ball"):
        with pytest.raises(errors.OptionError):
            _core.replay_predictor(predictor, state=b"", **good)


# --- in the engine --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(MIXTURES["olmoe"].write(tmp_path_factory.mktemp("mixture")))


@pytest.fixture(scope="module")
def early(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(MIXTURES["smallthinker"].write(tmp_path_factory.mktemp("early")))


def test_hidden_taps_are_what_routers_read_before_their_norm(mixture: Model, early: Model) -> None:
    for model in (mixture, early):
        e = model.resident
        tokens = prompt(e, 3, 70)
        taps, hidden = e.sequence().eval_hidden_taps(tokens)
        np.testing.assert_array_equal(taps, e.sequence().eval_taps(tokens))
        assert hidden.shape == (taps.shape[0] + 1, *taps.shape[1:])
        if e.config["routes_early"]:
            # The first router reads the embeddings themselves.
            np.testing.assert_array_equal(taps[0], hidden[0])
            continue
        for layer in range(len(taps)):
            norm = e.routers[layer][1]
            unit = (
                hidden[layer + 1]
                / np.sqrt(np.mean(np.square(hidden[layer + 1]), 1) + 1e-5)[:, None]
            )
            np.testing.assert_allclose(taps[layer], unit * norm, rtol=1e-3, atol=1e-4)


def test_the_recorded_experts_are_those_that_the_engine_uses(mixture: Model, early: Model) -> None:
    for model in (mixture, early):
        tokens = prompt(model.resident, 4, 120)
        loaded = stoker.load(model.path, threads=1, context=CONTEXT)
        made = profiles.record(loaded, [tokens.tolist()], str(model.path.parent))
        e = engine(model.path, model.budgets.whole)
        e.record_routing(True)
        e.sequence().eval(tokens)
        t = e.take_routing()
        used = np.full(made.experts.shape, -1)
        first = int(t["evaluation"].min())
        assert (t["evaluation"] == first).all()  # one chunk
        used[t["token"], t["layer"], t["rank"]] = t["expert"]
        assert (np.sort(used, 2) == np.sort(made.experts, 2)).mean() > 0.995


def test_an_oracle_wastes_nothing(mixture: Model) -> None:
    e = mixture.offloaded(0.3, predictor="oracle", prefetch="on")
    assert run(e) == mixture.expected()
    counts = e.offload
    assert counts["prefetches"] > 0
    assert counts["prefetches_used"] + counts["cancelled"] == counts["prefetches"]


def test_what_transition_learnt_goes_on(mixture: Model) -> None:
    e = mixture.offloaded(0.3, predictor="transition")
    cold = e.predictor_state()
    run(e)
    state = e.predictor_state()
    assert state != cold
    budget = mixture.budgets.part(0.5) + len(state)
    again = engine(mixture.path, budget, predictor="transition", predictor_state=state)
    assert again.predictor_state() == state
    assert run(again) == mixture.expected()


def test_pre_attention_reads_ahead_only_where_routers_come_early(
    mixture: Model, early: Model
) -> None:
    for model, some in ((mixture, False), (early, True)):
        e = model.offloaded(0.3, predictor="pre_attention", prefetch="on")
        run(e)
        counts = e.offload
        assert (counts["prefetches"] > 0) == some
        assert counts["prefetches_used"] == counts["prefetches"] - counts["cancelled"]


def test_none_takes_no_state(mixture: Model) -> None:
    with pytest.raises(errors.OptionError, match="no profile"):
        engine(mixture.path, mixture.budgets.whole, predictor="none", predictor_state=b"x")


# --- profiles -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(mixture: Model, tmp_path_factory: pytest.TempPathFactory) -> profiles.Profile:
    model = stoker.load(mixture.path, threads=1, context=CONTEXT)
    out = tmp_path_factory.mktemp("profile") / "m.profile"
    return profiles.make_profile(model, out, text=TEXT, tokens=700)


def test_a_profile_beats_the_next_gate(made: profiles.Profile) -> None:
    mean = {(r.predictor, r.distance): r.mean for r in made.recalls if r.width == 4}
    assert mean["linear", 1] is not None
    assert mean["next_gate", 1] is not None
    assert mean["linear", 1] > mean["next_gate", 1]
    assert made.nbytes == made.path.stat().st_size
    assert [p.name for p in made.path.parent.iterdir()] == ["m.profile"]


def test_profiles_are_reproducible(mixture: Model, made: profiles.Profile, tmp_path: Path) -> None:
    model = stoker.load(mixture.path, threads=1, context=CONTEXT)
    again = profiles.make_profile(model, tmp_path / "m.profile", text=TEXT, tokens=700)
    assert again.path.read_bytes() == made.path.read_bytes()


@pytest.mark.parametrize("predictor", profiles.PREDICTORS)
def test_models_load_profiles(mixture: Model, made: profiles.Profile, predictor: str) -> None:
    state = profiles.predictor_state(made.path, predictor, _core.GgufFile(str(mixture.path)))
    budget = mixture.budgets.part(0.3) + len(state)
    e = engine(
        mixture.path, budget, predictor=predictor, predictor_state=state, prefetch="on", threads=2
    )
    assert e.predictor_state() == state
    assert run(e) == mixture.expected()


def test_profiles_of_something_else_are_refused(
    mixture: Model, early: Model, made: profiles.Profile, tmp_path: Path
) -> None:
    file = _core.GgufFile(str(mixture.path))
    content = made.path.read_bytes()
    bad = tmp_path / "bad"

    def refused(message: str, content: bytes, predictor: str = "linear") -> None:
        bad.write_bytes(content)
        with pytest.raises(errors.OptionError, match=message):
            profiles.predictor_state(bad, predictor, file)

    refused("expected a profile", b"GGUF")
    refused("expected a profile", b"")
    refused("damaged", content[:12])
    refused("damaged", content[:100])
    refused("damaged", content[:-1], "transition")
    flipped = bytearray(content)
    flipped[-100] ^= 1
    refused("damaged", bytes(flipped), "transition")
    refused("expected one of the predictors", content, "next_gate")
    with pytest.raises(errors.OptionError, match="found one of another model"):
        profiles.predictor_state(made.path, "linear", _core.GgufFile(str(early.path)))
    with pytest.raises(errors.OptionError, match="No such file"):
        profiles.predictor_state(tmp_path / "absent", "linear", file)
    profiles.write_profile(
        bad, model={}, routers=profiles.routers_digest(file), states={"transition": b"x"}
    )
    with pytest.raises(errors.OptionError, match="with linear, found transition"):
        profiles.predictor_state(bad, "linear", file)


def test_an_unwritable_profile_leaves_nothing(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    target.mkdir()
    with pytest.raises(errors.DeviceError):
        profiles.write_profile(target, model={}, routers="", states={"linear": b"x"})
    assert list(tmp_path.iterdir()) == [target]


def test_maps_are_padded_to_whole_blocks() -> None:
    rows = np.random.default_rng(0).standard_normal((3, 40)).astype(np.float32)
    data = np.frombuffer(map_bytes(rows), np.uint8)
    read = _core.dequantize("Q8_0", data, 3 * 64).reshape(3, 64)
    np.testing.assert_allclose(read[:, :40], rows, atol=0.02)
    assert (read[:, 40:] == 0).all()


def test_profile_command(
    mixture: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "m.profile"
    text.write_text(TEXT)
    command = ["profile", str(mixture.path), "--text", str(text), "--out", str(out)]
    command += ["-n", "400", "-c", str(CONTEXT), "--predictor", "linear,transition"]
    assert cli.main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {r["predictor"] for r in found["recalls"]} == {"next_gate", "linear", "transition"}
    assert cli.main(command) == 2
    assert "--force" in capsys.readouterr().err
    assert cli.main([*command, "--force"]) == 0
    table = capsys.readouterr().out
    assert "4 wide, 1 ahead" in table
    assert table.count("linear") == 1
    for wrong, message in (
        (["--predictor", "next_gate"], "expected all, or some of"),
        (["--tokens", "12"], "expected 256 to"),
        (["--text", str(tmp_path / "absent")], "absent"),
        (["--out", str(tmp_path / "no" / "m.profile")], "no such directory"),
    ):
        assert cli.main([*command, "--force", *wrong]) == 2
        assert message in capsys.readouterr().err


def test_dense_models_have_no_profile(tmp_path: Path) -> None:
    from tiny_models import make

    model = stoker.load(make(tmp_path / "dense.gguf", "llama"), threads=1)
    with pytest.raises(errors.OptionError, match="no routers"):
        profiles.make_profile(model, tmp_path / "p", text=TEXT)
