"""The trace simulator against an independent brute force, pinned counts, and hostile files."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from stoker.offload.trace.simulate import policy_names, predictor_names, simulate, slots_of_share
from stoker.offload.trace.trace import DECODE, Trace, TraceWriter, read_trace, write_trace
from stoker.runtime.base.errors import OptionError
from stoker.runtime.cli import simulate as simulate_command

EXCERPT = Path(__file__).parents[1] / "data" / "route_excerpt.csv.gz"


def small_trace(seed: int, *, prompt: int = 0, tokens: int = 40) -> Trace:
    """Skewed random routing: 3 layers, 8 experts, 2 used."""
    rng = random.Random(seed)
    layers, experts, used = 3, 8, 2
    visits: list[tuple[int, int, int, list[int]]] = []
    chunks = ([list(range(prompt))] if prompt else []) + [[t] for t in range(prompt, tokens)]
    for number, chunk in enumerate(chunks):
        for layer in range(layers):
            for token in chunk:
                chosen: list[int] = []
                while len(chosen) < used:
                    expert = min(rng.randrange(experts), rng.randrange(experts))
                    if expert not in chosen:
                        chosen.append(expert)
                visits.append((number, layer, token, chosen))
    return Trace(
        layers,
        experts,
        used,
        np.array([v[0] for v in visits], np.int64),
        np.array([v[1] for v in visits], np.int32),
        np.array([v[2] for v in visits], np.int64),
        np.arange(0, used * len(visits) + 1, used, np.int64),
        np.array([e for v in visits for e in v[3]], np.int32),
        np.full(used * len(visits), 0.5, np.float32),
        np.array([len(chunk) == 1 for chunk in chunks]),
        np.array([len(chunk) for chunk in chunks], np.int64),
    )


Unit = tuple[int, int]
Request = tuple[int, list[list[Unit]]]  # evaluation; the units of each token


def requests(trace: Trace) -> list[Request]:
    out: list[Request] = []
    last = None
    for v, layer in enumerate(trace.layer.tolist()):
        key = (int(trace.evaluation[v]), layer)
        if key != last:
            out.append((key[0], []))
            last = key
        experts = trace.expert[trace.offset[v] : trace.offset[v + 1]].tolist()
        out[-1][1].append([(layer, e) for e in experts])
    return out


def brute_force(trace: Trace, slots: int, policy: str) -> int:
    """Misses, by lists and sorting: nothing shared with the core but the rules."""
    asked = requests(trace)
    cache: list[Unit] = []  # in order of insertion
    last: dict[Unit, int] = {}
    count: dict[Unit, float] = {}
    visited: set[Unit] = set()
    hand: Unit | None = None
    clock = misses = 0
    halvings = 0
    for index, (evaluation, tokens) in enumerate(asked):
        for i, units in enumerate(tokens):
            epoch = (int(trace.tokens[:evaluation].sum()) + i) // 16
            if epoch != halvings:
                count = {u: c / 2.0 ** (epoch - halvings) for u, c in count.items()}
                halvings = epoch
            for unit in units:
                clock += 1
                last[unit] = clock
                count[unit] = count.get(unit, 0.0) + 1
                if unit in cache:
                    visited.add(unit)
        needed = list(dict.fromkeys(u for units in tokens for u in units))
        missing = [u for u in needed if u not in cache]
        misses += len(missing)
        for unit in missing:
            if len(cache) == slots:
                free = [u for u in cache if u not in needed]
                if policy == "lru":
                    leaver = min(free, key=lambda u: last[u])
                elif policy == "lfu":
                    leaver = min(free, key=lambda u: (count[u], last[u]))
                elif policy == "belady":

                    def next_use(u: Unit, after: int = index) -> int:
                        later = range(after + 1, len(asked))
                        return next(
                            (j for j in later if any(u in us for us in asked[j][1])), len(asked)
                        )

                    leaver = max(free, key=next_use)
                else:  # sieve
                    at = cache.index(hand) if hand in cache else 0
                    while cache[at] not in free or cache[at] in visited:
                        if cache[at] in free:
                            visited.discard(cache[at])
                        at = (at + 1) % len(cache)
                    leaver = cache[at]
                    hand = cache[at + 1] if at + 1 < len(cache) else None
                cache.remove(leaver)
                visited.discard(leaver)
            cache.append(unit)
    return misses


@pytest.mark.parametrize("policy", ["lru", "lfu", "sieve", "belady"])
@pytest.mark.parametrize("slots", [2, 5, 9, 17, 24])
@pytest.mark.parametrize("seed", range(4))
def test_brute_force_counts_the_same(policy: str, slots: int, seed: int) -> None:
    trace = small_trace(seed)
    found = simulate(trace, slots, policies=[policy], skip=0).policies[0]
    assert found.misses == brute_force(trace, slots, policy)
    assert found.uses == trace.expert.size


@pytest.mark.parametrize("policy", ["lru", "sieve", "belady"])
def test_prompt_asks_once_a_chunk(policy: str) -> None:
    trace = small_trace(7, prompt=6)
    found = simulate(trace, 12, policies=[policy], skip=0).policies[0]
    assert found.misses == brute_force(trace, 12, policy)
    assert found.uses < trace.expert.size


def hand_trace(tmp_path: Path, experts: str) -> Trace:
    """One layer, one expert a token: the textbook's reference string."""
    path = tmp_path / "hand.csv"
    rows = [f"{i},decode,0,0,{e},1" for i, e in enumerate(experts)]
    path.write_text("\n".join(["step,phase,layer,slot,expert,weight", *rows]) + "\n")
    return read_trace(path)


def test_by_hand(tmp_path: Path) -> None:
    # The reference string of Belady's anomaly with 3 slots: 10 faults with LRU, 7 with MIN.
    trace = hand_trace(tmp_path, "012301401234")
    at = simulate(trace, 3, skip=0)
    misses = {result.policy: result.misses for result in at.policies}
    assert misses["lru"] == 10
    assert misses["belady"] == 7
    assert all(count >= 7 for count in misses.values())


@pytest.mark.parametrize("policy", policy_names())
def test_every_policy_is_sane(policy: str) -> None:
    trace = small_trace(3, prompt=10, tokens=120)
    everything = trace.n_layer * trace.n_expert
    touched = len(set(zip(np.repeat(trace.layer, 2).tolist(), trace.expert.tolist(), strict=True)))
    full = simulate(trace, everything, policies=[policy], skip=0).policies[0]
    assert full.misses == touched
    least = simulate(trace, 10, policies=["belady"], skip=0).policies[-1].misses
    for _ in range(2):  # deterministic
        some = simulate(trace, 10, policies=[policy], skip=0).policies[0]
        assert least <= some.misses < some.uses
        assert sum(some.layer_misses) == some.misses
    assert simulate(trace, 1, policies=[policy], skip=0).policies[0].misses > 0  # in waves


def test_reuse_follows_a_repeated_path() -> None:
    # Three sets of experts in turn, too large together for the cache: LRU misses always.
    n, layers = 200, 4
    expert = np.array([(t % 3) * 2 + k for t in range(n) for _ in range(layers) for k in (0, 1)])
    visits = n * layers
    trace = Trace(
        layers,
        8,
        2,
        np.repeat(np.arange(n), layers).astype(np.int64),
        np.tile(np.arange(layers), n).astype(np.int32),
        np.repeat(np.arange(n), layers).astype(np.int64),
        np.arange(0, 2 * visits + 1, 2, np.int64),
        expert.astype(np.int32),
        np.full(2 * visits, 0.5, np.float32),
        np.ones(n, np.bool_),
        np.ones(n, np.int64),
    )
    at = simulate(trace, 16, policies=["lru", "reuse"])
    lru, reuse, _ = at.policies
    assert lru.hit_rate == 0
    assert reuse.gap_closed is not None and reuse.gap_closed > 0.25


SHARED = ["qwen3-30b-a3b.route.csv.gz", "kimi-linear-48b.jsonl.gz", "gpt-oss-120b.route.csv.gz"]
# Misses of lru, lfu, lfru, sieve, belady at 15, 25 and 40% of the experts, prompts included, from
# the second quarter on. Without prompts LRU hits .662/.841/.953 and Belady .842/.935/.964 on qwen3.
MISSES = {
    SHARED[0]: [
        (11444, 10872, 10336, 15610, 5327),
        (5435, 5358, 5041, 7809, 2136),
        (1793, 1630, 1659, 1897, 773),
    ],
    SHARED[1]: [
        (18540, 17881, 16758, 24485, 9791),
        (12392, 11916, 11447, 16882, 6128),
        (7356, 7089, 6470, 8880, 3081),
    ],
    SHARED[2]: [
        (1454, 1382, 1392, 1463, 633),
        (1064, 898, 930, 1060, 500),
        (636, 567, 567, 639, 500),
    ],
}


def test_recorded_traces(shared_data: Path) -> None:
    gaps = []
    for name in SHARED:
        trace = read_trace(shared_data / "traces" / name)
        for share, pinned in zip((0.15, 0.25, 0.4), MISSES[name], strict=True):
            at = simulate(trace, slots_of_share(trace, share))
            found = {result.policy: result for result in at.policies}
            names = ("lru", "lfu", "lfru", "sieve", "belady")
            assert tuple(found[n].misses for n in names) == pinned
            # The default's arithmetic is floating point: bounded, not pinned.
            assert found["reuse"].misses < found["lru"].misses
            gaps.append(found["reuse"].gap_closed or 0.0)
    assert sum(gaps) / len(gaps) > 0.25


def test_published_table(shared_data: Path) -> None:
    trace = read_trace(shared_data / "traces" / SHARED[0]).without_prompts()
    for share, lru, belady in ((0.15, 0.662, 0.842), (0.25, 0.841, 0.935), (0.4, 0.953, 0.964)):
        at = simulate(trace, slots_of_share(trace, share), policies=["lru"])
        assert [round(result.hit_rate, 3) for result in at.policies] == [lru, belady]


def test_excerpt() -> None:
    trace = read_trace(EXCERPT)
    assert (trace.n_layer, trace.n_expert, trace.n_expert_used) == (6, 128, 6)
    at = simulate(trace, slots_of_share(trace, 0.25))
    found = {result.policy: result.misses for result in at.policies}
    assert {n: found[n] for n in EXCERPT_MISSES} == EXCERPT_MISSES
    assert found["belady"] <= found["reuse"] < found["lru"]
    for name in ("lru", "lfu", "sieve"):
        cold = simulate(trace, 192, policies=[name], skip=0).policies[0]
        assert cold.misses == brute_force(trace, 192, name)


EXCERPT_MISSES = {"lru": 861, "lfu": 780, "lfru": 765, "sieve": 942, "belady": 371}


@pytest.mark.parametrize("name", ["trace.csv", "trace.csv.gz"])
def test_round_trip(tmp_path: Path, name: str) -> None:
    trace = small_trace(1, prompt=5)
    write_trace(tmp_path / name, trace)
    again = read_trace(tmp_path / name)
    for field in ("evaluation", "layer", "step", "offset", "expert", "weight", "decode", "tokens"):
        assert np.array_equal(getattr(trace, field), getattr(again, field)), field
    assert list(tmp_path.iterdir()) == [tmp_path / name]


def test_transitions_are_foreseen_and_counted() -> None:
    # Layer 1 takes what layer 0 took, plus 8; layer 0 is random. 3 slots: nothing stays.
    rng = np.random.default_rng(6)
    n, used = 600, 2
    first = np.stack([rng.choice(8, used, False) for _ in range(n)])
    expert = np.stack([first, first + 8], 1)  # [n][layer][used]
    visits = 2 * n
    trace = Trace(
        2,
        16,
        used,
        np.repeat(np.arange(n), 2),
        np.tile(np.arange(2, dtype=np.int32), n),
        np.repeat(np.arange(n), 2),
        np.arange(visits + 1) * used,
        expert.reshape(-1).astype(np.int32),
        np.full(visits * used, 0.5, np.float32),
        np.full(n, True),
        np.full(n, 1),
    )
    lru = simulate(trace, 3, policies=["lru"], skip=0.5).policies[0]
    # All of layer 1's misses, nearly, and of layer 0's none: nothing precedes it.
    share = lru.layer_misses[1] / lru.misses
    assert 0.95 * share < lru.foreseen["transition"] <= share
    named_in_vain = lru.needless_per_token["transition"]
    assert named_in_vain < 0.1


def test_tokens_round_trip_and_help_the_default_policy(tmp_path: Path) -> None:
    # A sentence of 12 words, over and over, each word with experts of its own at each layer: more
    # experts than slots, so that whoever knows what comes misses less.
    rng = np.random.default_rng(5)
    words, layers, experts, used, repeats = 12, 3, 32, 2, 12
    taken = [[rng.choice(experts, used, False) for _ in range(layers)] for _ in range(words)]
    path = tmp_path / "t.csv"
    shape = {"n_layer": layers, "n_expert": experts, "n_expert_used": used}
    with TraceWriter(path, **shape, tokens=True) as writer:
        for step in range(words * repeats):
            for layer in range(layers):
                chosen = taken[step % words][layer].tolist()
                writer.visit(step, DECODE, layer, chosen, [0.5] * used, token=100 + step % words)
    trace = read_trace(path)
    assert trace.token is not None
    assert trace.token.tolist() == [100 + v // layers % words for v in range(len(trace.layer))]
    assert trace.token.tolist() == trace.without_prompts().token.tolist()  # type: ignore[union-attr]
    write_trace(tmp_path / "again.csv", trace)
    assert np.array_equal(read_trace(tmp_path / "again.csv").token, trace.token)
    distinct = len(np.unique(trace.layer.repeat(used) * experts + trace.expert))
    slots = distinct * 2 // 3

    def misses(trace: Trace) -> dict[str, int]:
        at = simulate(trace, slots, policies=["lru", "reuse"], skip=0.5)
        return {p.policy: p.misses for p in at.policies}

    told, not_told = misses(trace), misses(replace(trace, token=None))
    assert told["belady"] <= told["reuse"] < not_told["reuse"]
    assert told["lru"] == not_told["lru"]
    assert told["reuse"] < 1.1 * told["belady"]
    # The sentence is known by heart after its first time, and no layer follows from another one.
    for policy in simulate(trace, slots, skip=0.5).policies:
        assert policy.foreseen["history"] == 1
        assert policy.needless_per_token["history"] == 0
    blind = simulate(replace(trace, token=None), slots, policies=["lru"], skip=0.5).policies[0]
    assert blind.foreseen["history"] == 0
    assert blind.misses_per_token > 0


def test_writer_leaves_nothing_after_an_error(tmp_path: Path) -> None:
    path = tmp_path / "t.csv.gz"
    with (
        pytest.raises(KeyError),
        TraceWriter(path, n_layer=1, n_expert=4, n_expert_used=1) as writer,
    ):
        writer.visit(0, DECODE, 0, [1], [1.0], hits=[True], wait_us=[3.5])
        raise KeyError
    assert list(tmp_path.iterdir()) == []


HEADER = "step,phase,layer,slot,expert,weight\n"
HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "no rows"),
    "header only": (HEADER.encode(), "no rows"),
    "other columns": (b"a,b,c\n1,2,3\n", "line 1: expected JSON lines or the columns"),
    "columns": ((HEADER + "0,decode,0,0\n").encode(), "line 2: expected 6 columns, found 4"),
    "negative": ((HEADER + "0,decode,-1,0,1,1\n").encode(), "line 2: layer"),
    "huge": ((HEADER + "0,decode,0,0,99999999,1\n").encode(), "line 2: expert"),
    "text": ((HEADER + "0,decode,0,0,x,1\n").encode(), "line 2: expert"),
    "nan": ((HEADER + "0,decode,0,0,1,nan\n").encode(), "line 2: weight"),
    "twice": ((HEADER + "0,decode,0,0,1,1\n0,decode,0,1,1,1\n").encode(), "line 3: expert 1 twice"),
    "slot": ((HEADER + "0,decode,0,1,1,1\n").encode(), "line 2: expected slot 0"),
    "shape": (("# n_expert=4\n" + HEADER + "0,decode,0,0,7,1\n").encode(), "expected n_expert=4"),
    "binary": (b"\xff\xfe\x00\x01" * 50, "expected text"),
    "json": (b'{"tok": 0}\n', "line 1: expected"),
    "json list": (b'{"tok": 0, "layers": [3]}\n', "line 1: layer 0: expected a list"),
    "json cut": (json.dumps({"tok": 0, "layers": [[1, 2]]}).encode()[:-3], "line 1: expected"),
    "json bool": (b'{"tok": 0, "layers": [[true]]}\n', "line 1: expert"),
    "long line": (b"1" * (1 << 21), "line 1: expected at most"),
    "deep json": (b'{"tok":' + b"[" * 100000, "line 1: expected"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files(tmp_path: Path, name: str) -> None:
    content, message = HOSTILE[name]
    path = tmp_path / "bad.trace"
    path.write_bytes(content)
    with pytest.raises(OptionError) as caught:
        read_trace(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_truncated_gzip(tmp_path: Path) -> None:
    whole = EXCERPT.read_bytes()
    path = tmp_path / "cut.csv.gz"
    for end in (2, 15, len(whole) // 2, len(whole) - 4):
        path.write_bytes(whole[:end])
        with pytest.raises(OptionError, match="truncated or damaged"):
            read_trace(path)
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0x55
    path.write_bytes(flipped)
    with pytest.raises(OptionError):
        read_trace(path)
    path.write_bytes(gzip.compress(b""))
    with pytest.raises(OptionError, match="no rows"):
        read_trace(path)
    with pytest.raises(OptionError, match="cannot read"):
        read_trace(tmp_path / "absent.csv")


Options = dict[str, str | int | float]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory": "1GiB", "slots": 3}, "one of"),
        ({"memory": "lots"}, "expected bytes"),
        ({"memory": "1KiB"}, "at least one expert"),
        ({"share": "15,x"}, "percentages"),
        ({"share": "0"}, "share"),
        ({"slots": 0}, "slot"),
        ({"policies": ["nosuch"]}, "cache policy: expected one of lru"),
        ({"bandwidth": "0"}, "bandwidth"),
        ({"skip": 1.0}, "skip"),
        ({"expert_bytes": "0"}, "expert bytes"),
    ],
)
def test_bad_options(options: Options, message: str) -> None:
    call: Callable[..., object] = simulate_command.replay
    with pytest.raises(OptionError, match=message):
        call(EXCERPT, **options)


def test_outputs() -> None:
    trace, found = simulate_command.replay(EXCERPT, memory="300MB", bandwidth="1.5GB")
    belady = found[0].policies[-1]
    assert found[0].slots == 300_000_000 // 3059712
    assert belady.bytes_per_token is not None and belady.tokens_per_s is not None
    assert belady.tokens_per_s == pytest.approx(1.5e9 / belady.bytes_per_token)
    table = simulate_command.as_table(trace, found)
    assert "oracle bound" in table and "tok/s at most" in table
    lines = simulate_command.as_tsv(found).splitlines()
    assert len(lines) == 1 + len(policy_names())
    assert {len(line.split("\t")) for line in lines} == {10 + 2 * len(predictor_names())}
    document = json.loads(simulate_command.json_text(trace, found))
    assert document["sizes"][0]["policies"][-1]["misses"] == belady.misses
