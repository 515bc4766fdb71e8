"""onnxruntime's names of tensor types, and its messages."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..base.errors import one_line

# Property of an ONNX model: the GGUF metadata of its tokenizer and chat template, as JSON.
ONNX_METADATA = "stoker.metadata"
# Input of an ONNX decoder, int64 [1], default 0: the first token with logits.
ONNX_LOGITS_FROM = "logits_from"

# Type names of a graph's inputs and outputs in onnxruntime -> numpy's types.
TENSOR_TYPES: Mapping[str, type[Any]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(int16)": np.int16,
    "tensor(int8)": np.int8,
    "tensor(uint64)": np.uint64,
    "tensor(uint32)": np.uint32,
    "tensor(uint16)": np.uint16,
    "tensor(uint8)": np.uint8,
    "tensor(bool)": np.bool_,
}

_PREFIX = re.compile(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ")


def said(error: BaseException) -> str:
    """Returns onnxruntime's message on one line, without its prefix of codes."""
    return _PREFIX.sub("", one_line(error)) or type(error).__name__
