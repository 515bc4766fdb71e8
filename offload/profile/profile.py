"""Profiles: files with the states of predictors that were trained for one model.

    b"SKPROF1\\n", u64 length of the header, header (JSON), states one after another

The header names the model (by a digest of its routers), and for each predictor the offset of its
state (from the header's end), its length and CRC-32. Integers are little-endian.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import tempfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...runtime.base.errors import DeviceError, OptionError
from ...runtime.base.progress import Progress
from ...runtime.files.json_text import parse
from ...runtime.files.output_file import check_output
from ...runtime.files.whole_file import read_whole
from .profile_fit import Floats, Recording, Shape, fit_linear
from .profile_path import fit_path

if TYPE_CHECKING:
    from ...runtime._core import GgufFile
    from ...runtime.backends.engine import LoadedModel

PREDICTORS = ("linear", "path", "transition")  # predictors that learn from a profile
DISTANCES = 4  # layers ahead; the prefetch controller looks no further

_MAGIC = b"SKPROF1\n"
_MOST_HEADER = 1 << 24
_MOST_LAYERS = 1 << 16
_HELD_OUT = 8  # one part in so many of the text is held out to measure recall
_WINDOW = 512  # tokens of a sequence


@dataclass(frozen=True)
class Recall:
    """The share of the used experts that a predictor guessed.

    distance: layers ahead. width: experts guessed for each layer. layers [n_layer]: the share by
    layer, None for those without experts. mean: over the layers from `distance` on, which every
    predictor can know; None if it guesses none of them.
    """

    predictor: str
    distance: int
    width: int
    mean: float | None
    layers: tuple[float | None, ...]


@dataclass(frozen=True)
class Profile:
    """The result of `make_profile`: the file and its predictors' recalls on held-out text."""

    path: Path
    nbytes: int
    tokens: int
    recalls: tuple[Recall, ...]


def routers_digest(file: GgufFile) -> str:
    """Returns the digest of a model's routers. Raises OptionError if it has none."""
    digest = hashlib.sha256()
    found = False
    names = {f"blk.{layer}.ffn_gate_inp.weight" for layer in range(_MOST_LAYERS)}
    for tensor in file.tensors:
        if tensor.name not in names:
            continue
        found = True
        digest.update(f"{tensor.name} {tensor.type} {tensor.shape}\n".encode())
        digest.update(_tensor_bytes(file, tensor))
    if not found:
        raise OptionError(f"{file.path}: expected a mixture of experts, found no routers")
    return digest.hexdigest()


def _tensor_bytes(file: GgufFile, tensor: Any) -> bytes:
    with open(file.shards[tensor.shard], "rb") as shard:
        shard.seek(tensor.offset)
        data = shard.read(tensor.nbytes)
    if len(data) != tensor.nbytes:
        raise OptionError(f"{file.path}: {tensor.name}: expected {tensor.nbytes} bytes")
    return data


def predictor_state(path: str | os.PathLike[str], predictor: str | None, file: GgufFile) -> bytes:
    """Reads the state of `predictor` for the model in `file`, the engine's predictor_state.

    Raises OptionError for a predictor that learns nothing, a file that is no profile, and a profile
    of another model or without that predictor.
    """
    if predictor not in PREDICTORS:
        raise OptionError(
            f"profile: expected one of the predictors {', '.join(PREDICTORS)}, "
            f"found {predictor or 'the default one'}"
        )
    header, data = _read(Path(path))
    digest = routers_digest(file)
    if header["routers"] != digest:
        raise OptionError(
            f"{path}: expected a profile of {file.path}, found one of another model "
            f"({header['model'].get('name') or 'unnamed'})"
        )
    section = header["sections"].get(predictor)
    if section is None:
        raise OptionError(
            f"{path}: expected a profile with {predictor}, found {', '.join(header['sections'])}: "
            f"make one with `stoker profile --predictor {predictor}`"
        )
    offset, nbytes, check = section
    state = data[offset : offset + nbytes]
    if len(state) != nbytes or zlib.crc32(state) != check:
        raise OptionError(f"{path}: {predictor}: the profile is damaged")
    return state


def _read(path: Path) -> tuple[dict[str, Any], bytes]:
    """Reads the header and states of a profile."""
    try:
        content = read_whole(path)
    except OSError as error:
        raise OptionError(f"{path}: {error.strerror or error}") from None
    if content[: len(_MAGIC)] != _MAGIC:
        raise OptionError(f"{path}: expected a profile (made by `stoker profile`), found none")
    begin = len(_MAGIC) + 8
    try:
        (nbytes,) = struct.unpack_from("<Q", content, len(_MAGIC))
        if nbytes > _MOST_HEADER:
            raise ValueError
        header = parse(content[begin : begin + nbytes])
        sections = header["sections"]
        valid = (
            isinstance(header["routers"], str)
            and isinstance(header["model"], dict)
            and all(
                len(s) == 3 and all(type(v) is int and v >= 0 for v in s) for s in sections.values()
            )
        )
        if not valid:
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError, struct.error):
        raise OptionError(f"{path}: the profile is damaged") from None
    return header, content[begin + nbytes :]


def write_profile(
    path: str | os.PathLike[str],
    *,
    model: Mapping[str, Any],
    routers: str,
    states: Mapping[str, bytes],
    recalls: Iterable[Recall] = (),
    tokens: int = 0,
) -> int:
    """Writes a profile, which appears whole or not at all. Returns its bytes; DeviceError."""
    target = Path(path)
    sections, at = {}, 0
    for name, state in states.items():
        sections[name] = (at, len(state), zlib.crc32(state))
        at += len(state)
    header = json.dumps(
        {
            "model": dict(model),
            "routers": routers,
            "tokens": tokens,
            "sections": sections,
            "recall": [asdict(recall) for recall in recalls],
        }
    ).encode()
    content = b"".join([_MAGIC, struct.pack("<Q", len(header)), header, *states.values()])
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with part.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, target)
    except OSError as error:
        raise DeviceError(f"{target}: {error.strerror or error}") from None
    finally:
        part.unlink(missing_ok=True)
    return len(content)


def record(
    model: LoadedModel,
    sequences: Sequence[Sequence[int]],
    folder: str,
    progress: Progress | None = None,
) -> Recording:
    """Runs the model over the sequences; keeps the hidden states in a file in `folder`."""
    config = model.config
    n_layer, n_embd = int(config["n_layer"]), int(config["n_embd"])
    shape = Shape(n_layer, n_embd, int(config["n_expert"]), int(config["n_expert_used"]))
    routers = np.zeros((n_layer, shape.n_expert, n_embd), dtype=np.float32)
    norms = np.ones((n_layer, n_embd), dtype=np.float32)
    biases: dict[int, Floats] = {}  # by layer; they affect only the choice of experts
    early = bool(config["routes_early"])  # the router reads the residual stream itself
    for layer, found in enumerate(model.engine.routers):
        if found is not None:
            routers[layer], norm, bias = found
            if norm is not None:
                norms[layer] = norm
            if bias is not None:
                biases[layer] = bias
    n = sum(map(len, sequences))
    hidden = np.memmap(
        os.path.join(folder, "hidden"), np.float16, "w+", shape=(n_layer + 1, n, n_embd)
    )
    logits = np.zeros((n_layer, n, shape.n_expert), dtype=np.float32)
    first = np.zeros(n, dtype=bool)
    sequence = model.engine.sequence()
    done = 0
    for tokens in sequences:
        sequence.truncate(0)
        taps, states = sequence.eval_hidden_taps(tokens)
        end = done + len(tokens)
        if early:  # only the order of logits matters, not their size
            taps = _unit(taps)
        hidden[:, done:end] = _unit(states)
        logits[:, done:end] = taps @ routers.transpose(0, 2, 1)
        for layer, bias in biases.items():  # experts are ranked by their gates with the bias
            logits[layer, done:end] = _gates(logits[layer, done:end], config["gating"]) + bias
        first[done] = True
        done = end
        if progress is not None:
            progress("hidden states", done, n)
    experts = np.argsort(-logits, axis=2, kind="stable")[:, :, : shape.n_expert_used]
    experts[[found is None for found in model.engine.routers]] = -1
    return Recording(
        shape,
        hidden,
        logits,
        np.ascontiguousarray(experts.transpose(1, 0, 2), dtype=np.int32),
        routers * norms[:, None, :],
        first,
    )


def _unit(x: Floats) -> Floats:
    """Scales the rows of the last axis to a mean square of 1; rows of zeros stay."""
    rms = np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True))
    return np.asarray(x / np.maximum(rms, np.float32(1e-20)))


def fit(
    recording: Recording,
    predictors: Sequence[str],
    progress: Progress | None = None,
    *,
    minutes: float = 0.0,
) -> dict[str, bytes]:
    """Trains predictors on a recording; returns their states. minutes: for distilling `linear`."""
    from ...runtime._core import replay_predictor

    states: dict[str, bytes] = {}
    for name in predictors:
        if name == "linear":
            states[name] = fit_linear(recording, DISTANCES, progress, seconds=60 * minutes)
        elif name == "path":
            states[name] = fit_path(recording, progress=progress)
        else:
            state = b""
            for begin in range(0, recording.n_tokens, _WINDOW):  # in parts, since floats are large
                part = recording.part(begin, begin + _WINDOW)
                replayed = replay_predictor(
                    name, state=state, distance=1, width=1, **_replayed(part)
                )
                state = replayed["state"]
            states[name] = state
    return states


def _replayed(recording: Recording) -> dict[str, Any]:
    return {
        "hidden": np.ascontiguousarray(recording.hidden, dtype=np.float32),
        "experts": recording.experts,
        "routers": recording.routers,
    }


def measure(
    recording: Recording,
    states: Mapping[str, bytes],
    widths: Sequence[int],
    distances: Sequence[int],
    progress: Progress | None = None,
) -> list[Recall]:
    """Measures the recall of each predictor, and of next_gate, by width and distance."""
    from ...runtime._core import replay_predictor

    arrays = _replayed(recording)
    found = []
    names = ["next_gate", *states]
    total, done = len(names) * len(widths) * len(distances), 0
    for name in names:
        for width in widths:
            for distance in distances:
                counted = replay_predictor(
                    name,
                    state=states.get(name, b""),
                    distance=distance,
                    width=width,
                    **arrays,
                )
                asked = np.array(counted["asked"])
                share = np.array(counted["found"]) / np.maximum(asked, 1)
                known = (asked > 0) & (np.arange(len(asked)) >= distance)
                found.append(
                    Recall(
                        name,
                        distance,
                        width,
                        float(share[known].mean()) if share[known].any() else None,
                        tuple(
                            float(s) if a > 0 else None for s, a in zip(share, asked, strict=True)
                        ),
                    )
                )
                done += 1
                if progress is not None:
                    progress("recall", done, total)
    return found


def check_predictors(names: Sequence[str]) -> None:
    """Raises OptionError for a predictor that learns nothing from a profile."""
    for name in names:
        if name not in PREDICTORS:
            raise OptionError(
                f"predictor: expected all, or some of {', '.join(PREDICTORS)}, found {name!r}"
            )


def make_profile(
    model: LoadedModel,
    out: str | os.PathLike[str],
    *,
    text: str | None = None,
    tokens: int = 4096,
    predictors: Sequence[str] = PREDICTORS,
    seed: int = 0,
    minutes: float = 0.0,
    progress: Progress | None = None,
) -> Profile:
    """Trains predictors of a mixture's next experts, and writes them to `out`.

    text: the text that the model is run on; None lets it write about as many tokens itself. The
    last eighth is held out: no predictor learns from it, and recalls are measured on it
    (next_gate's for comparison). minutes: the most for distilling `linear` from the routers'
    choices, after regression. Raises OptionError for a dense model, too short a text, an unknown
    predictor.
    """
    from .hidden_states import own_text

    check_predictors(predictors)
    target = Path(out)
    check_output(target)
    digest = routers_digest(model.file)
    if model.config.get("pregated"):
        raise OptionError(f"{model.path}: pre-gated: its experts are known without a profile")
    if text is None:
        sequences = own_text(model, tokens, seed, progress)
    else:
        ids = model.tokenizer.encode(text, add_special=False, parse_special=False)[:tokens]
        window = min(_WINDOW, model.engine.sequence().context)
        sequences = [ids[i : i + window] for i in range(0, len(ids), window)]
    n = sum(map(len, sequences))
    if n < 256:
        raise OptionError(f"text: expected at least 256 tokens to learn from, found {n}")
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
        recording = record(model, sequences, folder, progress)
        learnt = n - n // _HELD_OUT
        states = fit(recording.part(0, learnt), predictors, progress, minutes=minutes)
        used = recording.shape.n_expert_used
        recalls = measure(
            recording.part(learnt, n), states, (used, used + (used + 1) // 2), (1, 2, 3), progress
        )
    nbytes = write_profile(
        target,
        model={k: model.config[k] for k in ("architecture", "name", "n_layer", "n_expert")},
        routers=digest,
        states=states,
        recalls=recalls,
        tokens=n,
    )
    return Profile(target, nbytes, n, tuple(recalls))


def _gates(logits: Floats, gating: str) -> Floats:
    """Returns a router's gates of logits [tokens, n_expert], before any bias."""
    if gating == "sigmoid":
        return np.asarray(1 / (1 + np.exp(-logits)), dtype=np.float32)
    e = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(e / e.sum(axis=-1, keepdims=True), dtype=np.float32)


def oracle_state(routing: Mapping[str, Any], shape: Shape) -> bytes:
    """Returns the state of the predictor `oracle`, from the columns of Engine.take_routing().

    The engine must then evaluate the same tokens in the same chunks from its start.
    """
    evaluation = np.asarray(routing["evaluation"])
    order = np.lexsort((routing["rank"], routing["token"], routing["layer"], evaluation))
    experts = np.asarray(routing["expert"])[order].astype("<u2")
    starts = np.flatnonzero(np.diff(evaluation[order], prepend=-1))
    out = [shape.header("oracle"), struct.pack("<q", len(starts))]
    for begin, end in zip(starts, [*starts[1:], len(order)], strict=True):
        out.append(struct.pack("<q", int(np.asarray(routing["tokens"])[order[begin]])))
        out.append(experts[begin:end].tobytes())
    return b"".join(out)
