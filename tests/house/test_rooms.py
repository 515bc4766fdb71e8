"""The house as ARCHITECTURE.md draws it: what the sources include and import goes down only.

A room is a folder; its floor is its line in the list "Rooms". Files of one room may use each other,
but not in a circle.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOP = ("runtime", "offload", "kernels_cpu", "export", "models", "mobile_bench")
MOST_FILES = 22  # of a room that is no list
# Rooms of one list: a row, a file.
LISTS = {
    "kernels_cpu/formats",
    "kernels_cpu/formats/unpack",
    "offload/predict",
    "runtime/arch",
    "runtime/cli",
    "export/tflite_ops",
    "mobile_bench/results",
    "tests/data",
}
_INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.M)


def sources() -> list[Path]:
    """The files of the rooms, without what is built or cached."""
    found = []
    for top in TOP:
        for path in sorted((ROOT / top).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".so":
                found.append(path)
    return found


def room_of(path: Path) -> str:
    return path.parent.relative_to(ROOT).as_posix()


@cache
def floors() -> dict[str, int]:
    """Room -> floor, 0 the lowest: the lines of the block "rooms" of ARCHITECTURE.md."""
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    block = re.search(r"```rooms\n(.*?)```", text, re.S)
    assert block is not None, "ARCHITECTURE.md: expected a block ```rooms"
    rooms = [line.split()[0] for line in block[1].splitlines() if line and line[0] != " "]
    assert len(set(rooms)) == len(rooms)
    return {room: floor for floor, room in enumerate(reversed(rooms))}


def module_of(path: Path) -> str:
    name = path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
    return name.removesuffix(".__init__")


@cache
def modules() -> dict[str, Path]:
    found = {module_of(path): path for path in sources() if path.suffix == ".py"}
    return found | {"runtime._core": ROOT / "runtime" / "_core.pyi"}


def imports(path: Path) -> set[Path]:
    """The files of the package that a module imports, anywhere in it, for types too."""
    package = module_of(path).split(".")
    if path.name != "__init__.py":
        package.pop()
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom):
            if node.level:
                base = package[: len(package) - node.level + 1]
            elif node.module and node.module.split(".")[0] == "stoker":
                base = []
            else:
                continue
            base = [*base, *(node.module or "").removeprefix("stoker").split(".")]
            stem = ".".join(part for part in base if part)
            names = [f"{stem}.{alias.name}" for alias in node.names] + [stem]
        elif isinstance(node, ast.Import):
            names = [alias.name.removeprefix("stoker.") for alias in node.names]
        found |= {modules()[name] for name in names[:-1] or names if name in modules()}
        if names and not found & {modules().get(name) for name in names[:-1]}:
            found |= {modules()[name] for name in names[-1:] if name in modules()}
    # The core below Python is bound to all rooms: it is no arrow.
    return found - {path, modules()["runtime._core"]}


def includes(path: Path) -> set[Path]:
    return {ROOT / name for name in _INCLUDE.findall(path.read_text(encoding="utf-8"))} - {path}


@cache
def arrows() -> dict[Path, frozenset[Path]]:
    """File -> the files that it includes or imports."""
    found = {}
    for path in sources():
        if path.suffix == ".py":
            found[path] = frozenset(imports(path))
        elif path.suffix in (".cc", ".h", ".inc", ".c"):
            found[path] = frozenset(includes(path))
    return found


def said(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_every_room_is_drawn() -> None:
    """Each folder with sources has a line, and each line a folder."""
    holds = {room_of(path) for path in arrows()}
    assert holds - set(floors()) == set()
    assert set(floors()) - holds == set()


def test_arrows_go_down() -> None:
    upward = [
        f"{said(path)} -> {said(other)}"
        for path, others in arrows().items()
        for other in others
        if room_of(other) != room_of(path) and floors()[room_of(other)] >= floors()[room_of(path)]
    ]
    assert upward == []


def circle(graph: dict[Path, frozenset[Path]]) -> list[Path]:
    """Files that use each other in a circle; empty: none."""
    done: set[Path] = set()
    for start in graph:
        way: list[Path] = []
        stack: list[tuple[Path, bool]] = [(start, False)]
        while stack:
            path, leaving = stack.pop()
            if leaving:
                way.pop()
                done.add(path)
            elif path in way:
                return [*way[way.index(path) :], path]
            elif path not in done:
                way.append(path)
                stack.append((path, True))
                stack += [(other, False) for other in graph.get(path, ())]
    return []


def test_no_circle() -> None:
    assert [said(path) for path in circle(arrows())] == []


def test_circles_are_found() -> None:
    a, b, c, d = (Path(name) for name in "abcd")
    graph = {a: frozenset({b}), b: frozenset({c}), c: frozenset({b, d}), d: frozenset()}
    assert set(circle(graph)) == {b, c}
    assert circle({a: frozenset({b, c}), b: frozenset({d}), c: frozenset({d})}) == []


def test_only_bindings_know_export_and_bench() -> None:
    """No C++ room but bind/ includes what makes files or measures."""
    above = ("export/", "mobile_bench/")
    for path, others in arrows().items():
        inside = said(path).startswith((*above, "runtime/bind/"))
        if path.suffix != ".py" and not inside:
            assert [said(other) for other in others if said(other).startswith(above)] == []


def test_the_api_knows_no_command_and_no_bench() -> None:
    above = ("runtime/cli", "mobile_bench")
    for path, others in arrows().items():
        if not said(path).startswith((*above, "runtime/bind/")):
            assert [said(other) for other in others if said(other).startswith(above)] == []


@pytest.mark.parametrize("top", [*TOP, "tests"])
def test_no_hall(top: str) -> None:
    """A folder holds no more files than a reader takes in at once, rooms of a list excepted."""
    count = Counter(
        room_of(path)
        for path in (ROOT / top).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".so"
    )
    assert {room: n for room, n in count.items() if n > MOST_FILES and room not in LISTS} == {}
