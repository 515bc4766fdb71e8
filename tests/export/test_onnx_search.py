"""The search for the nodes that onnxruntime's quantizer can do: its result, its length, its end."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="needs onnx (stoker[export])")
ort = pytest.importorskip("onnxruntime", reason="needs onnxruntime (stoker[export])")
quantization = pytest.importorskip(
    "onnxruntime.quantization", reason="needs onnxruntime (stoker[export])"
)

from onnx import TensorProto, helper, numpy_helper  # noqa: E402
from stoker.export import onnx_quantize  # noqa: E402
from stoker.export.onnx import attempts as onnx_attempts  # noqa: E402

LAYERS = 32
SECONDS = 100.0  # duration of an attempt, on the clock of `search`


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Products n0 to n31, one after the other."""
    rng, names = np.random.default_rng(0), [f"h{i}" for i in range(LAYERS)]
    nodes = [
        helper.make_node("MatMul", [a, f"w{i}"], [b], name=f"n{i}")
        for i, (a, b) in enumerate(zip(["x", *names], [*names[:-1], "y"], strict=False))
    ]
    weights = [
        numpy_helper.from_array((rng.standard_normal((8, 8)) / 3).astype(np.float32), f"w{i}")
        for i in range(LAYERS)
    ]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", 8]) for n in "xy"]
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:], weights)
    path = tmp_path_factory.mktemp("chain") / "chain.onnx"
    opsets = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), str(path))
    return path


class Search:
    """Records calls of onnxruntime's quantizer, which raises on some nodes and takes its time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.failing: set[str] = set()
        self.channels_fail = False
        self.now = 0.0  # s
        self.asked: list[tuple[frozenset[str], bool]] = []  # nodes, scales for each channel
        self._quantize = quantization.quantize_dynamic
        monkeypatch.setattr(quantization, "quantize_dynamic", self.quantize)
        clock = SimpleNamespace(monotonic=lambda: self.now)
        monkeypatch.setattr(onnx_attempts, "time", clock)

    def quantize(self, source: Path, out: Path, **options: Any) -> None:
        self.now += SECONDS
        excluded = options["nodes_to_exclude"]
        nodes = frozenset(f"n{i}" for i in range(LAYERS)) - set(excluded)
        self.asked.append((nodes, options["per_channel"]))
        if nodes & self.failing or (nodes and self.channels_fail and options["per_channel"]):
            raise ValueError("a node that does not go")
        self._quantize(source, out, **options)


@pytest.fixture
def search(monkeypatch: pytest.MonkeyPatch) -> Search:
    return Search(monkeypatch)


def still_float(path: Path) -> set[str]:
    return {n.name for n in onnx.load(str(path)).graph.node if n.op_type == "MatMul"}


@pytest.mark.parametrize("failing", [{"n13"}, {"n0", "n31"}, {"n4", "n5", "n6"}])
def test_what_does_not_go_is_found_and_nothing_is_tried_twice(
    failing: set[str],
    chain: Path,
    search: Search,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(onnx_attempts, "_MOST_SECONDS", 1e9)
    search.failing = failing
    made = onnx_quantize.quantize(chain, tmp_path / "out.onnx", static=False)
    assert still_float(made.path) == failing
    assert len(made.notes) == 1 and made.notes[0].startswith("float, since onnxruntime")
    assert all(f"{name} (MatMul)" in made.notes[0] for name in failing)
    tried = search.asked[:-1]  # the last is the file that is kept, with all the samples
    assert len(set(tried)) == len(tried)


def test_the_search_ends_with_its_time(chain: Path, search: Search, tmp_path: Path) -> None:
    """Attempts go on until 15 minutes are over; what was not tried stays float."""
    search.failing = {"n1", "n2", "n30"}
    made = onnx_quantize.quantize(chain, tmp_path / "out.onnx", static=False)
    assert len(search.asked) == 2 + 900 / SECONDS + 1  # all and none before, the file at the end
    assert made.notes[1] == (
        "not all of these were tried: the search ended after 9 attempts in 900 s (--exclude what"
        " does not run, and it is shorter)"
    )
    left = still_float(made.path)
    assert left > search.failing
    assert len(left) <= LAYERS / 2  # the largest groups come first


def test_the_second_search_has_time_of_its_own(chain: Path, search: Search, tmp_path: Path) -> None:
    search.channels_fail = True
    made = onnx_quantize.quantize(chain, tmp_path / "out.onnx", static=False)
    assert still_float(made.path) == set()
    assert made.notes == (
        "one scale for each weight: onnxruntime does not run it with one for each channel",
    )
    assert search.asked.count((frozenset(f"n{i}" for i in range(LAYERS)), True)) == 1
