"""How many of a token's experts a cache lacks: curves of real routing, and the law between them.

    python -m stoker.offload.plan.hit_curves --trace kimi.jsonl.gz... --model up64.gguf...
        --texts mt_bench.jsonl shakespeare.txt... [--out hit_curves.json]

A curve is the share of a decoded token's experts that are not in the cache, for a model of E
experts a layer of which a token uses K. It depends on the share of all experts that the cache
holds, and on the number of tokens decoded since a prompt that the empty cache saw as one chunk.
Each curve is measured by a replay (`_core.simulate`) of recorded routing through the engine's
default policy, on demand.

Between shares, curves are straight lines. Over time, they are constant in each window of WINDOWS,
the last of which continues. Between models, the mean of all curves of the same origin is taken in
their logarithms, weighted by 1 / d^2, where d is the distance in (log2 E, log2 K), so that a curve
of the same E and K represents itself. How routers were made matters more than these numbers: those
of `stoker export upcycle` (which records this in the file) follow the topic of the text, random
ones follow nothing, so both are kept apart from trained ones. A curve is an expectation, not a
guarantee: with its own curve left out, a model's misses were estimated at 0.34 to 4.3 times their
true number.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...runtime.base.errors import OptionError

if TYPE_CHECKING:
    from ..trace.trace import Trace

DATA = Path(__file__).with_name("hit_curves.json")
SHARES = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
WINDOWS = ((0, 16), (16, 64), (64, 256))  # tokens decoded before, from and to
PROMPT = 64  # tokens of the first chunk
ORIGINS = ("trained", "upcycled", "random")
# Tokens of a text choose alike: n of them use as many experts as n^ALIKE independent ones would.
# The three public traces and up64 at 16, 64 and 128 tokens have exponents of 0.60 to 0.80.
ALIKE = 0.7
_FLOOR = 1e-4  # least miss rate of which the logarithm is taken


@dataclass(frozen=True)
class Curve:
    """The hit curve of one model. miss: [windows][shares], misses / uses."""

    name: str
    origin: str
    n_expert: int
    n_expert_used: int
    miss: tuple[tuple[float, ...], ...]


@cache
def curves() -> tuple[Curve, ...]:
    """Returns the curves that come with the package."""
    rows = json.loads(DATA.read_text(encoding="utf-8"))["curves"]
    return tuple(Curve(**{**row, "miss": tuple(map(tuple, row["miss"]))}) for row in rows)


def origin_of(recipe: str | None) -> str:
    """Returns one of ORIGINS. recipe: the file's "stoker.upcycle.recipe", None if it has none."""
    if recipe is None:
        return "trained"
    return "random" if json.loads(recipe).get("router") == "random" else "upcycled"


def miss_rate(
    share: float,
    n_expert: int,
    n_expert_used: int,
    *,
    origin: str = "trained",
    tokens: int = 256,
    among: Sequence[Curve] | None = None,
) -> float:
    """Returns the share of experts that a cache lacks, the mean of the first `tokens` decoded.

    share: the share of all experts that the cache holds. among: the curves to use, default
    curves().
    """
    if n_expert < 1 or not 1 <= n_expert_used <= n_expert or tokens < 1:
        raise OptionError(
            f"expected 1 or more experts, of them some used, and 1 or more tokens, found "
            f"{n_expert}, {n_expert_used}, {tokens}"
        )
    known = curves() if among is None else among
    same = [c for c in known if c.origin == origin] or list(known)
    if not same:
        raise OptionError("hit curves: expected at least one")
    logs, weights = [], []
    for curve in same:
        distance = (math.log2(curve.n_expert / n_expert)) ** 2 + (
            math.log2(curve.n_expert_used / n_expert_used)
        ) ** 2
        weights.append(1 / (distance + 1e-6))
        logs.append(math.log(max(_FLOOR, _mean(curve, share, tokens))))
    mean = math.exp(sum(w * x for w, x in zip(weights, logs, strict=True)) / sum(weights))
    return 0.0 if mean <= _FLOOR * 1.001 else min(1.0, mean)


def distinct(n_expert: int, n_expert_used: int, tokens: int) -> float:
    """Returns the expected number of a layer's experts that so many tokens use together."""
    independent = tokens**ALIKE
    return float(n_expert * (1 - (1 - n_expert_used / n_expert) ** independent))


def _mean(curve: Curve, share: float, tokens: int) -> float:
    """Returns the mean miss rate of the first tokens, at one share."""
    total = 0.0
    for index, (begin, end) in enumerate(WINDOWS):
        last = index == len(WINDOWS) - 1
        count = max(0, (tokens if last else min(tokens, end)) - begin)
        total += count * _at(curve.miss[index], share)
    return total / tokens


def _at(miss: Sequence[float], share: float) -> float:
    """Returns the miss rate on straight lines between SHARES; without a cache it is 1."""
    points = [(0.0, 1.0), *zip(SHARES, miss, strict=True)]
    for (x0, y0), (x1, y1) in pairwise(points):
        if share <= x1:
            return y0 + (y1 - y0) * (share - x0) / (x1 - x0)
    return miss[-1]


@dataclass(frozen=True)
class Routing:
    """The experts that the tokens of one text used, in order; the first `prompt` are a prompt."""

    n_layer: int
    n_expert: int
    n_expert_used: int
    prompt: int
    token: list[int]  # [tokens] ids in the vocabulary; empty if unknown
    uses: list[dict[int, list[int]]]  # [tokens] layer -> experts


def of_trace(trace: Trace, prompt: int = PROMPT) -> Routing:
    """Takes a recorded trace as one text; without a prompt its first `prompt` tokens are one."""
    uses: list[dict[int, list[int]]] = []
    tokens: list[int] = []
    place: dict[tuple[int, int], int] = {}
    for v, (evaluation, layer, step) in enumerate(
        zip(trace.evaluation.tolist(), trace.layer.tolist(), trace.step.tolist(), strict=True)
    ):
        at = place.setdefault((evaluation, step), len(uses))
        if at == len(uses):
            uses.append({})
            if trace.token is not None:
                tokens.append(int(trace.token[v]))
        uses[at][layer] = trace.expert[int(trace.offset[v]) : int(trace.offset[v + 1])].tolist()
    own = 0 if trace.decode[0] else int(trace.tokens[0])
    return Routing(trace.n_layer, trace.n_expert, trace.n_expert_used, own or prompt, tokens, uses)


def of_model(model: Path, prompts: Iterable[str], *, tokens: int = WINDOWS[-1][1]) -> list[Routing]:
    """Runs a mixture greedily, `tokens` tokens after the first PROMPT tokens of each text."""
    from ...runtime import _core
    from ...runtime.base.memory import process_bytes
    from ...runtime.text.tokenizer import Tokenizer

    file = _core.GgufFile(str(model))
    context = PROMPT + tokens
    config, plan = _core.plan(file, context=context, process_bytes=2 * process_bytes())
    engine = _core.Engine(
        file,
        threads=1,  # the routing is the same; on a busy machine two would wait for each other
        context=context,
        # Every expert gets a slot; a budget is needed since routing is recorded only with one.
        memory=(plan["least_memory"] + file.nbytes) * 65 // 64,
        process_bytes=2 * process_bytes(),
        predictor="none",
        prefetch="off",
    )
    tokenizer = Tokenizer.from_metadata(file.get)
    found = []
    for text in prompts:
        ids = tokenizer.encode(text)
        ids = (ids * -(-PROMPT // max(1, len(ids))))[:PROMPT]
        engine.take_routing()
        engine.record_routing(True)
        sequence = engine.sequence()
        greedy = _core.Sampler(config["n_vocab"])
        sequence.eval(ids)
        for _ in range(tokens):
            sequence.step(greedy)
        found.append(_routing(engine.take_routing(), config))
    return found


def _routing(columns: Mapping[str, Any], config: Mapping[str, Any]) -> Routing:
    """Converts the engine's recording of a prompt and the tokens after it, from its start."""
    # The engine records experts in the order of use, which in a chunk is by expert.
    order = np.lexsort([columns[key] for key in ("rank", "layer", "token", "evaluation")])
    evaluation = columns["evaluation"][order]
    first = np.concatenate([[True], evaluation[1:] != evaluation[:-1]])
    before = np.concatenate([[0], np.cumsum(columns["tokens"][order][first])])
    place = before[np.cumsum(first) - 1] + columns["token"][order]  # index in the text
    uses: list[dict[int, list[int]]] = [{} for _ in range(int(before[-1]))]
    token = [0] * len(uses)
    for at, layer, expert, number in zip(
        place.tolist(),
        *(columns[key][order].tolist() for key in ("layer", "expert", "id")),
        strict=True,
    ):
        uses[at].setdefault(layer, []).append(expert)
        token[at] = number
    return Routing(
        config["n_layer"], config["n_expert"], config["n_expert_used"], PROMPT, token, uses
    )


def visits_of(routing: Routing) -> dict[str, Any]:
    """Returns the text for `_core.simulate`: the prompt is evaluation 0, then one a token."""
    visits: list[tuple[int, int, int]] = []  # evaluation, layer, token of the text
    layers = sorted({layer for uses in routing.uses for layer in uses})
    for layer in layers:
        visits += [(0, layer, t) for t in range(routing.prompt) if layer in routing.uses[t]]
    for t in range(routing.prompt, len(routing.uses)):
        visits += [(t - routing.prompt + 1, layer, t) for layer in sorted(routing.uses[t])]
    experts = [routing.uses[t][layer] for _, layer, t in visits]
    lengths = [len(e) for e in experts]
    flat = np.array([e for row in experts for e in row], np.int32)
    return {
        "evaluation": np.array([v[0] for v in visits], np.int64),
        "layer": np.array([v[1] for v in visits], np.int32),
        "offset": np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        "expert": flat,
        "weight": np.full(len(flat), 1 / routing.n_expert_used, np.float32),
        "token": np.array([routing.token[v[2]] for v in visits] if routing.token else [], np.int32),
        "decode": np.array([v[0] > 0 for v in visits], np.uint8),
        "sequence": np.zeros(0, np.int64),
        "n_layer": routing.n_layer,
        "n_expert": routing.n_expert,
        "n_expert_used": routing.n_expert_used,
    }


def misses(
    routing: Routing, visits: dict[str, Any], slots: int, policy: str
) -> tuple[list[int], list[int]]:
    """Returns (uses, misses) by window of WINDOWS, as far as the text goes, from a cold cache."""
    from ...runtime import _core

    decoded = len(routing.uses) - routing.prompt
    edges = [1 + min(begin, decoded) for begin, _ in WINDOWS] + [1 + min(WINDOWS[-1][1], decoded)]

    def counted(first: int) -> tuple[int, int]:
        if first > decoded:
            return 0, 0
        result = _core.simulate(**visits, policy=policy, slots=slots, count_from=first)
        return int(result["uses"]), int(result["misses"])

    totals = [counted(edge) for edge in edges]
    uses = [a[0] - b[0] for a, b in pairwise(totals)]
    return uses, [a[1] - b[1] for a, b in pairwise(totals)]


def curve(name: str, origin: str, routings: Sequence[Routing], policy: str) -> Curve:
    """Measures the curve of all texts of a model together.

    A window that no text reaches equals the one before. Raises OptionError for no texts, and for
    texts that end with their prompt.
    """
    if not routings:
        raise OptionError(f"{name}: expected at least one text")
    shape = routings[0]
    uses = np.zeros((len(WINDOWS), len(SHARES)))
    missed = np.zeros_like(uses)
    for routing in routings:
        visits = visits_of(routing)
        for i, share in enumerate(SHARES):
            slots = max(1, round(share * shape.n_layer * shape.n_expert))
            found = misses(routing, visits, slots, policy)
            uses[:, i] += found[0]
            missed[:, i] += found[1]
    if not uses[0].all():
        raise OptionError(f"{name}: expected tokens after the prompt, found none")
    rows: list[tuple[float, ...]] = []
    for window in range(len(WINDOWS)):
        rate = np.minimum.accumulate(missed[window] / np.maximum(uses[window], 1))
        rows.append(tuple(round(float(x), 5) for x in rate) if uses[window].any() else rows[-1])
    return Curve(name, origin, shape.n_expert, shape.n_expert_used, tuple(rows))


def read_texts(path: Path, count: int) -> list[str]:
    """Reads `count` texts spread over a file, which may be compressed with gzip.

    In JSON lines with "turns" (MT-Bench's form) they are the first turns. In plain text each begins
    at the first line after a cut.
    """
    try:
        with gzip.open(path, "rt") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
            whole = file.read()
        if path.suffix == ".jsonl":
            texts = [str(json.loads(line)["turns"][0]) for line in whole.splitlines()]
        else:
            cuts = [len(whole) * (2 * i + 1) // (2 * count) for i in range(count)]
            texts = [whole[whole.find("\n", cut) + 1 :][:4096] for cut in cuts]
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise OptionError(f"{path}: expected text, or lines {{'turns': [text]}}: {error}") from None
    if len(texts) < count or not all(text.strip() for text in texts):
        raise OptionError(f"{path}: expected {count} texts, found fewer")
    return [texts[i * len(texts) // count] for i in range(count)]


def main() -> None:
    """Derives the curves from traces and models."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--trace", type=Path, nargs="*", default=[], help="recorded routing")
    parser.add_argument("--model", type=Path, nargs="*", default=[], help="mixtures to run")
    parser.add_argument("--texts", type=Path, nargs="*", default=[], help="for the models")
    parser.add_argument("--each", type=int, default=2, help="texts to take from each of them")
    parser.add_argument("--policy", default="reuse", help="the engine's default")
    parser.add_argument("--out", type=Path, default=DATA)
    options = parser.parse_args()
    if options.model and not options.texts:
        parser.error("--model needs --texts")

    from ...runtime._core import GgufFile
    from ..trace.trace import read_trace

    made: list[Curve] = []

    def write() -> None:
        document = {
            "shares": SHARES,
            "windows": WINDOWS,
            "prompt": PROMPT,
            "policy": options.policy,
        }
        rows = ",\n".join(json.dumps(asdict(c)) for c in made)
        text = f'{json.dumps(document)[:-1]}, "curves": [\n{rows}\n]}}\n'
        options.out.write_text(text, encoding="utf-8")

    for path in options.trace:
        name = path.name.split(".")[0]
        made.append(curve(name, "trained", [of_trace(read_trace(path))], options.policy))
        print(made[-1].name, file=sys.stderr)
        write()
    for path in options.model:
        origin = origin_of(GgufFile(str(path)).get("stoker.upcycle.recipe"))
        texts = [text for file in options.texts for text in read_texts(file, options.each)]
        made.append(curve(path.stem, origin, of_model(path, texts), options.policy))
        print(made[-1].name, file=sys.stderr)
        write()


if __name__ == "__main__":
    main()
