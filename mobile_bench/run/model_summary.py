"""The facts by which results name a model file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...runtime.base.errors import ModelFileError


def summary(path: Path) -> dict[str, Any]:
    """name, nbytes (of all shards), architecture, type (of most bytes), n_layer, n_expert,
    n_expert_used (0 if dense), context (trained, tokens; 0 if unknown).

    Raises ModelFileError.
    """
    if not path.is_file():
        raise ModelFileError(f"{path}: no such model file")
    if path.suffix.lower() == ".onnx":
        beside = (path.with_name(path.name + end) for end in (".data", "_data"))
        nbytes = path.stat().st_size + sum(f.stat().st_size for f in beside if f.is_file())
        found = dict.fromkeys(("n_layer", "n_expert", "n_expert_used", "context"), 0)
        return {"name": path.name, "nbytes": nbytes, "architecture": "onnx", "type": "", **found}
    from ...runtime._core import GgufFile

    file = GgufFile(str(path))
    architecture = str(file.get("general.architecture") or "")
    return {
        "name": path.name,
        "nbytes": int(file.nbytes),
        "architecture": architecture,
        "type": main_type(file),
        "n_layer": _count(file, f"{architecture}.block_count"),
        "n_expert": _count(file, f"{architecture}.expert_count"),
        "n_expert_used": _count(file, f"{architecture}.expert_used_count"),
        "context": _count(file, f"{architecture}.context_length"),
    }


def files_of(path: Path) -> list[Path]:
    """The files that hold a model's weights."""
    if path.suffix.lower() == ".onnx":
        beside = [path.with_name(path.name + end) for end in (".data", "_data")]
        return [path, *(f for f in beside if f.is_file())]
    from ...runtime._core import GgufFile

    return [Path(shard) for shard in GgufFile(str(path)).shards]


def main_type(file: Any) -> str:
    """The tensor type that most bytes are in."""
    sizes: dict[str, int] = {}
    for tensor in file.tensors:
        sizes[tensor.type] = sizes.get(tensor.type, 0) + tensor.nbytes
    return max(sizes, key=lambda name: sizes[name], default="")


def _count(file: Any, key: str) -> int:
    value = file.get(key)
    if isinstance(value, list):  # one value per layer
        value = max((v for v in value if isinstance(v, int)), default=0)
    return int(value) if isinstance(value, int) else 0
