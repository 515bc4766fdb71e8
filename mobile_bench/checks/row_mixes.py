"""Rows of several sequences in one forward pass have the bits that each sequence has alone.

    python -m stoker.mobile_bench.checks.row_mixes [FILE[=MEMORY] ...] [--tiny tests/models]
        [--mixes 1000] [--out mixes.jsonl]

Random mixes of prompts, decode steps and drafts of several sequences, which are forked, truncated
and begun anew in between, on an engine with budget MEMORY (bytes; none: everything is in memory).
After each mix the logits of every row are compared, bit for bit, with those of the same sequence
evaluated alone on an engine that has everything in memory. --tiny adds every family of the tests'
generated models: resident, mixtures with experts on flash, and with streamed weights.

Resumable: every 50 mixes are a line of --out, with what happened in them, and are not run again. A
model on which something that is tested never happened fails, as does a difference.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from stoker.runtime import _core
from stoker.runtime.base.errors import BudgetError

BLOCK = 50  # mixes of a line


class Mixer:
    """Sequences that are evaluated in random mixes, beside the same ones evaluated alone.

    happened: how often what the test is about did.
    """

    def __init__(self, mixed: _core.Engine, alone: _core.Engine, seed: int, most: int = 4) -> None:
        self.engine, self._alone = mixed, alone
        self.happened: Counter[str] = Counter()
        self._random = np.random.default_rng(seed)
        self._n_vocab = int(mixed.config["n_vocab"])
        self.sequences = [mixed.sequence() for _ in range(most)]
        self._others = [alone.sequence() for _ in range(most)]
        self._tokens: list[list[int]] = [[] for _ in range(most)]

    def step(self) -> None:
        """One mix; now and then a fork, a truncation, or a sequence that begins anew."""
        random = self._random
        phase = str(random.choice(["prompt", "decode", "verify"]))
        most = {"prompt": 40, "decode": 1, "verify": 5}[phase]
        n = len(self.sequences)
        chosen = random.permutation(n)[: random.integers(1, n + 1)].tolist()
        rows: list[tuple[int, int]] = []
        for i in chosen:
            room = self.sequences[i].context - self.sequences[i].position
            count = min(int(random.integers(1, most + 1)), room)
            rows += [(i, int(t)) for t in random.integers(0, self._n_vocab, count)]
        # In the order of each sequence, else in any.
        if random.random() < 0.5:
            order = random.permutation([i for i, _ in rows]).tolist()
            tokens = {i: [t for j, t in rows if j == i] for i in chosen}
            rows = [(int(i), tokens[i].pop(0)) for i in order]
        if rows and self._evaluate(rows, phase) and phase == "verify":
            self._reject(chosen)
        what = random.random()
        if what < 0.1:
            self._fork()
        elif what < 0.25 or not rows:
            i = int(random.integers(n))
            self._truncate(i, int(random.integers(0, len(self._tokens[i]) + 1)))
        elif what < 0.3:
            self._truncate(int(random.integers(n)), 0)

    def _evaluate(self, rows: list[tuple[int, int]], phase: str) -> bool:
        """Compares one mix. Returns whether there was memory for it."""
        members = sorted({i for i, _ in rows})
        before = [self.sequences[i].position for i in members]
        try:
            found = self.engine.eval([(self.sequences[i], t) for i, t in rows], phase, True)
        except BudgetError:
            self.happened["refused"] += 1
            if len(rows) <= self.engine.plan["chunk"]:  # otherwise a chunk may have been whole
                assert [self.sequences[i].position for i in members] == before
            for i in range(len(self.sequences)):
                self._truncate(i, 0)
            return False
        assert found is not None
        self.happened["mixes"] += 1
        self.happened["rows"] += len(rows)
        self.happened["shared"] += len(members) > 1
        self.happened["first tokens"] += any(position < 2 for position in before)
        for i in members:
            mine = [k for k, (j, _) in enumerate(rows) if j == i]
            tokens = [rows[k][1] for k in mine]
            expected = self._others[i].eval_all(np.array(tokens, np.int32))
            self._tokens[i] += tokens
            assert found[mine].tobytes() == expected.tobytes(), (phase, i, len(rows))
            assert self.sequences[i].logits().tobytes() == expected[-1].tobytes()
            assert self.sequences[i].hidden().tobytes() == self._others[i].hidden().tobytes()
            assert self.sequences[i].position == len(self._tokens[i])
        return True

    def _reject(self, drafted: list[int]) -> None:
        """Takes back some of the rows of a verification."""
        for i in drafted:
            back = int(self._random.integers(0, 3))
            if 0 < back < len(self._tokens[i]):
                self.happened["rejected"] += back
                self._truncate(i, len(self._tokens[i]) - back)

    def _fork(self) -> None:
        """One sequence becomes a fork of another."""
        i, j = self._random.permutation(len(self.sequences))[:2].tolist()
        self.sequences[j] = self.sequences[i].fork()
        self._tokens[j] = list(self._tokens[i])
        self._again(j)
        self.happened["forked"] += len(self._tokens[j]) > 0

    def _truncate(self, i: int, position: int) -> None:
        self.happened["truncated"] += position < len(self._tokens[i])
        self.sequences[i].truncate(position)
        # Layers with windows may have left behind more.
        kept = self.sequences[i].position
        self.happened["left behind"] += kept < position
        del self._tokens[i][kept:]
        self._again(i)

    def _again(self, i: int) -> None:
        """The one that is alone is evaluated anew, so that it never goes back."""
        self._others[i] = self._alone.sequence()
        if self._tokens[i]:
            self._others[i].eval(np.array(self._tokens[i], np.int32))


def counts(engine: _core.Engine) -> dict[str, int]:
    """What must not be 0 where weights are on flash."""
    found: dict[str, int] = {}
    if engine.offload is not None:
        found["missed experts"] = engine.offload["misses"] + engine.offload["late"]
    if engine.stream is not None:
        found["streamed bytes"] = engine.stream["bytes"]
    return found


def tiny(folder: Path, into: Path) -> Iterator[tuple[str, Callable[[], tuple[Any, Any]]]]:
    """Yields the tests' generated models: name, (engine under test, engine with all in memory)."""
    sys.path.insert(0, str(folder))
    from offload_models import MIXTURES, Model, engine  # type: ignore[import-not-found]
    from tiny_models import VARIANTS, make  # type: ignore[import-not-found]

    sizes = {"n_embd": 256, "n_ff": 1024}
    for variant, (family, shape) in VARIANTS.items():

        def resident(family: Any = family, shape: Any = shape, name: str = variant) -> Any:
            path = make(into / f"{name}.gguf", family, quant="F16", **shape)
            return engine(path, threads=2), engine(path)

        def streamed(family: Any = family, shape: Any = shape, name: str = variant) -> Any:
            path = make(into / f"{name}-wide.gguf", family, quant="Q8_0", **{**shape, **sizes})
            model = Model(path)
            engines = (model.offloaded(share, threads=2) for share in (0.4, 0.2, 0.1, 0.0))
            return next(e for e in engines if e.stream is not None), model.resident

        yield f"{variant}, resident", resident
        yield f"{variant}, streamed", streamed
    for name, mixture in MIXTURES.items():

        def offloaded(mixture: Any = mixture, name: str = name) -> Any:
            model = Model(mixture.write(into / name))
            return model.offloaded(0.5, threads=2, prefetch="on"), model.resident

        yield f"{name}, offloaded", offloaded


def given(names: list[str]) -> Iterator[tuple[str, Callable[[], tuple[Any, Any]]]]:
    """Yields the same for files."""
    for argument in names:
        name, _, memory = argument.partition("=")

        def open_both(name: str = name, memory: str = memory) -> tuple[Any, Any]:
            file = _core.GgufFile(name)
            options: dict[str, Any] = {"memory": int(memory)} if memory else {}
            return _core.Engine(file, context=512, **options), _core.Engine(file, context=512)

        yield argument, open_both


def run(name: str, make: Callable[[], tuple[Any, Any]], options: argparse.Namespace) -> bool:
    """The mixes of one model that are not in --out yet. Returns whether all is well."""
    out = Path(options.out)
    lines = out.read_text().splitlines() if out.exists() else []
    done = [line for line in map(json.loads, lines) if line["model"] == name]
    total: Counter[str] = Counter()
    for line in done:
        total.update({key: n for key, n in line.items() if isinstance(n, int) and key != "seed"})
    if total["mixes"] < options.mixes:
        try:
            mixed, alone = make()
        except BudgetError as error:
            print(f"{name}\tleft out: {error}", flush=True)
            return True
        if not mixed.config["causal"]:
            print(f"{name}\tleft out: tokens attend to later ones", flush=True)
            return True
    for seed in range(len(done), 10**6):
        if total["mixes"] >= options.mixes:
            break
        mixer = Mixer(mixed, alone, seed)
        before = counts(mixed)
        for _ in range(BLOCK):
            mixer.step()
        mixer.happened.update({k: n - before[k] for k, n in counts(mixed).items()})
        total.update(mixer.happened)
        with out.open("a") as file:
            file.write(json.dumps({"model": name, "seed": seed, **mixer.happened}) + "\n")
    wanted = ["shared", "first tokens", "rejected", "forked", "truncated"]
    wanted += [key for key in ("missed experts", "streamed bytes") if key in total]
    missing = [key for key in wanted if total[key] == 0]
    said = ", ".join(f"{key} {total[key]}" for key in ("mixes", *wanted, "refused", "left behind"))
    print(f"{name}\t{'FAILED, never: ' + ', '.join(missing) if missing else said}", flush=True)
    return not missing


def main() -> int:
    """Runs the program. Returns its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="*", metavar="FILE[=MEMORY]")
    parser.add_argument("--tiny", type=Path, help="folder tests/models of a checkout")
    parser.add_argument("--mixes", type=int, default=1000, help="of each model")
    parser.add_argument("--out", default="mixes.jsonl")
    options = parser.parse_args()
    well = [run(name, make, options) for name, make in given(options.files)]
    if options.tiny:
        with tempfile.TemporaryDirectory() as folder:
            models = tiny(options.tiny, Path(folder))
            well += [run(name, make, options) for name, make in models]
    return 0 if all(well) else 1


if __name__ == "__main__":
    sys.exit(main())
