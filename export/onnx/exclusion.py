"""Nodes of an ONNX model that the user keeps float, traced from the file to the prepared graph.

Between the two, functions are inlined and nodes fused, with other names and types. The names of
tensors last: a node of the prepared graph does the work of all nodes of the file between its
inputs and its outputs, and stays float if one of them shall.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from typing import TYPE_CHECKING

from ...runtime.base.errors import OptionError

if TYPE_CHECKING:
    import onnx

_NEAR = 3  # near names that an error offers


class Exclusion:
    """The nodes that patterns match: each a node's name, an operator type, or either with * ? [].

    A node without a name is matched by its type alone.
    """

    def __init__(self, model: onnx.ModelProto, patterns: Sequence[str]) -> None:
        """model: as read from the file; patterns match its nodes, also those in subgraphs."""
        self._patterns = list(patterns)
        self._missing = set(patterns)
        self._seen: dict[str, None] = {}  # names and types that a pattern could have named
        self._outputs: set[str] = set()  # outputs of the nodes that match
        self._calls: list[onnx.NodeProto] = []
        self._makers: Mapping[str, onnx.NodeProto] = {}
        if patterns:
            self._fit(model)
            kinds = {(f.domain, f.name) for f in model.functions}
            self._calls = [
                n
                for n in model.graph.node
                if (n.domain, n.op_type) in kinds and self._outputs.intersection(n.output)
            ]

    def inline(self, model: onnx.ModelProto) -> None:
        """Takes the model with functions inlined: nodes in a call that matches match, too."""
        if not self._patterns:
            return
        self._fit(model)
        makers = _makers(model.graph)
        for call in self._calls:
            for node in _between(makers, call.output, call.input):
                self._outputs.update(node.output)

    def complete(self) -> None:
        """Raises OptionError if a pattern has matched nothing, with names that are near it."""
        for pattern in self._patterns:
            if pattern in self._missing:
                near = _near(pattern, self._seen)
                raise OptionError(
                    f"exclude: no node or operator type fits {pattern!r}: expected one such as"
                    f" {', '.join(near)}"
                )

    def rename(self, names: Mapping[str, str]) -> None:
        """Takes new names of tensors."""
        self._outputs.update(names[o] for o in [*self._outputs] if o in names)

    def freeze(self, model: onnx.ModelProto) -> None:
        """Takes the last model whose nodes are those that the patterns have matched."""
        self._makers = _makers(model.graph)

    def names(self, prepared: onnx.GraphProto) -> list[str]:
        """Names of the prepared graph's nodes that do the work of a matching node."""
        if not self._outputs:
            return []
        computed = {o for n in prepared.node for o in n.output}
        found = []
        for node in prepared.node:
            work = _between(self._makers, node.output, node.input, computed)
            if self._outputs.intersection(node.output) or any(
                self._outputs.intersection(n.output) for n in work
            ):
                found.append(node.name)
        return found

    def _fit(self, model: onnx.ModelProto) -> None:
        bodies = [n for f in model.functions for n in f.node]
        for node in (*(n for g in graphs(model.graph) for n in g.node), *bodies):
            for name in (node.name, node.op_type):
                if name:
                    self._seen[name] = None
            for pattern in self._patterns:
                if _fits(node.name, pattern) or _fits(node.op_type, pattern):
                    self._missing.discard(pattern)
                    self._outputs.update(o for o in node.output if o)


def graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """The graph and all those within its operators (If, Loop, Scan)."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            inner = [attribute.g] if attribute.HasField("g") else []
            for found in (*inner, *attribute.graphs):
                yield from graphs(found)


def _fits(name: str, pattern: str) -> bool:
    # Names of nodes may hold brackets: such a name matches itself.
    return bool(name) and (name == pattern or fnmatch.fnmatchcase(name, pattern))


def _near(pattern: str, seen: Iterable[str]) -> list[str]:
    """The names that are most like the pattern, ignoring case; else the first ones."""
    names = list(seen)
    folded = {name.lower(): name for name in reversed(names)}
    bare = pattern.lower().strip("*?")
    within = [name for name in names if bare and bare in name.lower()]
    like = [folded[n] for n in difflib.get_close_matches(bare, folded, _NEAR, 0.5)]
    return list(dict.fromkeys([*within, *like]))[:_NEAR] or names[:_NEAR]


def _makers(graph: onnx.GraphProto) -> dict[str, onnx.NodeProto]:
    return {o: node for node in graph.node for o in node.output if o}


def _between(
    makers: Mapping[str, onnx.NodeProto],
    outputs: Iterable[str],
    inputs: Iterable[str],
    known: Set[str] = frozenset(),
) -> Iterator[onnx.NodeProto]:
    """The nodes that compute `outputs` from `inputs` and from tensors that are `known`."""
    pending, own, seen = list(outputs), set(outputs), set(inputs)
    while pending:
        name = pending.pop()
        if name in seen or name not in makers or (name in known and name not in own):
            continue
        seen.add(name)
        yield makers[name]
        pending += makers[name].input
