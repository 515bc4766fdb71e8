"""Options of tflite's operators: the schema's tables, and the bytes of custom operators."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...runtime.base.errors import ModelFileError

_POOL = ("Padding", "StrideH", "StrideW", "FilterHeight", "FilterWidth", "FusedActivationFunction")
_CONVOLUTION = (
    "Padding",
    "StrideH",
    "StrideW",
    "DilationHFactor",
    "DilationWFactor",
    "FusedActivationFunction",
)
_RESIZE = ("AlignCorners", "HalfPixelCenters")
# Operator -> its table of options and the fields of it that the converters use.
_OPTIONS: dict[str, tuple[str, tuple[str, ...]]] = {
    "ADD": ("AddOptions", ("FusedActivationFunction",)),
    "AVERAGE_POOL_2D": ("Pool2DOptions", _POOL),
    "CONCATENATION": ("ConcatenationOptions", ("Axis", "FusedActivationFunction")),
    "CONV_2D": ("Conv2DOptions", _CONVOLUTION),
    "DIV": ("DivOptions", ("FusedActivationFunction",)),
    "DEPTHWISE_CONV_2D": ("DepthwiseConv2DOptions", (*_CONVOLUTION, "DepthMultiplier")),
    "FULLY_CONNECTED": (
        "FullyConnectedOptions",
        ("FusedActivationFunction", "WeightsFormat", "KeepNumDims", "AsymmetricQuantizeInputs"),
    ),
    "DEPTH_TO_SPACE": ("DepthToSpaceOptions", ("BlockSize",)),
    "GATHER": ("GatherOptions", ("Axis", "BatchDims")),
    "LEAKY_RELU": ("LeakyReluOptions", ("Alpha",)),
    "MAX_POOL_2D": ("Pool2DOptions", _POOL),
    "MEAN": ("ReducerOptions", ("KeepDims",)),
    "MIRROR_PAD": ("MirrorPadOptions", ("Mode",)),
    "MUL": ("MulOptions", ("FusedActivationFunction",)),
    "PACK": ("PackOptions", ("Axis", "ValuesCount")),
    "REDUCE_MAX": ("ReducerOptions", ("KeepDims",)),
    "REDUCE_MIN": ("ReducerOptions", ("KeepDims",)),
    "RESIZE_BILINEAR": ("ResizeBilinearOptions", _RESIZE),
    "RESIZE_NEAREST_NEIGHBOR": ("ResizeNearestNeighborOptions", _RESIZE),
    "SOFTMAX": ("SoftmaxOptions", ("Beta",)),
    "SPACE_TO_DEPTH": ("SpaceToDepthOptions", ("BlockSize",)),
    "SPLIT": ("SplitOptions", ("NumSplits",)),
    "SPLIT_V": ("SplitVOptions", ("NumSplits",)),
    "STRIDED_SLICE": (
        "StridedSliceOptions",
        ("BeginMask", "EllipsisMask", "EndMask", "NewAxisMask", "Offset", "ShrinkAxisMask"),
    ),
    "SUB": ("SubOptions", ("FusedActivationFunction",)),
    "SUM": ("ReducerOptions", ("KeepDims",)),
    "TRANSPOSE_CONV": (
        "TransposeConvOptions",
        ("Padding", "StrideH", "StrideW", "FusedActivationFunction"),
    ),
    "UNPACK": ("UnpackOptions", ("Axis", "Num")),
}
# Custom operators that write a C struct of int32: its first fields in order. Source: tflite's
# TfLiteTransposeConvParams and TfLitePoolParams (builtin_op_data.h).
_STRUCTS: dict[str, tuple[str, ...]] = {
    "CUSTOM Convolution2DTransposeBias": ("Padding", "StrideW", "StrideH"),
    "CUSTOM MaxPoolingWithArgmax2D": (
        "Padding",
        "StrideW",
        "StrideH",
        "FilterWidth",
        "FilterHeight",
        "FusedActivationFunction",
    ),
}
_STRUCT_PADDINGS = {1: 0, 2: 1}  # SAME, VALID: C's numbers -> those of the schema
# Custom operators that write a map (a flexbuffer): keys and how their values are read.
_MAPS: dict[str, dict[str, type[Any]]] = {
    "CUSTOM Landmarks2TransformMatrix": {
        "left_rotation_idx": int,
        "right_rotation_idx": int,
        "output_height": int,
        "output_width": int,
        "scale_x": float,
        "scale_y": float,
        "target_rotation_radians": float,
        "subset_idxs": list,
    },
    "CUSTOM TransformTensorBilinear": {"output_height": int, "output_width": int},
}
_MAP_BYTES = 1 << 16  # largest map: forty times the largest that is known


class Options:
    """Reads the options of each operator that has some."""

    def __init__(self, path: Path, schema: Any, charge: Callable[[int], None]) -> None:
        """charge: takes the bytes of a vector that was read; it raises if they are too many."""
        self._path, self._schema, self._charge = path, schema, charge

    def read(self, row: Any, name: str, what: str) -> dict[str, Any]:
        """Reads fields by their names in the schema, or by the keys of a custom operator's map.

        Raises ModelFileError if the operator's table is missing or holds no finite numbers.
        """
        if name == "RESHAPE":  # its options are often absent: the shape is then an input
            return {"NewShape": self._new_shape(row)}
        if name in _STRUCTS:
            values = self._struct(row, name, what)
        elif name in _MAPS:
            values = self._map(row, name, what)
        elif name in _OPTIONS:
            values = self._table(row, name, what)
        else:
            return {}
        for key, value in values.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ModelFileError(
                    f"{self._path}: {what}: {key}: expected a finite number, found {value}"
                )
        return values

    def _new_shape(self, row: Any) -> tuple[int, ...]:
        if row.BuiltinOptionsType() != self._schema.BuiltinOptions.ReshapeOptions:
            return ()
        table = row.BuiltinOptions()
        reshape = self._schema.ReshapeOptions()
        reshape.Init(table.Bytes, table.Pos)
        found = reshape.NewShapeAsNumpy()
        if isinstance(found, int):
            return ()
        self._charge(found.nbytes)
        return tuple(int(n) for n in found)

    def _table(self, row: Any, name: str, what: str) -> dict[str, Any]:
        kind, fields = _OPTIONS[name]
        table = row.BuiltinOptions()
        if row.BuiltinOptionsType() != getattr(self._schema.BuiltinOptions, kind) or table is None:
            raise ModelFileError(f"{self._path}: {what}: expected {kind}, found none")
        options = getattr(self._schema, kind)()
        options.Init(table.Bytes, table.Pos)
        return {f: getattr(options, f)() for f in fields}

    def _struct(self, row: Any, name: str, what: str) -> dict[str, Any]:
        fields, data = _STRUCTS[name], self._custom(row)
        if len(data) < 4 * len(fields):
            raise ModelFileError(
                f"{self._path}: {what}: expected options of {4 * len(fields)} bytes or more, found"
                f" {len(data)}"
            )
        values = dict(zip(fields, struct.unpack_from(f"<{len(fields)}i", data), strict=True))
        if values["Padding"] not in _STRUCT_PADDINGS:
            raise ModelFileError(
                f"{self._path}: {what}: Padding: expected 1 or 2, found {values['Padding']}"
            )
        return values | {"Padding": _STRUCT_PADDINGS[values["Padding"]]}

    def _map(self, row: Any, name: str, what: str) -> dict[str, Any]:
        from flatbuffers import flexbuffers

        data = self._custom(row)
        if not 0 < len(data) <= _MAP_BYTES:
            raise ModelFileError(
                f"{self._path}: {what}: expected options of 1 to {_MAP_BYTES} bytes, found"
                f" {len(data)}"
            )
        try:
            found = flexbuffers.GetRoot(data).AsMap
            return {key: self._value(found[key], kind) for key, kind in _MAPS[name].items()}
        except Exception as error:  # the flexbuffer reader trusts its input: it may raise anything
            raise ModelFileError(
                f"{self._path}: {what}: its options cannot be read ({type(error).__name__}:"
                f" {' '.join(str(error).split())[:100]})"
            ) from error

    def _value(self, found: Any, kind: type[Any]) -> Any:
        if kind is int:
            return int(found.AsInt)
        if kind is float:
            return float(found.AsFloat)
        vector = found.AsTypedVector if found.IsTypedVector else found.AsVector
        self._charge(len(vector))
        return [int(v.AsInt) for v in vector]

    def _custom(self, row: Any) -> bytes:
        found = row.CustomOptionsAsNumpy() if row.CustomOptionsLength() else b""
        if not isinstance(found, bytes):
            self._charge(found.nbytes)
        return bytes(found)
