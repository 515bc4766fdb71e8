"""Matrix products of every weight format, instruction set and shape, against the machine's limits.

The limits are measured in the same run: memory bandwidth (it bounds decode) and int8 arithmetic
out of registers (it bounds prefill). ggml's products of the same shapes are timed right beside
ours if there is a Python with llama-cpp-python (ggml_kernels.py).
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from ...offload.plan.device_profile import current_id
from ...runtime.base.errors import DeviceError, OptionError
from ...runtime.base.progress import Progress

SHAPES = ((576, 1536), (2048, 2048))  # rows, columns
TOKENS = (1, 512)
SECONDS = 0.1  # duration of one measurement
# Fewer tokens count as decode: the matrix comes from memory, as each layer's does.
PROMPT_TOKENS = 8
_LEAST_STACK = 96 << 20  # bytes
_MOST_STACK = 768 << 20
_GGML = Path(__file__).with_name("ggml_kernels.py")
_GGML_LIMIT_S = 120.0


@dataclass(frozen=True)
class KernelRow:
    """One product. Times are seconds, rates per second.

    rows, cols: the matrix's; stacked: how many matrices were multiplied one after the other, so
    that decode finds none in a cache (1 for prompts). tokens: multiplied at a time. bytes_s: bytes
    of weights; ops_s: a multiply-add is two. of_memory, of_peak: shares of the limits of the same
    run (of the float32 peak if the weights are floats). ggml_s: ggml's time for the same product in
    its faster layout; repacked: whether that was the rearranged one; None: not measured.
    """

    format: str
    isa: str
    rows: int
    cols: int
    tokens: int
    stacked: int
    seconds: float
    bytes_s: float
    ops_s: float
    of_memory: float
    of_peak: float
    ggml_s: float | None = None
    repacked: bool | None = None

    @property
    def faster(self) -> float | None:
        """Our speed as a multiple of ggml's."""
        return None if self.ggml_s is None else self.ggml_s / self.seconds


@dataclass
class KernelBench:
    """Result of `measure`.

    device: DeviceProfile.id; memory_s: bytes read per second; int8_s, float32_s: operations per
    second out of registers, by ISA; ggml: version of llama-cpp-python.
    """

    cpu: str
    device: str
    threads: int
    memory_s: float
    int8_s: dict[str, float]
    float32_s: dict[str, float]
    ggml: str | None
    rows: list[KernelRow] = field(default_factory=list)


def measure(
    *,
    formats: Sequence[str] | None = None,
    isas: Sequence[str] | None = None,
    shapes: Sequence[tuple[int, int]] = SHAPES,
    tokens: Sequence[int] = TOKENS,
    threads: int = 1,
    seconds: float = SECONDS,
    baseline_python: str | None = None,
    progress: Progress | None = None,
) -> KernelBench:
    """Measures all combinations; those whose columns a format cannot hold are left out.

    formats: names, all by default. isas: by default all that execute here except the scalar
    reference. shapes: (rows, columns). threads: used by every product. seconds: about how long
    each is repeated; its fastest time counts. baseline_python: an interpreter that has
    llama-cpp-python. Raises OptionError, DeviceError.
    """
    from ...runtime import _core

    known = {f["name"]: f for f in _core.formats()}
    chosen = _chosen("format", formats, known, list(known))
    usable = [name for name, executes in _core.isas() if executes]
    used = _chosen("isa", isas, usable, [n for n in usable if n != "scalar"] or usable)
    for what, numbers in (("tokens", tokens), ("rows and columns", [n for s in shapes for n in s])):
        if not numbers or min(numbers) < 1:
            raise OptionError(f"{what}: expected numbers of at least 1")
    if threads < 1:
        raise OptionError(f"threads: expected at least 1, found {threads}")
    stack = stack_bytes()
    cases = [
        (name, shape, n)
        for name in chosen
        for shape in shapes
        for n in tokens
        if shape[1] % max(known[name]["block"], 32) == 0
    ]
    if not cases:
        raise OptionError("no format of those has blocks that fit the columns: expected 256 x n")
    limits = _Limits(threads, used, stack)
    taken: list[tuple[str, tuple[int, int], int, int, int, str, float, Any]] = []
    with _baseline(baseline_python, threads) as ggml:
        for done, (name, (rows, cols), n) in enumerate(cases):
            if progress is not None:
                progress("kernels", done, len(cases))
            if done % (len(shapes) * len(tokens)) == 0:
                limits.measure()
            nbytes = rows * cols // known[name]["block"] * known[name]["bytes"]
            stacked = -(-stack // nbytes) if n < PROMPT_TOKENS else 1
            theirs = None
            if ggml is not None:
                theirs = ggml.seconds(known[name]["id"], rows * stacked, cols, n, seconds)
            for isa in used:
                took = _core.kernel_speed(
                    name, isa, rows * stacked, cols, n, threads, seconds, quantize=True
                )
                taken.append((name, (rows, cols), n, stacked, nbytes, isa, took, theirs))
        version = None if ggml is None else ggml.version
    if progress is not None:
        progress("kernels", len(cases), len(cases))
    limits.measure()
    found = KernelBench(
        str(_core.cpu()["model"]),
        current_id(),
        threads,
        limits.memory_s,
        limits.int8_s,
        limits.float32_s,
        version,
    )
    for name, (rows, cols), n, stacked, nbytes, isa, took, theirs in taken:
        bytes_s = nbytes * stacked / took
        ops_s = 2 * rows * cols * stacked * n / took
        found.rows.append(
            KernelRow(
                name,
                isa,
                rows,
                cols,
                n,
                stacked,
                took,
                bytes_s,
                ops_s,
                bytes_s / found.memory_s,
                ops_s / (found.float32_s if known[name]["block"] == 1 else found.int8_s)[isa],
                *(theirs or (None, None)),
            )
        )
    return found


class _Limits:
    """The best of repeated measurements: one at a busy moment would give shares above 1."""

    def __init__(self, threads: int, isas: Sequence[str], nbytes: int) -> None:
        self._threads, self._nbytes = threads, nbytes
        self.memory_s = 0.0
        self.int8_s = dict.fromkeys(isas, 0.0)
        self.float32_s = dict.fromkeys(isas, 0.0)

    def measure(self) -> None:
        """Measures once more and keeps the best."""
        from ...runtime import _core

        self.memory_s = max(self.memory_s, _core.read_bandwidth(self._threads, self._nbytes))
        for isa in self.int8_s:
            self.int8_s[isa] = max(self.int8_s[isa], _core.int8_peak(isa, self._threads))
            self.float32_s[isa] = max(self.float32_s[isa], _core.float32_peak(isa, self._threads))


def stack_bytes() -> int:
    """Bytes of matrices that no cache holds, at most an eighth of the memory."""
    import psutil  # type: ignore[import-untyped, unused-ignore]

    from .cpu import caches

    last = max((c["bytes"] * c["count"] for c in caches()), default=0)
    room = int(psutil.virtual_memory().available) // 8
    return max(1 << 20, min(max(_LEAST_STACK, 4 * last), _MOST_STACK, room))


def _chosen(
    what: str, given: Sequence[str] | None, known: Any, default: Sequence[str]
) -> Sequence[str]:
    for name in given or ():
        if name not in known:
            raise OptionError(f"{what}: expected one of {', '.join(known)}, found {name[:40]!r}")
    return given or default


class _Ggml:
    """A running ggml_kernels.py; it is restarted if it dies of a command."""

    def __init__(self, python: str, threads: int) -> None:
        self._command = [python, str(_GGML), str(threads)]
        self._start()

    def _start(self) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        try:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
            )
        except OSError as error:
            self._errors.close()
            raise OptionError(f"{self._command[0]}: {error.strerror or error}") from None
        hello = self._ask(None)
        if hello is None or "error" in hello:
            why = hello["error"] if hello else "it ended at once"
            self.close()
            raise OptionError(f"the baseline does not run: {why}")
        self.version = str(hello["version"])

    def _ask(self, command: dict[str, Any] | None) -> dict[str, Any] | None:
        """The answer to a command, None if the process has died."""
        assert self._process.stdin and self._process.stdout
        if command is not None:
            try:
                self._process.stdin.write(json.dumps(command) + "\n")
                self._process.stdin.flush()
            except BrokenPipeError:
                return None
        line = self._process.stdout.readline()
        with suppress(ValueError):
            answer: dict[str, Any] = json.loads(line)
            return answer
        return None

    def seconds(
        self, kind: int, rows: int, cols: int, tokens: int, seconds: float
    ) -> tuple[float, bool] | None:
        """The faster layout's time and whether it is the rearranged one; None if not measurable."""
        answer = self._ask(
            {"type": kind, "rows": rows, "cols": cols, "tokens": tokens, "seconds": seconds}
        )
        if answer is None:
            self.close()
            self._start()
            return None
        if "error" in answer:
            raise DeviceError(f"the baseline failed: {answer['error']}")
        times = [(answer[k], k == "repacked") for k in ("plain", "repacked") if answer[k]]
        return min(times, default=None)

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin and self._process.stdout
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()
        self._errors.close()


class _baseline:
    """Context manager of a _Ggml, or of None without a Python for it."""

    def __init__(self, python: str | None, threads: int) -> None:
        self._python, self._threads = python, threads

    def __enter__(self) -> _Ggml | None:
        self._running = None if self._python is None else _Ggml(self._python, self._threads)
        return self._running

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._running is not None:
            self._running.close()


def baseline_here() -> str | None:
    """This interpreter if it has llama-cpp-python, else None."""
    from importlib.util import find_spec

    return sys.executable if find_spec("llama_cpp") is not None else None
