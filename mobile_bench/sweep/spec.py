"""The specification of a sweep: YAML in, jobs out.

    cache: quantized/        # folder of quantized models [default: stoker's cache]
    retries: 2               # for a job whose process or node died
    timeout: 3600            # seconds per job [default: none]
    jobs:                    # groups; each is the product of its lists
      - models: [smollm2, up64.gguf]
        types: [as-is, Q8_0, Q4_0]
        memory: [resident, 500MB]
        threads: [1, 2]
        repeats: 3
      - kind: perplexity
        models: smollm2
        types: [as-is, Q8_0, Q4_0]
        text: wiki.txt
      - kind: bitwidth
        models: mixture.gguf
        bits: [3.5, 4.5]
        types: [Q2_K, Q3_K, Q4_K, Q6_K]
        text: wiki.txt

Settings of measurements: engines, prompts, tokens, context, time_limit, python (case.py); of
perplexities: context, stride, chunks; of both, each a list: policy, predictor, prefetch, io,
readers, precision, kv_type; of width searches: tokens, window, steps, seed, curve, keep. Every
group may name a `device`, or several. Paths are taken from the specification's folder.

Only plain YAML is read: no aliases, no tags, and no more than `MOST_JOBS` jobs, so that a
stranger's specification cannot cost much. Every error names the line.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from itertools import islice, product
from pathlib import Path
from typing import Any

from ...runtime.base.errors import OptionError
from ...runtime.base.memory import AUTO, check_memory
from ..run.case import ENGINES, PROMPTS, TIME_LIMIT_S, TOKENS
from .jobs import KINDS, RESIDENT, Job

MOST_JOBS = 10_000
AS_IS = "as-is"  # as a type: no quantization

_MOST_BYTES = 128 << 10  # bytes of a specification; pyyaml takes seconds for this many
_MOST_TEXT = 64 << 20  # bytes of a text that jobs need
_DEEPEST = 8  # nested mappings and lists
_MOST_REPEATS = 1000
_LONGEST = 1 << 20  # tokens
_LONGEST_VALUE = 4096  # characters
_ENGINE_OPTIONS = {
    "policy": str,
    "predictor": str,
    "prefetch": str,
    "io": str,
    "readers": int,
    "precision": str,
    "kv_type": str,
}

Node = Any  # a node of pyyaml, which has no types


@dataclass(frozen=True)
class Spec:
    """A specification. jobs: ordered repeat by repeat, so that disturbances of the machine affect
    all alike. texts: by sha256. cache: None for the default. timeout: seconds per job."""

    path: Path
    jobs: Sequence[Job]
    texts: Mapping[str, str] = field(repr=False)
    cache: Path | None
    retries: int
    timeout: float | None
    keep: frozenset[int]  # indices of width searches whose files are kept


def load(path: Path) -> Spec:
    """Reads a specification. Raises OptionError naming the file and the line."""
    try:
        with path.open("rb") as file:
            data = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise OptionError(f"{path}: {error.strerror}") from None
    if len(data) > _MOST_BYTES:
        raise OptionError(f"{path}: expected at most {_MOST_BYTES} bytes of YAML")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise OptionError(f"{path}: expected UTF-8, found byte {error.start} not to be") from None
    reader = _Reader(path)
    document = reader.document(text)
    known = ("jobs", "cache", "retries", "timeout")
    top = reader.mapping(document, known, "a sweep", ("jobs",))
    if "jobs" not in top:
        raise reader.error(document, "jobs: expected a list of groups, found nothing")
    if not reader.is_list(top["jobs"]):
        raise reader.refusal(top["jobs"], "jobs", "a list of groups", top["jobs"].value)
    texts: dict[str, str] = {}
    found: list[tuple[Job, bool]] = []
    for group in top["jobs"].value:
        made = _Group(reader, group, texts)
        if len(found) + made.count > MOST_JOBS:
            raise reader.error(group, f"expected at most {MOST_JOBS} jobs in a sweep")
        found += made.jobs()
    if not found:
        raise reader.error(top["jobs"], "expected at least one group of jobs")
    found.sort(key=lambda item: item[0].repeat)
    cache = reader.string(top["cache"], "cache") if "cache" in top else None
    retries, timeout = top.get("retries"), top.get("timeout")
    return Spec(
        path,
        [job for job, _ in found],
        texts,
        None if cache is None else path.parent.absolute() / os.path.expanduser(cache),
        2 if retries is None else reader.integer(retries, "retries", 0, 100),
        None if timeout is None else reader.number(timeout, "timeout", 1, 1e7),
        frozenset(i for i, (_, keep) in enumerate(found) if keep),
    )


def for_device(spec: Spec, device: str | None) -> tuple[Spec, int]:
    """The part of a sweep that runs on this machine, named `device`; and the number of other jobs.

    Raises OptionError if a job is bound to a device and `device` is None.
    """
    bound = next((job for job in spec.jobs if job.device is not None), None)
    if device is None and bound is not None:
        raise OptionError(
            f"{spec.path}: jobs are bound to devices ({bound.device}): say which one this machine "
            "is with --device, or run on a cluster with --ray"
        )
    here = [i for i, job in enumerate(spec.jobs) if job.device in (None, device)]
    keep = frozenset(new for new, old in enumerate(here) if old in spec.keep)
    kept = replace(spec, jobs=[spec.jobs[i] for i in here], keep=keep)
    return kept, len(spec.jobs) - len(here)


class _Reader:
    """Turns YAML nodes into checked values; errors name the line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._yaml: Any = import_module("yaml")
        except ImportError:
            raise OptionError(
                "a sweep's specification needs pyyaml: pip install 'stoker[sweep]'"
            ) from None

    # ---- nodes

    def document(self, text: str) -> Node:
        """The one document of a text, as nodes: nothing is constructed."""
        yaml = self._yaml
        try:
            self._check_events(text)
            node = yaml.compose(text, Loader=yaml.SafeLoader)
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            line = f":{mark.line + 1}" if mark is not None else ""
            problem = getattr(error, "problem", None) or str(error)
            raise OptionError(f"{self.path}{line}: not YAML: {problem}") from None
        if node is None:
            raise OptionError(f"{self.path}: expected a sweep, found nothing")
        return node

    def _check_events(self, text: str) -> None:
        """Refuses text that could cost more than its size, before anything is built from it."""
        yaml = self._yaml
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
                raise self.error(event, "expected plain YAML, found an anchor or an alias")
            if getattr(event, "tag", None) is not None:
                raise self.error(event, f"expected plain YAML, found the tag {event.tag}")
            if isinstance(event, yaml.CollectionStartEvent):
                depth += 1
                if depth > _DEEPEST:
                    raise self.error(event, f"expected at most {_DEEPEST} levels")
            elif isinstance(event, yaml.CollectionEndEvent):
                depth -= 1

    def error(self, node: Node, message: str) -> OptionError:
        """An error that names the node's line."""
        return OptionError(f"{self.path}:{node.start_mark.line + 1}: {message}")

    def refusal(self, node: Node, key: str, expected: str, found: object) -> OptionError:
        """The error for a value that a key does not take."""
        shown = "a list or mapping" if isinstance(found, list | tuple) else repr(found)[:60]
        return self.error(node, f"{key}: expected {expected}, found {shown}")

    def mapping(
        self, node: Node, known: Sequence[str], what: str, required: Sequence[str] = ()
    ) -> dict[str, Node]:
        """The nodes of a mapping by key, without null ones."""
        if not isinstance(node, self._yaml.MappingNode):
            raise self.error(node, f"expected {what}: keys and values")
        seen: dict[str, Node] = {}
        for key, value in node.value:
            name = key.value if isinstance(key, self._yaml.ScalarNode) else None
            if name is None or name not in known:
                shown = repr(name)[:60] if name is not None else "that is no word"
                raise self.error(
                    key, f"unknown key {shown} of {what} (known: {', '.join(sorted(known))})"
                )
            if name in seen:
                raise self.error(key, f"the key {name!r} is there twice")
            seen[name] = value
        for name in required:
            if name not in seen:
                raise self.error(node, f"{what} lacks the key {name!r}")
        null = "tag:yaml.org,2002:null"
        return {name: value for name, value in seen.items() if value.tag != null}

    def peek(self, node: Node, key: str) -> Node | None:
        """The node of one key, None if it is absent or `node` is no mapping."""
        if not isinstance(node, self._yaml.MappingNode):
            return None
        return next((v for k, v in node.value if k.value == key), None)

    def scalar(self, node: Node, key: str) -> Any:
        """A string, number or truth value as YAML 1.1 understands it."""
        if not isinstance(node, self._yaml.ScalarNode):
            raise self.refusal(node, key, "one value", node.value)
        if len(node.value) > _LONGEST_VALUE:
            raise self.refusal(node, key, f"at most {_LONGEST_VALUE} characters", node.value)
        kind = node.tag.rpartition(":")[2]
        if kind not in ("int", "float", "bool", "null"):
            return node.value
        try:
            return self._yaml.SafeLoader("").construct_object(node)
        except (ValueError, OverflowError):
            raise self.refusal(node, key, "a number", node.value) from None

    def is_list(self, node: Node) -> bool:
        """Whether a node is a list."""
        return isinstance(node, self._yaml.SequenceNode)

    def items(self, node: Node) -> list[Node]:
        """The nodes of a list; a single value is a list of one."""
        return list(node.value) if self.is_list(node) else [node]

    # ---- values

    def string(self, node: Node, key: str) -> str:
        """A string; a number is taken as it is written."""
        self.scalar(node, key)
        value = str(node.value)
        if not value or "\0" in value or (not value.isascii() and not _is_utf8(value)):
            raise self.refusal(node, key, "some text", value)
        return value

    def integer(self, node: Node, key: str, low: int, high: int) -> int:
        """A whole number from low to high."""
        value = self.scalar(node, key)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.refusal(node, key, f"a whole number from {low} to {high}", value)
        return value

    def number(self, node: Node, key: str, low: float, high: float) -> float:
        """A number from low to high."""
        value = self.scalar(node, key)
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not math.isfinite(value)
            or not low <= value <= high
        ):
            raise self.refusal(node, key, f"a number from {low:g} to {high:g}", value)
        return float(value)

    def flag(self, node: Node, key: str) -> bool:
        """True or false."""
        value = self.scalar(node, key)
        if not isinstance(value, bool):
            raise self.refusal(node, key, "true or false", value)
        return value


def _is_utf8(value: str) -> bool:
    """Whether text has no half of a surrogate pair, which YAML can spell out."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


_COMMON = ("kind", "models", "memory", "threads", "device")
_KEYS: dict[str, tuple[str, ...]] = {
    "measure": (
        *_COMMON,
        "types",
        "engines",
        "repeats",
        "prompts",
        "tokens",
        "context",
        "time_limit",
        "python",
        *_ENGINE_OPTIONS,
    ),
    "perplexity": (
        *_COMMON,
        "types",
        "text",
        "context",
        "stride",
        "chunks",
        *_ENGINE_OPTIONS,
    ),
    "bitwidth": (
        *_COMMON,
        "types",
        "text",
        "bits",
        "tokens",
        "window",
        "steps",
        "seed",
        "curve",
        "keep",
    ),
}
_REQUIRED = {
    "measure": ("models",),
    "perplexity": ("models", "text"),
    "bitwidth": ("models", "text", "bits"),
}


class _Group:
    """One item of `jobs`: the product of its lists."""

    def __init__(self, reader: _Reader, node: Node, texts: dict[str, str]) -> None:
        kind = reader.peek(node, "kind")
        self._kind: Any = KINDS[0] if kind is None else reader.string(kind, "kind")
        if self._kind not in KINDS:
            raise reader.refusal(kind, "kind", f"one of {', '.join(KINDS)}", self._kind)
        what = f"a group of kind {self._kind}"
        self._reader, self._node = reader, node
        self._nodes = reader.mapping(node, _KEYS[self._kind], what, _REQUIRED[self._kind])
        for key in _REQUIRED[self._kind]:
            if key not in self._nodes:
                raise reader.error(node, f"{what}: {key} is empty")
        r = reader
        width = self._kind == "bitwidth"
        self._models = self._list("models", self._model, [])
        self._types: list[str | None] = [None] if width else self._list("types", self._type, [None])
        own = RESIDENT if self._kind == "measure" else AUTO
        self._memory = self._list("memory", self._budget, [own])
        self._threads: list[int | None] = self._list(
            "threads", lambda n, k: r.integer(n, k, 1, 1024), [None]
        )
        self._devices: list[str | None] = self._list("device", r.string, [None])
        self._repeats = self._integer("repeats", 1, 1, _MOST_REPEATS)
        self._keep = "keep" in self._nodes and r.flag(self._nodes["keep"], "keep")
        own_settings = getattr(self, f"_{self._kind}")()
        self._settings = list(islice(own_settings, MOST_JOBS + 1))  # one too many is refused
        self.count = math.prod(
            map(
                len,
                (self._models, self._types, self._memory, self._threads, self._devices),
            )
        ) * (self._repeats * len(self._settings))
        self._text = self._read_text(texts) if "text" in self._nodes else None

    def jobs(self) -> Iterator[tuple[Job, bool]]:
        """The jobs, and whether the files that they make are kept."""
        for repeat, model, type, settings, memory, threads, device in product(
            range(self._repeats),
            self._models,
            self._types,
            self._settings,
            self._memory,
            self._threads,
            self._devices,
        ):
            yield (
                Job(
                    self._kind,
                    model,
                    type,
                    memory=memory,
                    threads=threads,
                    repeat=repeat,
                    device=device,
                    text=self._text,
                    settings=settings,
                ),
                self._keep,
            )

    # ---- settings of each job, by kind

    def _measure(self) -> Iterator[dict[str, Any]]:
        r = self._reader
        shared = {
            "prompts": self._list("prompts", lambda n, k: r.integer(n, k, 1, _LONGEST), [*PROMPTS]),
            "tokens": self._integer("tokens", TOKENS, 1, _LONGEST),
            "context": self._integer("context", 0, 0, _LONGEST),
            "time_limit": self._number("time_limit", TIME_LIMIT_S, 0.1, 1e6),
            "python": r.string(self._nodes["python"], "python") if "python" in self._nodes else "",
        }
        for engine in self._list("engines", self._engine, [ENGINES[0]]):
            for options in self._options():
                yield {**shared, "engine": engine, "options": options}

    def _perplexity(self) -> Iterator[dict[str, Any]]:
        context = self._integer("context", 512, 2, _LONGEST)
        shared = {
            "context": context,
            "stride": self._optional("stride", 1, context - 1),
            "chunks": self._optional("chunks", 1, _LONGEST),
        }
        for options in self._options():
            yield {**shared, "options": options}

    def _bitwidth(self) -> Iterator[dict[str, Any]]:
        from ...export.bitwidth import DEFAULT_TYPES

        r = self._reader
        shared = {
            "types": self._list("types", self._tensor_type, [*DEFAULT_TYPES]),
            "tokens": self._integer("tokens", 1024, 2, _LONGEST),
            "window": self._integer("window", 512, 2, _LONGEST),
            "steps": self._integer("steps", 24, 0, 100_000),
            "seed": self._integer("seed", 0, 0, 2**63 - 1),
            "curve": self._integer("curve", 0, 0, 1000),
        }
        for bits in self._list("bits", lambda n, k: r.number(n, k, 0.5, 32), []):
            yield {**shared, "bits": bits}

    def _options(self) -> Iterator[dict[str, Any]]:
        """All combinations of the given engine options."""
        r = self._reader
        lists = [
            [
                (name, r.integer(n, name, 1, 1024) if kind is int else r.string(n, name))
                for n in r.items(self._nodes[name])
            ]
            for name, kind in _ENGINE_OPTIONS.items()
            if name in self._nodes
        ]
        for combination in product(*lists):
            yield dict(combination)

    # ---- values

    def _list(self, key: str, read: Callable[[Node, str], Any], default: list[Any]) -> list[Any]:
        if key not in self._nodes:
            return default
        node = self._nodes[key]
        found = [read(item, key) for item in self._reader.items(node)]
        if not found:
            raise self._reader.refusal(node, key, "at least one value", "an empty list")
        if len(found) > MOST_JOBS:
            raise self._reader.error(node, f"{key}: expected at most {MOST_JOBS} values")
        return found

    def _integer(self, key: str, default: int, low: int, high: int) -> int:
        found = self._optional(key, low, high)
        return default if found is None else found

    def _optional(self, key: str, low: int, high: int) -> int | None:
        if key not in self._nodes:
            return None
        return self._reader.integer(self._nodes[key], key, low, high)

    def _number(self, key: str, default: float, low: float, high: float) -> float:
        if key not in self._nodes:
            return default
        return self._reader.number(self._nodes[key], key, low, high)

    def _engine(self, node: Node, key: str) -> str:
        name = self._reader.string(node, key)
        if name not in ENGINES:
            raise self._reader.refusal(node, key, f"one of {', '.join(ENGINES)}", name)
        return name

    def _type(self, node: Node, key: str) -> str | None:
        from ...export.writer.mixes import file_type

        name = self._reader.string(node, key)
        if name == AS_IS:
            return None
        try:
            return file_type(name).name
        except OptionError as error:
            raise self._reader.error(node, f"{error} (or {AS_IS})") from None

    def _tensor_type(self, node: Node, key: str) -> str:
        from ...export.writer.mixes import check_types

        name = self._reader.string(node, key)
        try:
            check_types(key, [name])
        except OptionError as error:
            raise self._reader.error(node, str(error)) from None
        return name

    def _budget(self, node: Node, key: str) -> str:
        text = self._reader.string(node, key)
        if text != RESIDENT:
            try:
                check_memory(text)
            except OptionError as error:
                raise self._reader.error(node, f"{error}, or {RESIDENT}") from None
        return text

    def _model(self, node: Node, key: str) -> str:
        """A model; a path from the specification's folder is made absolute if the file exists."""
        text = self._reader.string(node, key)
        if text.startswith("hf:"):
            return text
        beside = self._beside(text)
        return str(beside.absolute()) if os.path.exists(beside) else text

    def _beside(self, text: str) -> Path:
        """A path in the specification, resolved from the specification's folder."""
        return self._reader.path.parent / os.path.expanduser(text)

    def _read_text(self, texts: dict[str, str]) -> str:
        """The sha256 of the group's text."""
        node = self._nodes["text"]
        path = self._beside(self._reader.string(node, "text"))
        try:
            if path.exists() and not path.is_file():
                raise self._reader.error(node, f"{path}: expected a file")
            if path.stat().st_size > _MOST_TEXT:
                raise self._reader.error(node, f"{path}: expected at most {_MOST_TEXT >> 20} MiB")
            data = path.read_bytes()
            text = data.decode("utf-8")
        except OSError as error:
            raise self._reader.error(node, f"{path}: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise self._reader.error(
                node, f"{path}: expected UTF-8 text, found byte {error.start} not to be"
            ) from None
        digest = hashlib.sha256(data).hexdigest()
        texts[digest] = text
        return digest
