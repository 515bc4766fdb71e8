"""Hugging Face folders as ONNX decoders: by way of a GGUF file, or through optimum-onnx.

The families that stoker runs become a GGUF file beside the output, whose graph export/to_onnx.py
builds, quantized if asked for. optimum-onnx traces any architecture that it knows, in float32.
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from ..runtime.backends.onnx_tensors import ONNX_METADATA
from ..runtime.base.checked_call import checked
from ..runtime.base.errors import ModelFileError, OptionError, StokerError, UnsupportedModelError
from ..runtime.base.progress import Progress
from ..runtime.files.json_text import parse
from ..runtime.files.output_file import check_output
from .onnx.trial import run_once
from .to_onnx import Exported, check_options, gguf_to_onnx, relocate

if TYPE_CHECKING:
    from onnx import ModelProto

THROUGH = ("auto", "gguf", "optimum")
_TASK = "text-generation-with-past"


@checked
def hf_to_onnx(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    type: str = "keep",
    context: int | None = None,
    through: str = "auto",
    force: bool = False,
    progress: Progress | None = None,
) -> Exported:
    """Writes the decoder of a Hugging Face folder as `out` and `out`.data.

    type, context, force, progress: as for gguf_to_onnx. through: "gguf"; "optimum" (float32 only:
    type must be f32); "auto": gguf, and optimum for families that stoker does not know. Raises
    OptionError (also if a package is missing), ModelFileError, UnsupportedModelError.
    """
    root, path = Path(folder), Path(out)
    if through not in THROUGH:
        raise OptionError(f"through: expected one of {', '.join(THROUGH)}, found {through}")
    check_options(path, type)
    if not (root / "config.json").is_file():
        raise ModelFileError(f"{root}: expected a folder with config.json, found none")
    if through == "optimum":
        return _through_optimum(root, path, type=type, context=context, force=force)
    try:
        return _through_gguf(root, path, type=type, context=context, force=force, progress=progress)
    except UnsupportedModelError as error:
        if through == "gguf":
            raise
        if find_spec("optimum") is None:
            raise UnsupportedModelError(
                f"{error}; optimum-onnx may export it: pip install 'stoker[optimum]'"
            ) from None
        return _through_optimum(root, path, type=type, context=context, force=force)


def _through_gguf(
    root: Path,
    path: Path,
    *,
    type: str,
    context: int | None,
    force: bool,
    progress: Progress | None,
) -> Exported:
    from .hf_to_gguf import convert

    check_output(path, [], force=force)
    between = path.with_name(f".{path.name}.gguf")
    kept = False
    try:
        converted = convert(root, between, force=True, progress=progress)
        made = gguf_to_onnx(
            between, path, type=type, context=context, force=force, progress=progress
        )
        return replace(made, notes=converted.notes)
    except KeyboardInterrupt:
        kept = True  # the parts of either file are taken up again
        raise
    finally:
        if not kept:
            between.unlink(missing_ok=True)


def _through_optimum(
    root: Path, path: Path, *, type: str, context: int | None, force: bool
) -> Exported:
    if find_spec("optimum") is None or find_spec("torch") is None:
        raise OptionError("optimum-onnx is not installed: pip install 'stoker[optimum]'")
    if type not in ("f32", "keep"):
        raise OptionError(f"type: expected f32 through optimum-onnx, found {type}")
    check_output(path, [], force=force)
    import onnx

    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as scratch:
        _export(root, scratch)
        model = onnx.load(os.path.join(scratch, "model.onnx"), load_external_data=False)
        trained = _context_of(root)
        if context is not None and context > trained:
            raise OptionError(f"context: expected 1 to {trained} tokens, found {context}")
        covered = context or trained
        properties = {ONNX_METADATA: _tokenizer(root, model), "stoker.context": str(covered)}
        onnx.helper.set_model_props(model, properties)
        data = path.with_name(path.name + ".data")
        moved = _move_data(model, Path(scratch), data.name)
        fresh = Path(scratch, "renamed.onnx")
        fresh.write_bytes(model.SerializeToString())
        run_once(path, fresh, advice="a newer optimum-onnx or onnxruntime may do", data=moved)
        path.unlink(missing_ok=True)  # the old model names data that is about to be replaced
        nbytes = fresh.stat().st_size
        if moved is not None:
            nbytes += moved.stat().st_size
            os.replace(moved, data)
        os.replace(fresh, path)
    return Exported(path, data if moved else path, nbytes, covered, "optimum-onnx")


def _export(root: Path, scratch: str) -> None:
    try:
        from optimum.exporters.onnx import main_export
    except ImportError as error:
        raise OptionError(
            f"optimum-onnx cannot be used: {error}: pip install 'stoker[optimum]'"
        ) from None
    try:
        main_export(
            os.fspath(root),
            output=scratch,
            task=_TASK,
            device="cpu",
            do_validation=False,
            local_files_only=True,
        )
    except StokerError:
        raise
    except Exception as error:  # any of the packages behind it may raise anything
        line = " ".join(str(error).split())[:300]
        raise UnsupportedModelError(f"{root}: optimum-onnx does not export it: {line}") from None


def _context_of(root: Path) -> int:
    try:
        config = parse((root / "config.json").read_text())
        return int(
            config.get("max_position_embeddings")
            or config["text_config"]["max_position_embeddings"]
        )
    except (OSError, ValueError, OverflowError, AttributeError, KeyError, TypeError):
        return 2048


def _tokenizer(root: Path, model: ModelProto) -> str:
    """The GGUF metadata of the folder's tokenizer, as JSON; none if the folder has no tokenizer."""
    from .hf.folder.config import HfConfig
    from .hf.tokenizer import read_tokenizer

    entries: dict[str, object] = {
        "general.architecture": "onnx",
        "general.name": root.resolve().name,
    }
    logits = next(o for o in model.graph.output if o.name == "logits")
    n_vocab = logits.type.tensor_type.shape.dim[-1].dim_value
    if (root / "tokenizer.json").exists() or (root / "tokenizer.model").exists():
        config = HfConfig.read(root)
        entries |= read_tokenizer(root, config, n_vocab or config.get("vocab_size")).entries
    return json.dumps(entries)


def _move_data(model: ModelProto, scratch: Path, name: str) -> Path | None:
    """Moves the external tensors into one file, to be called `name`; None if there are none."""
    files = relocate(model, name)
    if not files:
        return None
    if len(files) > 1:
        raise UnsupportedModelError(
            f"{scratch}: expected one file of external data, found {len(files)}"
        )
    os.replace(scratch / files.pop(), scratch / name)
    return scratch / name
