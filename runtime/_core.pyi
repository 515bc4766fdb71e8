"""The C++ core. One process-wide kernel table; immutable Engine; one mutable Sequence a session."""

from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from typing import Any

import numpy as np
import numpy.typing as npt

def control_groups(
    controller: str, groups: str = ..., mounts: str = ..., root: str = ...
) -> list[tuple[int, str, str]]:
    """(version, path, folder) of the process's control group and of those above it.

    groups, mounts: files like /proc/self/cgroup and mountinfo; root: of systems whose mounts
    cannot be read.
    """

def cpu_quota(groups: str = ..., mounts: str = ..., root: str = ...) -> int:
    """Processors of the tightest quota, rounded up; 0 where there is none."""

def close_gate() -> None:
    """Keeps other threads out of the interpreter, which is ending (registered with atexit)."""

def reset_gate() -> None:
    """Forgets threads that a forked process has not (registered with os.register_at_fork)."""

class TensorInfo:
    name: str
    type: str  # a name of formats.inc, or "type <id>" where unknown
    shape: tuple[int, ...]  # GGUF order: shape[0] is the contiguous dimension
    offset: int  # bytes from the start of its shard
    nbytes: int
    shard: int

class StringIds:
    """Text -> number in a Strings; of equal texts the last one's."""

    def get(self, text: str, fallback: int | None = None) -> int | None: ...
    def __contains__(self, text: object) -> bool: ...
    def __getitem__(self, text: str) -> int: ...

class Strings:
    """An array of strings in a file's metadata: views of its bytes, no copies."""

    def __len__(self) -> int: ...
    def __getitem__(self, i: int) -> str: ...
    def __iter__(self) -> Iterator[str]: ...
    @property
    def ids(self) -> StringIds: ...

class GgufFile:
    """A GGUF file or the first of its shards: header and directory, checked against the files."""

    def __init__(self, path: str) -> None: ...
    @staticmethod
    def header_is_whole(data: bytes, file_size: int, name: str) -> bool:
        """Whether data, the first bytes of a shard of file_size bytes, hold all of its header.

        name is for messages. Raises ModelFileError, UnsupportedModelError where what is there is
        wrong already.
        """
    path: str
    version: int
    shards: list[str]
    nbytes: int  # of all shards
    @property
    def metadata(self) -> dict[str, Any]: ...  # str, int, float, bool or list of these
    def get(self, key: str) -> Any: ...  # one value, None where absent (cheap: converts only it)
    def strings(self, key: str) -> Strings | None: ...  # an array of strings, not copied
    @property
    def unknown_metadata(self) -> list[str]: ...  # keys of its architecture that are not listed
    @property
    def tensors(self) -> list[TensorInfo]: ...

def metadata_keys() -> list[tuple[str, str, str]]:
    """(key, use, neutral values) of each metadata key that is known (metadata_keys.inc)."""

def metadata_key_use(key: str, architecture: str) -> str | None:
    """What a key of a file is to the engine: used, harmless, refused, no model; None: unknown."""

class Engine:
    """An immutable model: configuration, weights, plan. Shared by any number of sequences."""

    # threads 0: physical performance cores. context 0: the model's limit, at most 4096.
    # kv_type: "f16" or "f32". precision: "fast", "balanced" or "high" (engine.h, Precision).
    def __init__(
        self,
        file: GgufFile,
        *,
        threads: int = 0,
        context: int = 0,
        kv_type: str = "f16",
        precision: str = "balanced",
        memory: int = 0,  # bytes of the whole process; 0: everything in memory
        process_bytes: int = 0,  # of it taken before the engine
        policy: str = ...,
        predictor: str = ...,
        predictor_state: bytes = b"",  # of Engine.predictor_state() or a profile
        prefetch: str = "auto",  # on, off
        io: str = "pread_pool",
        readers: int = 4,
        direct: bool = True,
        cache: bool = True,
        overlap: bool = True,
    ) -> None: ...
    @property
    def config(self) -> dict[str, Any]: ...  # architecture, n_layer, n_embd, n_vocab, context, ...
    @property
    def plan(self) -> dict[str, Any]: ...  # bytes by kind: weights, kv, scratch; threads; isa
    @property
    def offload(self) -> dict[str, Any] | None:
        """Counters of the expert store since the load, None where all experts are in memory."""
    @property
    def stream(self) -> dict[str, Any] | None:
        """Counters of the streamed weights, None where all are pinned."""
    @property
    def sessions(self) -> tuple[int, int]: ...  # open sequences, bytes that the cache lent them
    @property
    def survives_fork(self) -> bool: ...  # works in a process that is forked after the load
    def record_routing(self, on: bool) -> None: ...  # OptionError where everything is in memory
    def take_routing(self) -> dict[str, npt.NDArray[Any]]:
        """What was recorded since the last call: evaluation, phase (0 prompt, 1 decode, 2 verify),
        tokens, token, id, sequence, layer, rank, expert, weight, source (0 miss, 1 hit, 2 late) and
        wait_us, each [uses]."""
    @property
    def routers(self) -> list[tuple[Any, Any, Any] | None]:
        """Of each layer (router [n_expert, n_embd], norm of what it reads [n_embd] or None for the
        residual stream, what is added to its gates for the choice [n_expert] or None); None: none.
        """
    def predictor_state(self) -> bytes: ...  # what the predictor has learnt; b"": nothing
    def empty_cache(self) -> None: ...  # for measurements from cold
    def flash_bandwidth(self, nbytes: int, seed: int = 1) -> float: ...  # bytes/s
    def sequence(self) -> Sequence: ...
    def eval(
        self, rows: list[tuple[Sequence, int]], phase: str, all_logits: bool = False
    ) -> npt.NDArray[np.float32] | None:
        """Appends a token for each row, of any sequences of this engine, in one forward pass.

        Rows of one sequence are in their order. Each sequence keeps the logits of its last row;
        all_logits: returns those of every row, [rows, n_vocab]. Each row has the bits that it would
        have alone. phase: prompt, decode (the next token of each) or verify (drafts).
        """
    def decode(self, steps: list[tuple[Sequence, int, Sampler]]) -> list[int | None]:
        """Evaluates a token of each sequence in one forward pass, and chooses the next of each.

        None: the sampler could not; Sequence.sample says why.
        """
    def score(self, rows: list[tuple[Sequence, int, int]]) -> npt.NDArray[np.float64]:
        """Appends rows (sequence, token, target); -ln p(target) after each, nats [rows]."""

def architectures() -> list[str]:
    """The architectures that the engine runs (arch/archs.inc)."""

def plan_constants() -> dict[str, int]:
    """readers; of the ring of streamed weights ring_reads, least_read and most_read (bytes)."""

def plan(
    file: GgufFile,
    *,
    threads: int = 0,
    context: int = 0,
    kv_type: str = "f16",
    precision: str = "balanced",
    memory: int = 0,
    process_bytes: int = 0,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(Engine.config, Engine.plan) of a load with these options, from the header alone.

    plan["least_memory"] is the smallest budget that would do; plan["work"] is what one token
    multiplies with: part (layers, experts, output), format, balanced (two terms of activations),
    products, weights, bytes. Raises what the load would, BudgetError included.
    """

class Sequence:
    """KV cache and position of one sequence. Not for two threads at once (raises OptionError)."""

    @property
    def position(self) -> int: ...  # tokens evaluated
    @property
    def context(self) -> int: ...
    def eval(self, tokens: SequenceOf[int] | npt.NDArray[np.int32], phase: str = "prompt") -> None:
        """Appends tokens (n >= 1); afterwards logits() are those after the last one.

        phase: what they are, prompt, decode (a token that was chosen) or verify (drafts).
        """
    def decode(self, token: int, sampler: Sampler) -> int:
        """Appends a token that was chosen before; chooses the next and tells the sampler of it."""
    def logits(self) -> npt.NDArray[np.float32]: ...  # [n_vocab], a copy
    def eval_all(
        self, tokens: SequenceOf[int] | npt.NDArray[np.int32], phase: str = "prompt"
    ) -> npt.NDArray[np.float32]:
        """Appends tokens; returns the logits after each, [n, n_vocab]."""
    def eval_nll(self, tokens: SequenceOf[int] | npt.NDArray[np.int32]) -> npt.NDArray[np.float64]:
        """Appends n tokens; returns -log p(tokens[i + 1] | ...) for i < n - 1, [n - 1], in nats."""
    def hidden(self) -> npt.NDArray[np.float32]: ...  # [n_embd]: final norm of the last token
    def eval_hidden(
        self, tokens: SequenceOf[int] | npt.NDArray[np.int32]
    ) -> npt.NDArray[np.float32]:
        """Appends tokens; returns the final-norm hidden state of each, [n, n_embd]."""
    def eval_taps(self, tokens: SequenceOf[int] | npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
        """Appends tokens; returns the (normalised) input of each layer's feed-forward or router.

        float32 [n_layer, n, n_embd].
        """
    def eval_hidden_taps(
        self, tokens: SequenceOf[int] | npt.NDArray[np.int32]
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Appends tokens; returns eval_taps and what predictors see.

        The latter, [n_layer + 1, n, n_embd]: the embeddings, then the residual stream while each
        layer's experts are being read (zeros for layers without experts).
        """
    def sample(self, sampler: Sampler) -> int:
        """Samples from logits() and tells the sampler of the choice; no evaluation."""
    def step(self, sampler: Sampler) -> int:
        """sample(), then eval() of the token: one token of generation in one call."""
    def truncate(self, position: int) -> None:
        """Forgets everything from `position` on.

        All of it, so that `position` is 0, where layers with sliding windows have left behind what
        the tokens there attend to.
        """
    def fork(self) -> Sequence: ...  # one that holds the same; memory is shared until one writes
    def cancel(self) -> None: ...  # from any thread: eval raises Cancelled at the next layer
    def forget_cancel(self) -> None: ...  # one that came too late to meet an evaluation
    @property
    def stats(self) -> dict[str, Any]:
        """Its part of what its evaluations cost: prompt_tokens, prompt_seconds, decode_tokens,
        decode_seconds, decode_bytes; experts, stream: dicts of the counters of Engine.offload and
        Engine.stream, None where there are none."""

class ActivationSums:
    """Sums of the squares of what every matrix of an engine multiplies with."""

    def __init__(self, engine: Engine) -> None: ...
    def eval(self, sequence: Sequence, tokens: npt.NDArray[np.int32]) -> npt.NDArray[np.float64]:
        """Sequence.eval_nll(tokens), and adds the inputs of all its products."""
    @property
    def tensors(self) -> dict[str, tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]]:
        """Tensor -> (sums [experts or 1, cols], tokens [experts or 1]); a copy."""

class Sampler:
    """The sampling stages and their state (sampling/stages.inc)."""

    # Options: temperature, seed, logprobs, logit_bias {token: number}, and those of the stages:
    # numbers, or lists of tokens. Raises OptionError for one that is out of range or of no stage.
    def __init__(self, n_vocab: int, **options: Any) -> None: ...
    def sample(self, logits: npt.NDArray[np.float32]) -> int: ...  # peek(), then commit()
    def peek(self, logits: npt.NDArray[np.float32]) -> int: ...  # logits [n_vocab], unchanged
    def commit(self, token: int) -> None: ...  # takes the token that peek() gave
    @property
    def history(self) -> int: ...  # tokens before the first choice to accept(), -1: all
    def set_mask(self, allowed: npt.NDArray[np.uint32] | None) -> None:
        """The tokens that may be chosen, a bit each, [(n_vocab + 31) // 32]; None: all."""
    def accept(self, token: int) -> None: ...  # a prompt token, for the penalties
    def reset(self) -> None: ...  # no history, first draw of the seed
    @property
    def n_vocab(self) -> int: ...
    @property
    def logprob(self) -> float: ...  # of the last choice, from the unmodified logits, in nats
    @property
    def top_logprobs(self) -> list[tuple[int, float]]: ...  # `logprobs` best of the last choice

def formats() -> list[dict[str, Any]]: ...  # name, id, block, bytes, quantizes
def isas() -> list[tuple[str, bool]]: ...  # every compiled ISA and whether it executes here
def active_isa() -> str: ...
def cpu() -> dict[str, Any]: ...  # model, logical, physical, performance cores, features
def quantize(
    format: str,
    x: npt.NDArray[np.float32],
    *,
    importance: npt.NDArray[np.float32] | None = None,
    threads: int = 1,
) -> npt.NDArray[np.uint8]:
    """Raises OptionError where x is not finite and the format is an integer one."""

def make_experts(
    format: str,
    x: npt.NDArray[np.float32],
    *,
    axis: str,
    order: npt.NDArray[np.int32],
    seeds: npt.NDArray[np.uint64],
    noise: float,
    threads: int = 1,
) -> npt.NDArray[np.uint8]:
    """Permuted, noised, quantized copies of x [rows, cols]: uint8 [experts, rows, row bytes].

    axis: "rows" or "columns", which of them order [experts, rows or cols] rearranges: neuron i of
    an expert is x's order[i]. noise: relative standard deviation; seeds [experts]. Raises
    OptionError.
    """

def requantize(
    source_format: str,
    data: npt.NDArray[np.uint8],
    rows: int,
    cols: int,
    format: str,
    importance: npt.NDArray[np.float32] | None = None,
    threads: int = 1,
    *,
    first_row: int = 0,
) -> npt.NDArray[np.uint8]:
    """Rows of one tensor type in another: uint8 [rows, row bytes], the same for any threads.

    data: rows * row bytes of `source_format`, contiguous. importance: [cols], weights of the
    squared error. first_row: added to rows in messages. Raises ModelFileError naming the first
    weight that is not finite or that `format` cannot hold, OptionError.
    """

def dequantize(format: str, data: npt.NDArray[np.uint8], n: int) -> npt.NDArray[np.float32]: ...
def matmul(
    format: str, isa: str, w: npt.NDArray[np.uint8], rows: int, x: npt.NDArray[np.float32]
) -> npt.NDArray[np.float32]:
    """y[t, r] = W[r] . x[t]; x [tokens, cols]; w rows * row_bytes bytes. For tests and benches."""

def read_bandwidth(threads: int, bytes: int) -> float: ...  # bytes a second
def int8_peak(isa: str, threads: int) -> float: ...  # operations a second, a multiply-add is two
def float32_peak(isa: str, threads: int) -> float: ...  # likewise

class StorageFile:
    """A file whose reads are measured. Raises DeviceError where the system fails.

    Not for two threads at once.
    """

    def __init__(self, path: str) -> None: ...  # an existing file
    @staticmethod
    def scratch(folder: str) -> StorageFile: ...  # empty; has no name and is gone with the object
    def append(self, bytes: int) -> None: ...  # pseudo-random, stored on return; of 4096 each
    def read(
        self,
        mode: str,
        block: int,
        depth: int,
        seconds: float,
        seed: int = 1,
        huge_pages: bool = True,
    ) -> dict[str, Any]:
        """Reads random blocks, none twice and none out of memory: reads, bytes, seconds.

        mode: "direct", "buffered" or "mapped"; block: bytes, a multiple of 4096; depth: reads
        under way at a time, by a thread each; huge_pages: of the memory that is read into, as the
        engine's is. Ends after `seconds` or with the file; reads is 0
        where all of it was in memory. Raises OptionError.
        """
    @property
    def nbytes(self) -> int: ...
    @property
    def descriptor(self) -> int: ...
    @property
    def direct(self) -> bool: ...  # whether the file system takes direct I/O

def kernel_speed(
    format: str,
    isa: str,
    rows: int,
    cols: int,
    tokens: int,
    threads: int = 1,
    seconds: float = 0.25,
    quantize: bool = False,
) -> float:
    """Seconds of one product, as the engine runs it: y[t, r] = W[r] . x[t].

    W [rows, cols] of made-up weights in huge pages, x [tokens, cols]. The fastest of the products
    that fit in about `seconds` after one to warm up; where the first takes longer than that, its
    time. With 1 token and rows * row bytes well above the caches this is decoding (weights a
    second = rows * cols / result); with 512 tokens and some hundred rows, a prompt (operations a
    second = 2 * rows * cols * tokens / result). Where the format has no kernel for the ISA, the
    nearest below it runs. quantize: quantizing the activations is timed too, which the engine does
    once for several products. Raises OptionError: unknown format, ISA that does not execute here,
    size below 1, cols no multiple of the block and of 32; BudgetError: no memory.
    """

replayed_predictors: list[str]  # that simulate() takes

def policies() -> list[tuple[str, str]]: ...  # (name, summary) of every online cache policy
def replay_predictor(
    predictor: str,
    *,
    state: bytes,
    hidden: npt.NDArray[np.float32],
    experts: npt.NDArray[np.int32],
    routers: npt.NDArray[np.float32],
    distance: int,
    width: int,
    count_from: int = 0,
) -> dict[str, Any]:
    """Decodes a recording with a predictor: how many of the used experts did it guess?

    hidden [n_layer + 1, tokens, n_embd]: the embeddings, then what each layer's look-ahead sees.
    experts [tokens, n_layer, used]; -1 in layers without. routers [n_layer, n_expert, n_embd].
    Returns found and asked, [n_layer] experts from token `count_from` on, and the predictor's
    state at the end. Raises OptionError.
    """

def predictors() -> list[tuple[str, str]]: ...  # (name, summary) of every predictor
def io_backends() -> list[tuple[str, str]]: ...  # (name, summary) of every I/O backend
def simulate(
    *,
    evaluation: npt.NDArray[np.int64],
    layer: npt.NDArray[np.int32],
    offset: npt.NDArray[np.int64],
    expert: npt.NDArray[np.int32],
    weight: npt.NDArray[np.float32],
    token: npt.NDArray[np.int32],
    decode: npt.NDArray[np.uint8],
    sequence: npt.NDArray[np.int64],
    n_layer: int,
    n_expert: int,
    n_expert_used: int,
    policy: str,
    slots: int,
    count_from: int = 0,
    predictor: str = "",
) -> dict[str, Any]:
    """Replays routing through a cold cache; policy: one of policies() or "belady"; predictor: none
    or one of replayed_predictors.

    evaluation, layer [visits], offset [visits + 1], expert, weight [uses], token [visits] or empty
    (offload/trace/simulate.h).
    Returns uses, misses and layer_uses, layer_misses [n_layer], counted from evaluation
    `count_from` on. Raises OptionError for slots < 1, unknown policies and inconsistent arrays.
    """
