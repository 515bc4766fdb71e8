"""Instructions a weight: the NEON kernels against the AVX2 ones, counted under emulation.

    python mobile_bench/checks/instruction_counts.py [--formats Q4_0,Q4_K] [--json]

Needs a checkout, on Linux. Without an ARM machine, counts tell whether the NEON kernels waste
instructions; they tell nothing about time. kernel_instructions (native/) is built for both
processors and run by qemu-user with a plugin that counts (native/instruction_plugin.c); two runs
that differ only in how often the product is computed give the product's own instructions. Both must
compute the same bits. Debian packages it needs: g++-aarch64-linux-gnu qemu-user cmake g++.

An AVX2 register holds 32 bytes, a NEON register 16: a kernel whose every instruction is as wide as
its registers would take twice as many on NEON. Products in dot instructions, which AVX2 lacks,
make up for that.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NATIVE = ROOT / "mobile_bench" / "native"
MAIN_FORMATS = ("Q4_0", "Q4_1", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
LIMIT = 1.3
X86_ISA, ARM_ISAS = "avx2", ("neon", "i8mm")


@dataclass(frozen=True)
class Phase:
    """A matrix product: rows x cols weights times `tokens` activations."""

    name: str
    rows: int
    cols: int
    tokens: int


# The prompt phase has the rows of one task and as many tokens as are packed at a time.
PHASES = (Phase("decode", 256, 1536, 1), Phase("prompt", 64, 1536, 192))


@dataclass(frozen=True)
class Count:
    """Instructions per weight and token; ratio: relative to X86_ISA's."""

    format: str
    phase: str
    isa: str
    instructions: float
    ratio: float


class Counter:
    """The programs, the emulators and the plugin."""

    def __init__(self, x86: Path, arm: Path, folder: Path) -> None:
        self._programs = {X86_ISA: ("qemu-x86_64", x86)}
        self._programs.update({isa: ("qemu-aarch64", arm) for isa in ARM_ISAS})
        self._plugin = self._compile(folder)

    def _compile(self, folder: Path) -> Path:
        """Compiles the plugin for the interface version that this emulator wants."""
        source, plugin = NATIVE / "instruction_plugin.c", folder / "instructions.so"
        said, define = "", "-DSTOKER_QEMU_PLUGIN={}"
        for version in range(1, 9):
            subprocess.run(
                [
                    "cc",
                    "-O2",
                    "-shared",
                    "-fPIC",
                    define.format(version),
                    "-o",
                    str(plugin),
                    str(source),
                ],
                check=True,
            )
            emulator, program = self._programs[X86_ISA]
            done = subprocess.run(
                [emulator, "-cpu", "max", "-plugin", str(plugin), str(program), "--isas"],
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode == 0 and "instructions " in done.stderr:
                return plugin
            said = done.stderr.strip().split("\n")[-1]
        raise SystemExit(f"instruction_counts: {emulator} does not take the plugin: {said}")

    def run(self, isa: str, kind: str, phase: Phase, times: int) -> tuple[int, str]:
        """Instructions of the whole program, and the hash of the result."""
        emulator, program = self._programs[isa]
        sizes = (phase.rows, phase.cols, phase.tokens, times)
        done = subprocess.run(
            [emulator, "-cpu", "max", "-plugin", str(self._plugin), str(program), kind, isa]
            + [str(n) for n in sizes],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise SystemExit(f"instruction_counts: {done.stderr.strip()}")
        return int(done.stderr.split()[-1]), done.stdout.strip()

    def count(self, isa: str, kind: str, phase: Phase) -> tuple[float, str]:
        """Instructions per weight and token, and the hash of the result."""
        few, _ = self.run(isa, kind, phase, 1)
        many, result = self.run(isa, kind, phase, 3)
        return (many - few) / 2 / (phase.rows * phase.cols * phase.tokens), result

    def compare(self, kind: str, phase: Phase) -> list[Count]:
        """Counts on all instruction sets; exits if their results differ in a bit."""
        base, expected = self.count(X86_ISA, kind, phase)
        found = [Count(kind, phase.name, X86_ISA, base, 1.0)]
        for isa in ARM_ISAS:
            n, result = self.count(isa, kind, phase)
            if result != expected:
                raise SystemExit(f"instruction_counts: {kind} on {isa} gives other bits")
            found.append(Count(kind, phase.name, isa, n, n / base))
        return found


def build(folder: Path) -> tuple[Path, Path]:
    """Builds the programs: for this processor and for aarch64."""
    name = "kernel_instructions"
    if not (NATIVE / f"{name}.cc").is_file():
        raise SystemExit("instruction_counts: needs a checkout of the sources")
    dev = folder / "dev"  # of `make test`, which has compiled most of it
    here = dev if (dev / "CMakeCache.txt").is_file() else folder / "instructions"
    configure = ["cmake", "-S", str(ROOT), "-B", str(here), "-DSTOKER_PYTHON=OFF"]
    jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or str(os.cpu_count() or 2)
    for command in (
        [*configure, "-DSTOKER_BENCH=ON"],
        ["cmake", "--build", str(here), "--target", name, "-j", jobs],
        ["bash", str(NATIVE / "build_arm.sh"), name],
    ):
        subprocess.run(command, check=True, stdout=sys.stderr)
    arm = Path(os.environ.get("STOKER_ARM_BUILD") or folder / "aarch64")
    return here / name, arm / name


def main() -> None:
    """Counts, and prints a table or JSON; exits with 1 if a main format is above the limit."""
    parser = argparse.ArgumentParser(description="Instructions a weight: NEON against AVX2.")
    parser.add_argument("--formats", default=",".join(MAIN_FORMATS), help="such as Q4_0,Q4_K")
    parser.add_argument("--x86", type=Path, help="kernel_instructions [default: built]")
    parser.add_argument("--arm", type=Path, help="the same for aarch64 [default: built]")
    parser.add_argument("--json", action="store_true", help="machine-readable output")
    options = parser.parse_args()
    needed = ["qemu-x86_64", "qemu-aarch64", "cc"]
    if not (options.x86 and options.arm):
        needed += ["cmake", "aarch64-linux-gnu-g++"]
    for tool in needed:
        if shutil.which(tool) is None:
            raise SystemExit(f"instruction_counts: needs {tool}")
    x86, arm = options.x86, options.arm
    if not (x86 and arm):
        x86, arm = build(ROOT / "build")
    found: list[Count] = []
    with tempfile.TemporaryDirectory(prefix="stoker-instructions-") as folder:
        counter = Counter(x86, arm, Path(folder))
        if not options.json:
            columns = (X86_ISA, *(f"{isa}  ratio" for isa in ARM_ISAS))
            print(f"instructions a weight and token\n{'':14}" + "  ".join(columns))
        for kind in options.formats.split(","):
            for phase in PHASES:
                counts = counter.compare(kind, phase)
                found += counts
                if not options.json:
                    cells = [f"{counts[0].instructions:.3f}"]
                    cells += [f"{c.instructions:.3f}  {c.ratio:.2f}" for c in counts[1:]]
                    print(f"{kind:6} {phase.name:6} " + "  ".join(cells), flush=True)
    if options.json:
        print(json.dumps([asdict(c) for c in found], indent=1))
    above = [c for c in found if c.ratio > LIMIT and c.format in MAIN_FORMATS]
    for c in above:
        print(f"above {LIMIT}: {c.format} {c.phase} {c.isa} {c.ratio:.2f}", file=sys.stderr)
    sys.exit(1 if above else 0)


if __name__ == "__main__":
    main()
