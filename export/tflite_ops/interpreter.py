"""tflite's own interpreter (the optional package ai-edge-litert), for measurements."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ...runtime.base.errors import ModelFileError, OptionError, one_line
from ..onnx.samples import Array, InputSpec


class TfliteRunner:
    """A tflite file in its interpreter; its result is the first output tensor."""

    def __init__(
        self,
        path: Path,
        names: Sequence[str],
        *,
        reference_kernels: bool,
        threads: int | None = None,
    ) -> None:
        """names: the inputs' names in batches, in the file's order. reference_kernels: tflite's
        plain kernels; else the fast ones that it chooses itself. threads: None takes all.

        Raises OptionError if the package is missing, ModelFileError if the file cannot be
        loaded.
        """
        try:
            from ai_edge_litert import interpreter as litert
        except ImportError as error:
            raise OptionError(
                "running tflite files needs its interpreter: pip install ai-edge-litert"
            ) from error
        kinds = litert.OpResolverType
        self.name, self.path, self.nbytes = "tflite", path, path.stat().st_size
        self.reference_kernels = reference_kernels
        try:
            self._interpreter = litert.Interpreter(
                model_path=str(path),
                num_threads=threads or os.cpu_count(),
                experimental_op_resolver_type=kinds.BUILTIN_REF
                if reference_kernels
                else kinds.AUTO,
            )
            self._interpreter.allocate_tensors()
        except (ValueError, RuntimeError) as error:
            raise ModelFileError(
                f"{path}: its interpreter cannot load it: {one_line(error)}"
            ) from error
        details = self._interpreter.get_input_details()
        if len(details) != len(names):
            raise ModelFileError(f"{path}: expected {len(names)} inputs, found {len(details)}")
        self._inputs = {name: d["index"] for name, d in zip(names, details, strict=True)}
        self._output = self._interpreter.get_output_details()[0]["index"]
        self.inputs = [
            InputSpec(name, tuple(int(n) for n in d["shape"]), d["dtype"])
            for name, d in zip(names, details, strict=True)
        ]

    def run(self, batch: dict[str, Array]) -> Array:
        """The first output, [batch, ...]; the samples run one after the other."""
        rows = []
        for i in range(len(next(iter(batch.values())))):
            try:
                for name, index in self._inputs.items():
                    self._interpreter.set_tensor(index, batch[name][i : i + 1])
                self._interpreter.invoke()
            except (ValueError, RuntimeError) as error:
                raise OptionError(
                    f"{self.path}: does not run on the samples: {one_line(error)}"
                ) from error
            rows.append(self._interpreter.get_tensor(self._output).copy())
        return np.concatenate(rows)
