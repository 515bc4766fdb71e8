"""Setups: the results of one engine in one configuration, with its repeats together.

Results come from other devices and people: no field is trusted to be there, of the right type, or
fit to be shown.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...offload.plan import device_profile
from ...runtime.base.arguments import shown
from ...runtime.base.errors import OptionError
from ...runtime.files.json_text import parse
from ..run import records
from .quantities import Spread, budget, spread

_ABSURD = 1e30  # too large for any quantity in base units; sums and ratios below it are finite
Output = tuple[Any, ...]  # ids of generated tokens, or their digest
REFERENCE = "stoker"  # the engine that others are compared with
_NAMES = {"llama-cpp": "llama.cpp", "onnx": "onnxruntime"}
# Characters that control a terminal or the direction of text, and halves of surrogate pairs.
_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)


@dataclass(frozen=True)
class Setup:
    """An engine in a configuration. memory, limit: bytes, or None."""

    device: str
    model: str
    engine: str
    threads: int
    context: int
    memory: int | None
    limit: int | None
    options: str  # JSON, keys sorted

    @property
    def room(self) -> int | None:
        """Bytes that the process may use: its limit, else its budget; None: no bound."""
        return self.memory if self.limit is None else self.limit


@dataclass
class Measured:
    """The repeats of a setup. runs: those that succeeded; failed: the others."""

    setup: Setup
    version: str
    runs: list[dict[str, Any]] = field(default_factory=list)
    failed: list[dict[str, Any]] = field(default_factory=list)
    extra: str = ""  # what distinguishes it from its engine's other setups

    @property
    def engine(self) -> str:
        """The engine's name for people."""
        return _NAMES.get(self.setup.engine, self.setup.engine)

    @property
    def label(self) -> str:
        """The engine and what distinguishes the setup: "stoker, 1 thread"."""
        return f"{self.engine}, {self.extra}" if self.extra else self.engine

    def of_run(self, *keys: str) -> Spread | None:
        """The repeats of the number under these keys."""
        return spread(at(run, *keys) for run in self.runs)

    @property
    def prompt_lengths(self) -> list[int]:
        """Lengths of the measured prompts, tokens."""
        found = {at(p, "tokens") for run in self.runs for p in _list(run.get("prompts"))}
        return sorted(int(n) for n in found if n is not None and n >= 1)

    def of_prompt(self, tokens: int, key: str) -> Spread | None:
        """The repeats of a number ("ttft_s", "tok_s") at a prompt length."""
        return spread(of_prompt(run, tokens, key) for run in self.runs)

    @property
    def token_seconds(self) -> list[list[float]]:
        """[repeats][tokens], seconds."""
        lists = (_list(_within(run, "decode", "token_s")) for run in self.runs)
        return [
            kept
            for kept in ([n for n in map(finite, one) if n is not None] for one in lists)
            if kept
        ]

    @property
    def layer_hits(self) -> list[float | None]:
        """[n_layer]: median hit rate; None in layers without experts."""
        lists = [_list(_within(run, "decode", "layer_hits")) for run in self.runs]
        lists = [one for one in lists if one]
        if not lists or len({len(one) for one in lists}) > 1:
            return []
        found = [spread(finite(one[layer]) for one in lists) for layer in range(len(lists[0]))]
        return [None if one is None or one.high == 0 else one.median for one in found]

    @property
    def outputs(self) -> list[Output]:
        """The distinct outputs of the repeats, the longest first."""
        found: list[Output] = []
        for run in self.runs:
            ids = tuple(_list(run.get("token_ids")))
            one: Output = ids or (str(run.get("tokens_sha256") or ""),)
            if one != ("",) and one not in found:
                found.append(one)
        return sorted(found, key=lambda one: -len(one))

    @property
    def remarks(self) -> list[tuple[str, list[int]]]:
        """(note on what was left out, failed or was disturbed; the repeats it concerns)."""
        found: dict[str, list[int]] = {}
        for run in (*self.runs, *self.failed):
            texts = [str(note) for note in _list(run.get("notes"))]
            texts += [f"noisy: {why}" for why in noise(run)]
            if run.get("error"):
                texts.append(f"failed: {run['error']}")
            for text in texts:
                found.setdefault(text, []).append(int(run["repeat"]))
        return [(text, sorted(repeats)) for text, repeats in found.items()]

    @property
    def noisy(self) -> int:
        """The number of repeats that are not to be trusted."""
        return sum(bool(noise(run)) for run in self.runs)


@dataclass
class ModelResults:
    """All results of one model on one device."""

    key: str
    name: str
    facts: dict[str, Any]
    measured: list[Measured]
    rooflines: list[dict[str, Any]]

    def roofline(self, one: Setup) -> dict[str, Any] | None:
        """The roofline of a setup, by its room or its budget; the latest if there are several."""
        for memory in (one.room, one.memory):
            for line in self.rooflines[::-1]:  # the latest first
                same = (line.get("memory"), line.get("threads")) == (memory, one.threads)
                if same and (memory is not None or one.room is None):
                    return line
        return None

    def pairs(self) -> Iterator[tuple[Measured, Measured]]:
        """Pairs of a setup of the reference engine and another engine's in the same room."""
        for ours in self.measured:
            for other in self.measured:
                a, b = ours.setup, other.setup
                if a.engine != REFERENCE or b.engine == REFERENCE or a.threads != b.threads:
                    continue
                if a.room == b.room:
                    yield ours, other


@dataclass
class Device:
    """A device, its profile if there is one, and the results measured on it."""

    id: str
    name: str
    profile: dict[str, Any] | None
    models: list[ModelResults] = field(default_factory=list)


def agree(a: Output, b: Output) -> bool:
    """Whether two outputs are the same as far as both go (a slow run ends early)."""
    most = min(len(a), len(b))
    return a[:most] == b[:most]


def finite(value: object) -> float | None:
    """The value if it is a number of sane size, else None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if abs(number) < _ABSURD else None


def at(value: object, *keys: str) -> float | None:
    """The number under these keys, None if there is none."""
    return finite(_within(value, *keys))


def _within(value: object, *keys: str) -> object:
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def of_prompt(run: dict[str, Any], tokens: int, key: str) -> float | None:
    """A number of one run's prompt of this length."""
    for prompt in _list(run.get("prompts")):
        if at(prompt, "tokens") == tokens:
            return at(prompt, key)
    return None


def paired(
    ours: Measured, other: Measured, ratio: Callable[[dict[str, Any], dict[str, Any]], float | None]
) -> Spread | None:
    """The ratio of two setups within each repeat that both have."""
    theirs = {(str(run.get("run")), run["repeat"]): run for run in other.runs}
    found = []
    for run in ours.runs:
        partner = theirs.get((str(run.get("run")), run["repeat"]))
        if partner is not None:
            found.append(ratio(run, partner))
    return spread(found)


def noise(run: dict[str, Any]) -> list[str]:
    """Reasons, noted by the measurement itself, not to trust a repeat; [] if there are none."""
    found = run.get("noise")
    return [str(why) for why in _list(found.get("noisy"))] if isinstance(found, dict) else []


def clean(value: Any) -> Any:
    """The value with all its text made fit to be shown."""
    if isinstance(value, str):
        return _UNSEEN.sub("\N{REPLACEMENT CHARACTER}", value)
    if isinstance(value, list):
        return [clean(one) for one in value]
    if isinstance(value, dict):
        return {clean(key): clean(one) for key, one in value.items()}
    return value


@dataclass
class Read:
    """Records of all files, cleaned."""

    profiles: list[dict[str, Any]] = field(default_factory=list)
    runs: list[dict[str, Any]] = field(default_factory=list)
    rooflines: list[dict[str, Any]] = field(default_factory=list)
    perplexities: list[dict[str, Any]] = field(default_factory=list)
    widths: list[dict[str, Any]] = field(default_factory=list)
    jobs: list[dict[str, Any]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return any((self.profiles, self.runs, self.perplexities, self.widths, self.jobs))


def read(paths: Iterable[Path]) -> Read:
    """Reads files of results and device profiles. Raises OptionError naming one that is neither."""
    out = Read()
    for path in paths:
        profile = _profile(path)
        if profile is not None:
            out.profiles.append(clean(profile))
            continue
        results = records.read(path)
        for number, run in enumerate(results["runs"], 1):
            _check(path, number, run)
        # A record that two files share (a profile, or a file given twice) counts once.
        for kept, new in (
            (out.profiles, results["profiles"]),
            (out.runs, results["runs"]),
            (out.rooflines, results["rooflines"]),
            (out.perplexities, results["perplexities"]),
            (out.widths, results["widths"]),
            (out.jobs, results["jobs"]),
        ):
            for one in new:
                cleaned = clean(one)
                if cleaned not in kept:
                    kept.append(cleaned)
    return out


def _profile(path: Path) -> Any:
    """The device profile in the file, None if it holds something else."""
    try:
        with path.open(encoding="utf-8") as file:
            first = file.readline()
            if first.strip() not in ("{", ""):
                return None
            if not isinstance(parse(first + file.read()), dict):
                return None
    except (OSError, ValueError):
        return None
    return device_profile.load(path)


_TEXTS = ("device", "engine")
_COUNTS = ("threads", "repeat")


def _check(path: Path, number: int, run: Any) -> None:
    for key in _TEXTS:
        if not isinstance(run.get(key), str):
            raise OptionError(
                f"{path}: run {number}: expected {key} as text, found {shown(run.get(key))}"
            )
    for key in _COUNTS:
        if at(run, key) is None:
            found = run.get(key)
            raise OptionError(
                f"{path}: run {number}: expected {key} as a number, found {shown(found)}"
            )
    for key in ("memory", "limit"):
        if run.get(key) is not None and at(run, key) is None:
            found = run.get(key)
            raise OptionError(
                f"{path}: run {number}: expected {key} in bytes, found {shown(found)}"
            )
    if not isinstance(run.get("model"), dict) or not run["model"].get("name"):
        raise OptionError(f"{path}: run {number}: expected a model with a name")


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)


def model_key(facts: dict[str, Any]) -> str:
    """The key that identifies a model across files of results."""
    return json.dumps([facts.get("name"), facts.get("type"), facts.get("n_expert_used")])


def setup_of(run: dict[str, Any]) -> Setup:
    """The setup that a run is a repeat of."""
    options = run.get("options")
    return Setup(
        device=run["device"],
        model=model_key(run["model"]),
        engine=run["engine"],
        threads=int(run["threads"]),
        context=_whole(at(run, "context")) or 0,
        memory=_whole(at(run, "memory")),
        limit=_whole(at(run, "limit")),
        options=json.dumps(options, sort_keys=True) if options else "",
    )


def measured(runs: Iterable[dict[str, Any]]) -> list[Measured]:
    """The setups of the runs: by room, the reference engine first."""
    found: dict[tuple[Setup, str], Measured] = {}
    for run in runs:
        key = (setup_of(run), str(run.get("engine_version") or ""))
        one = found.setdefault(key, Measured(*key))
        (one.failed if run.get("error") else one.runs).append(run)
    return sorted(found.values(), key=_order)


def _order(one: Measured) -> tuple[Any, ...]:
    s = one.setup
    room = math.inf if s.room is None else s.room
    return (room, s.engine != REFERENCE, s.engine, s.threads, s.context, s.options, one.version)


def devices(results: Read) -> list[Device]:
    """Everything that was read, by device and model; devices and models in order of appearance."""
    profiles: dict[str, dict[str, Any]] = {}
    for profile in results.profiles:
        # The latest full probe counts, else the latest probe.
        id_, rank = str(profile.get("id")), (not profile.get("quick"), str(profile.get("time")))
        old = profiles.get(id_)
        if old is None or rank >= (not old.get("quick"), str(old.get("time"))):
            profiles[id_] = profile
    ids = dict.fromkeys([*profiles, *(run["device"] for run in results.runs)])
    out = [_device(id_, profiles.get(id_), results) for id_ in ids]
    names = [device.name for device in out]
    for device in out:
        if names.count(device.name) > 1 and device.name != device.id:
            device.name = f"{device.name} ({device.id[:6]})"
    return out


def _device(id_: str, profile: dict[str, Any] | None, results: Read) -> Device:
    device = Device(id_, str(profile["name"]) if profile else f"device {id_}", profile)
    by_model: dict[str, list[dict[str, Any]]] = {}
    own = [run for run in results.runs if run["device"] == id_]
    references = _references(own)
    for run in own:
        key = model_key(run["model"])
        theirs = references.get(str(run.get("run")), set())
        # Another engine's file of the one model that the same command has measured.
        if key not in theirs and run["engine"] != REFERENCE and len(theirs) == 1:
            key = next(iter(theirs))
        by_model.setdefault(key, []).append(run)
    for key, runs in by_model.items():
        facts = next((r["model"] for r in runs if model_key(r["model"]) == key), runs[0]["model"])
        lines = [
            line
            for line in results.rooflines
            if line.get("device") == id_ and line.get("model") == facts["name"]
        ]
        one = ModelResults(key, str(facts["name"]), facts, measured(runs), lines)
        _set_apart(one.measured)
        device.models.append(one)
    names = [one.name for one in device.models]
    for one in device.models:
        if names.count(one.name) > 1:
            more = [str(one.facts[k]) for k in ("type",) if one.facts.get(k)]
            if one.facts.get("n_expert_used"):
                more.append(f"top {one.facts['n_expert_used']}")
            one.name = f"{one.name} ({', '.join(more)})"
    return device


def _references(runs: Iterable[dict[str, Any]]) -> dict[str, set[str]]:
    """Command -> the models that it has measured with the reference engine."""
    out: dict[str, set[str]] = {}
    for run in runs:
        if run["engine"] == REFERENCE:
            out.setdefault(str(run.get("run")), set()).add(model_key(run["model"]))
    return out


def _set_apart(setups: list[Measured]) -> None:
    """Labels the setups with what distinguishes them within their engine or from the rest."""
    threads = {one.setup.threads for one in setups}
    for one in setups:
        s = one.setup
        same = [o for o in setups if o.setup.engine == s.engine]
        extra = []
        if len({o.setup.model for o in same}) > 1:
            extra.append(_name(one))
        if len(threads) > 1:
            extra.append(f"{s.threads} thread{'s' if s.threads > 1 else ''}")
        if len({o.setup.context for o in same}) > 1:
            extra.append(f"context {s.context}")
        if len({o.version for o in same}) > 1:
            extra.append(one.version or "version unknown")
        extra += [f"{key}={value}" for key, value in sorted(_options(s).items())]
        twins = [o for o in same if o is not one and o.version == one.version]
        if any(_but_limit(o.setup) == _but_limit(s) for o in twins):
            extra.append("no limit" if s.limit is None else f"limit {budget(s.limit)}")
        one.extra = ", ".join(extra)


def _name(one: Measured) -> str:
    return str((*one.runs, *one.failed)[0]["model"]["name"])


def _options(setup: Setup) -> dict[str, Any]:
    options = json.loads(setup.options) if setup.options else {}
    return options if isinstance(options, dict) else {"options": options}


def _but_limit(s: Setup) -> tuple[Any, ...]:
    return (s.engine, s.threads, s.context, s.memory, s.options)
