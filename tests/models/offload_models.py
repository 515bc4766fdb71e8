"""What the offloading tests share: tiny mixtures, budgets for them, runs to compare bit for bit."""

from __future__ import annotations

import re
import struct
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import stoker
from stoker.offload.profile.profile import PREDICTORS as PREDICTORS_OF_PROFILES
from stoker.offload.profile.profile import fit, record
from stoker.offload.profile.profile_fit import Shape
from stoker.runtime import _core
from stoker.runtime.base import errors
from tiny_models import VARIANTS, WIDE, quantized, some_tokens, spec_of, tensors, write_metadata

ROOT = Path(__file__).resolve().parents[2]
CONTEXT = 192
PROMPT = 60  # tokens
DECODE = 16
MEBIBYTE = 1 << 20


def listed(path: str, macro: str) -> list[str]:
    """Names in one of the engine's lists: a new member is tested without an edit here."""
    text = (ROOT / path).read_text(encoding="utf-8")
    return re.findall(rf"^{macro}\((\w+),", text, re.MULTILINE)


POLICIES = listed("offload/policy/policies.inc", "STOKER_POLICY")
PREDICTORS = listed("offload/predict/predictors.inc", "STOKER_PREDICTOR")
BACKENDS = listed("offload/io/io_backends.inc", "STOKER_IO_BACKEND")


@dataclass(frozen=True)
class TinyMixture:
    """A variant of tiny_models, with the type of each expert matrix by layer and expert."""

    variant: str
    quant: str = "F32"
    # (layer, expert or -1 where experts share a tensor, "gate" "up" "down") -> type
    expert_type: Callable[[int, int, str], str] | None = None
    shard_tensors: int = 0  # tensors a shard; 0: one file
    overrides: dict[str, Any] = field(default_factory=dict)

    def write(self, folder: Path) -> Path:
        """Writes the model; returns its path, or that of its first shard."""
        family, overrides = VARIANTS[self.variant]
        overrides = {**overrides, **self.overrides}
        seed = overrides.pop("seed", 0)
        s = spec_of(family, **overrides)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "model.gguf"
        out = gguf.GGUFWriter(str(path), s.arch, split_max_tensors=self.shard_tensors)
        write_metadata(out, s)
        for name, values in tensors(s, seed):
            kind = self._type(name, values)
            out.add_tensor(name, quantized(values, kind), raw_dtype=gguf.GGMLQuantizationType[kind])
        out.write_header_to_file()
        out.write_kv_data_to_file()
        out.write_tensors_to_file()
        out.close()
        return path if path.is_file() else next(folder.glob("*-00001-of-*.gguf"))

    def _type(self, name: str, values: npt.NDArray[np.float32]) -> str:
        if values.ndim < 2 or "ffn_gate_inp" in name:
            return "F32"
        expert = re.fullmatch(r"blk\.(\d+)\.ffn_(gate|up|down)(?:_exps|\.(\d+))\.weight", name)
        if self.expert_type and expert:
            return self.expert_type(int(expert[1]), int(expert[3] or -1), expert[2])
        return self.quant


def by_layer(*types: str) -> Callable[[int, int, str], str]:
    """Experts of layer i have the type types[i % n]: several sizes of slots."""
    return lambda layer, expert, part: types[layer % len(types)]


def by_expert(*types: str) -> Callable[[int, int, str], str]:
    """Expert e of layer i has the type types[(e + i) % n]; needs one tensor an expert."""
    return lambda layer, expert, part: types[(expert + layer) % len(types)]


def larger_down(layer: int, expert: int, part: str) -> str:
    """As published K-quant mixtures are: the down projection in a larger type, in some layers."""
    return "Q6_K" if part == "down" and layer % 2 == 0 else "Q4_K"


# F32 experts of 64 x 64 are 112 KB apart in the file: three reads an expert. Those of smaller types
# lie so near each other that an expert is one read, which brings other experts' bytes along.
MIXTURES: dict[str, TinyMixture] = {
    "mixtral": TinyMixture("mixtral"),
    "mixtral-split": TinyMixture("mixtral-split", expert_type=by_expert("F32", "Q4_0", "F16")),
    "qwen2moe": TinyMixture("qwen2moe", "Q4_0"),
    "olmoe": TinyMixture("olmoe-top4", "Q8_0"),
    "qwen3moe": TinyMixture("qwen3moe-top3", "Q8_0", by_layer("Q4_0", "F32", "Q8_0")),
    "qwen3moe-odd-sizes": TinyMixture("qwen3moe-odd-sizes"),
    "qwen3moe-shards": TinyMixture("qwen3moe", shard_tensors=5),
    "smallthinker": TinyMixture("smallthinker"),
    "smallthinker-sigmoid": TinyMixture("smallthinker-sigmoid", "Q4_1", by_layer("F16", "Q4_1")),
    "all-experts": TinyMixture("mixtral-all"),
    "k-quants": TinyMixture(
        "mixtral", "Q4_K", larger_down, overrides={**WIDE, "n_expert": 12, "n_expert_used": 3}
    ),
}
# And the first variant of every other family of mixtures.
_tested = {spec_of(VARIANTS[mixture.variant][0]).arch for mixture in MIXTURES.values()}
for _name, (_family, _) in VARIANTS.items():
    if spec_of(_family).mixture and spec_of(_family).arch not in _tested:
        _tested.add(spec_of(_family).arch)
        MIXTURES[_name] = TinyMixture(_name)


@dataclass(frozen=True)
class Budgets:
    """least: smallest budget that is accepted; whole: every expert fits; bytes."""

    least: int
    whole: int

    def part(self, share: float) -> int:
        """Between them: 0 the least, 1 the whole."""
        return int(self.least + share * (self.whole - self.least))


def engine(path: Path, memory: int = 0, **options: Any) -> _core.Engine:
    """The model with CONTEXT tokens, on one thread; memory 0: every expert resident."""
    options = {"threads": 1, "context": CONTEXT, **options}
    if memory:
        options["memory"] = memory
    return _core.Engine(_core.GgufFile(str(path)), **options)


def budgets(path: Path, **options: Any) -> Budgets:
    """As the planner says."""
    plan = engine(path, 1 << 40, **options).plan
    fixed = plan["process_bytes"] + plan["weight_bytes"] + plan["kv_bytes"] + plan["scratch_bytes"]
    # The margin of a budget this small, not that of the terabyte.
    whole = fixed + plan["slot_bytes"] + 12 * MEBIBYTE
    try:
        engine(path, 1, **options)
    except errors.BudgetError as error:
        return Budgets(named_minimum(error), whole)
    raise AssertionError("a budget of one byte")


def named_minimum(error: BaseException) -> int:
    """N of "expected at least N bytes"."""
    found = re.search(r"memory: expected at least (\d+) bytes", str(error))
    assert found, error
    return int(found[1])


def greedy(
    sequence: _core.Sequence, prompt: npt.NDArray[np.int32], decode: int, pieces: int = 1
) -> bytes:
    """Logits after each of the prompt's tokens and of `decode` greedy ones, and these tokens."""
    parts = [sequence.eval_all(p) for p in np.array_split(prompt, pieces)]
    made = [int(parts[-1][-1].argmax())]
    for _ in range(decode):
        parts.append(sequence.eval_all(made[-1:], "decode"))
        made.append(int(parts[-1][0].argmax()))
    return b"".join(p.tobytes() for p in parts) + np.array(made, np.int32).tobytes()


def run(e: _core.Engine, *, seed: int = 0, decode: int = DECODE, pieces: int = 1) -> bytes:
    """greedy() from an empty sequence."""
    return greedy(e.sequence(), prompt(e, seed), decode, pieces)


def prompt(e: _core.Engine, seed: int = 0, n: int = PROMPT) -> npt.NDArray[np.int32]:
    """n pseudo-random tokens of the engine's vocabulary."""
    return (some_tokens(n, seed) % e.config["n_vocab"]).astype(np.int32)


class Model:
    """A model file with its budgets and what the resident engine computes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.resident = engine(path)
        self.budgets = budgets(path)
        self._budgets: dict[str, Budgets] = {}
        self._expected: dict[tuple[int, int], bytes] = {}
        self._states: dict[str, bytes] = {}

    def expected(self, seed: int = 0, decode: int = DECODE) -> bytes:
        """run() of the resident engine."""
        key = (seed, decode)
        if key not in self._expected:
            self._expected[key] = run(self.resident, seed=seed, decode=decode)
        return self._expected[key]

    def offloaded(self, share: float, **options: Any) -> _core.Engine:
        """An engine in a part of what these options take; its predictor knows what it needs."""
        state = self.state(options.get("predictor", ""))
        sizes = {k: options[k] for k in ("threads", "context", "kv_type") if k in options}
        key = f"{sizes} {len(state)}"
        if key not in self._budgets:
            # A state takes memory, too.
            needs = {"predictor": options["predictor"], "predictor_state": state} if state else {}
            self._budgets[key] = budgets(self.path, **sizes, **needs)
        memory = self._budgets[key].part(share)
        return engine(self.path, memory, predictor_state=state, **options)

    def state(self, predictor: str) -> bytes:
        """What `predictor` learns of other prompts than run()'s; of the oracle, run()'s routing."""
        if predictor not in ("oracle", *PREDICTORS_OF_PROFILES):
            return b""
        if predictor not in self._states:
            make = self._routing if predictor == "oracle" else self._fit
            self._states[predictor] = make(predictor)
        return self._states[predictor]

    def _fit(self, predictor: str) -> bytes:
        model = stoker.load(self.path, threads=1, context=CONTEXT)
        sequences = [prompt(self.resident, seed, CONTEXT).tolist() for seed in (11, 12)]
        with tempfile.TemporaryDirectory() as folder:
            return fit(record(model, sequences, folder), [predictor])[predictor]

    def _routing(self, predictor: str) -> bytes:
        e = engine(self.path, self.budgets.whole)
        e.record_routing(True)
        for seed in (0, 1):
            run(e, seed=seed)
        t = e.take_routing()
        c = e.config
        shape = Shape(*(c[k] for k in ("n_layer", "n_embd", "n_expert", "n_expert_used")))
        evaluations, first = np.unique(t["evaluation"], return_index=True)
        parts = [shape.header(predictor), struct.pack("<q", len(evaluations))]
        for evaluation, i in zip(evaluations, first, strict=True):
            rows = t["expert"][t["evaluation"] == evaluation]  # by layer, token, rank
            parts += [struct.pack("<q", t["tokens"][i]), rows.astype("<u2").tobytes()]
        return b"".join(parts)


def consistent(counts: dict[str, Any], *, interrupted: bool = False) -> None:
    """Asserts what holds of every store's counters between evaluations."""
    acquired = counts["hits"] + counts["late"] + counts["misses"]
    assert acquired == sum(counts["layer_uses"]) > 0
    assert counts["hits"] == sum(counts["layer_hits"])
    for kind in ("hits", "late", "misses"):
        assert 0 <= counts[f"decode_{kind}"] <= counts[kind]
    assert max(counts["prefetches_used"], counts["cancelled"]) <= counts["prefetches"]
    # What an interrupted forward pass had asked for is late, too, where the next one finds it on
    # the way, and a prefetch that it used may be cancelled after that.
    if not interrupted:
        assert counts["prefetches_used"] + counts["cancelled"] <= counts["prefetches"]
        assert counts["late"] <= counts["prefetches_used"]
    assert 0 <= counts["decode_stall_s"] <= counts["stall_s"]
    assert counts["decode_bytes"] <= counts["demand_bytes"] + counts["prefetch_bytes"]
