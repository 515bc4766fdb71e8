"""Small tflite models of one operator each, with every variant of its attributes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from tiny_tflite import NONE, RELU, RELU6, SAME, VALID, TinyTflite, conv, noise, reals

Make = Callable[[], TinyTflite]
X = (1, 4, 6, 8)  # of most inputs

SCALE, ZERO = 0.03, -7  # of int8 inputs


def ints(*values: Any) -> np.ndarray:
    return np.array(values, np.int32)


def one(
    kind: str,
    outputs: Sequence[tuple[int, ...]],
    *constants: np.ndarray,
    x: tuple[int, ...] = X,
    at: int = 0,
    int8: bool = False,
    out: tuple[float, int] = (SCALE, ZERO),
    after_conv: bool = False,
    **options: Any,
) -> TinyTflite:
    """The operator on x, which is input `at` among the constants.

    int8: between QUANTIZE and DEQUANTIZE, its output in the scale and zero point `out`.
    after_conv: x comes out of a convolution, so that it lies in NCHW.
    """
    m = TinyTflite()
    source = m.tensor(x)
    m.inputs = [source]
    if after_conv:
        w, b = m.constant(reals("before", (x[3], 1, 1, x[3]))), m.constant(reals("b", (x[3],)))
        source = m.add("CONV_2D", [source, w, b], m.tensor(x), **conv(SAME))
    if int8:
        source = m.add("QUANTIZE", [source], m.tensor(x, "int8", scale=SCALE, zero=ZERO))
    inputs = [m.constant(c) for c in constants]
    inputs.insert(at, source)
    kinds: dict[str, Any] = {"dtype": "int8", "scale": out[0], "zero": out[1]} if int8 else {}
    made = [m.tensor(shape, **kinds) for shape in outputs]
    m.add_many(kind, inputs, made, **options)
    if int8:
        pairs = zip(made, outputs, strict=True)
        made = [m.add("DEQUANTIZE", [i], m.tensor(shape)) for i, shape in pairs]
    m.outputs = made
    return m


CASES: dict[str, Make] = {}


def case(name: str, make: Make) -> None:
    assert name not in CASES
    CASES[name] = make


# PRELU, of factors that are broadcast, of half precision, of int8.

for _label, _shape in (("channels", (1, 1, 8)), ("pixels", (4, 6, 8)), ("one", (1,))):
    case(f"prelu {_label}", lambda s=_shape: one("PRELU", [X], reals("a", s)))
    case(
        f"prelu {_label}, nchw",
        lambda s=_shape: one("PRELU", [X], reals("a", s), after_conv=True),
    )


def prelu_folded(*, int8: bool) -> TinyTflite:
    """The factors are stored in half precision, or all is int8."""
    m = TinyTflite()
    x = m.tensor(X)
    m.inputs = [x]
    if int8:
        x = m.add("QUANTIZE", [x], m.tensor(X, "int8", scale=SCALE, zero=ZERO))
        a = m.constant(noise("a", (1, 1, 8)), scale=0.01, zero=3)
        y = m.add("PRELU", [x, a], m.tensor(X, "int8", scale=0.04, zero=5))
        m.outputs = [m.add("DEQUANTIZE", [y], m.tensor(X))]
        return m
    half = m.constant(reals("a", (1, 1, 8)).astype(np.float16))
    a = m.add("DEQUANTIZE", [half], m.tensor((1, 1, 8)))
    m.outputs = [m.add("PRELU", [x, a], m.tensor(X))]
    return m


case("prelu half", lambda: prelu_folded(int8=False))
case("prelu int8", lambda: prelu_folded(int8=True))


# STRIDED_SLICE: begins, ends, steps, masks.

_SLICES: dict[str, tuple[Any, Any, Any, tuple[int, ...], dict[str, Any]]] = {
    "channels": ((0, 0, 0, 2), (1, 4, 6, 7), (1, 1, 1, 1), (1, 4, 6, 5), {}),
    "whole": ((0, 0, 0, 0), (1, 4, 6, 8), (1, 1, 1, 1), X, {}),
    "steps": ((0, 0, 1, 0), (1, 4, 6, 8), (1, 2, 3, 3), (1, 2, 2, 3), {}),
    "backwards": ((0, 3, -1, 7), (1, 0, 1, 0), (1, -1, -2, -3), (1, 3, 2, 3), {}),
    "negative": ((0, -3, -4, -2), (1, -1, -1, 8), (1, 1, 1, 1), (1, 2, 3, 2), {}),
    "far": ((0, -9, 2, 0), (5, 9, 99, 99), (1, 1, 1, 1), (1, 4, 4, 8), {}),
    "masks": ((9, 2, 3, 1), (1, 0, 4, 0), (1, 1, 1, 2), (1, 2, 4, 4),
              {"BeginMask": 5, "EndMask": 10}),
    "masked backwards": ((0, 0, 1, 0), (0, 0, 0, 0), (1, -1, -1, 1), (1, 4, 2, 8),
                         {"BeginMask": 10, "EndMask": 15}),
    "shrunk": ((0, 1, -1, 0), (1, 2, 6, 8), (1, 1, 1, 1), (1, 8), {"ShrinkAxisMask": 6}),
    "last shrunk": ((0, 0, 0, -1), (1, 4, 6, 0), (1, 1, 1, 1), (1, 4, 6), {"ShrinkAxisMask": 8}),
    "new axis": ((0, 0, 1, 0, 0), (1, 1, 3, 6, 8), (1, 1, 1, 1, 1), (1, 1, 2, 6, 8),
                 {"NewAxisMask": 2}),
    "ellipsis": ((0, 0, 2), (0, 0, 5), (1, 1, 1), (1, 4, 6, 3),
                 {"EllipsisMask": 2, "BeginMask": 1, "EndMask": 1}),
    "ellipsis and axes": ((0, 0, 0, 3), (0, 0, 0, 4), (1, 1, 1, 1), (1, 4, 6, 1),
                          {"EllipsisMask": 2, "NewAxisMask": 4, "ShrinkAxisMask": 8,
                           "BeginMask": 1, "EndMask": 1}),
    "offsets": ((0, 1, 2, 3), (1, 2, 3, 4), (1, 1, 1, 1), (1, 2, 3, 4), {"Offset": True}),
}  # fmt: skip


def strided(name: str, **more: Any) -> TinyTflite:
    begin, end, step, shape, masks = _SLICES[name]
    options = dict.fromkeys(
        ("BeginMask", "EllipsisMask", "EndMask", "NewAxisMask", "ShrinkAxisMask"), 0
    )
    given = {**options, **masks}
    vectors = (ints(*v) for v in (begin, end, step))
    return one("STRIDED_SLICE", [shape], *vectors, StridedSliceOptions=given, **more)


for _name in _SLICES:
    case(f"strided slice {_name}", lambda n=_name: strided(n))
for _name in ("channels", "backwards", "shrunk"):
    case(f"strided slice {_name}, nchw", lambda n=_name: strided(n, after_conv=True))
    case(f"strided slice {_name}, int8", lambda n=_name: strided(n, int8=True))
case(
    "slice",
    lambda: one("SLICE", [(1, 2, 6, 5)], ints(0, 1, 0, 3), ints(-1, 2, 6, -1), SliceOptions={}),
)


# SPLIT, SPLIT_V, UNPACK, PACK, GATHER.


def split(axis: int, parts: int, **more: Any) -> TinyTflite:
    shape = list(X)
    shape[axis] //= parts
    options = {"SplitOptions": {"NumSplits": parts}}
    return one("SPLIT", [tuple(shape)] * parts, np.array(axis, np.int32), at=1, **more, **options)


for _axis, _parts in ((3, 2), (-1, 4), (1, 4), (2, 3)):
    case(f"split {_axis} by {_parts}", lambda a=_axis, p=_parts: split(a, p))
case("split, nchw", lambda: split(3, 2, after_conv=True))
case("split, int8", lambda: split(3, 2, int8=True))
for _sizes in ((1, 5, 2), (3, -1)):
    _whole = [n if n > 0 else 8 - sum(k for k in _sizes if k > 0) for n in _sizes]
    case(
        f"split v {_sizes}",
        lambda s=_sizes, w=tuple(_whole): one(
            "SPLIT_V",
            [(1, 4, 6, n) for n in w],
            ints(*s),
            np.array(3, np.int32),
            SplitVOptions={"NumSplits": len(s)},
        ),
    )
for _axis in (1, -1):
    _left = tuple(n for i, n in enumerate(X) if i != _axis % 4)
    case(
        f"unpack {_axis}",
        lambda a=_axis, s=_left: one("UNPACK", [s] * X[a], UnpackOptions={"Axis": a, "Num": X[a]}),
    )
for _axis in (0, 2, -1):
    _made = list(X[1:])
    _made.insert(_axis if _axis >= 0 else 3, 2)
    case(
        f"pack {_axis}",
        lambda a=_axis, s=tuple(_made): one(
            "PACK",
            [s],
            reals("b", X[1:]),
            x=X[1:],
            at=1,
            PackOptions={"Axis": a, "ValuesCount": 2},
        ),
    )
for _label, _rows in (
    ("some", ints(2, 0, 2)),
    ("table", ints([1, 3], [0, 2])),
    ("one", np.array(2, np.int32)),
):
    case(
        f"gather {_label}",
        lambda r=_rows: one(
            "GATHER",
            [(1, *r.shape, 6, 8)],
            r,
            GatherOptions={"Axis": 1, "BatchDims": 0},
        ),
    )
case(
    "gather, int8",
    lambda: one(
        "GATHER", [(1, 4, 6, 2)], ints(7, 1), int8=True, GatherOptions={"Axis": -1, "BatchDims": 0}
    ),
)


# RESIZE_BILINEAR, RESIZE_NEAREST_NEIGHBOR, larger and smaller.

for _kind, _table in (
    ("RESIZE_BILINEAR", "ResizeBilinearOptions"),
    ("RESIZE_NEAREST_NEIGHBOR", "ResizeNearestNeighborOptions"),
):
    for _mode in ({}, {"HalfPixelCenters": True}, {"AlignCorners": True}):
        for _size in ((8, 12), (7, 9), (3, 2), (1, 1)):
            for _int8 in (False, True):
                if _int8 and _size != (7, 9):
                    continue
                case(
                    f"{_kind} {next(iter(_mode), '')} {_size}{' int8' * _int8}",
                    lambda k=_kind, t=_table, m=_mode, s=_size, i=_int8: one(
                        k, [(1, *s, 8)], ints(*s), int8=i, after_conv=not i, **{t: m}
                    ),
                )


# TRANSPOSE_CONV: the output's shape, the weights [out, height, width, in], x, a bias.


def transpose_conv(
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: int,
    size: tuple[int, int],
    *,
    bias: bool = False,
    activation: int = NONE,
    int8: bool = False,
) -> TinyTflite:
    m = TinyTflite()
    x = m.tensor(X)
    m.inputs = [x]
    shape = (1, *size, 3)
    options = {
        "TransposeConvOptions": {
            "Padding": padding,
            "StrideH": stride[0],
            "StrideW": stride[1],
            "FusedActivationFunction": activation,
        }
    }
    if int8:
        x = m.add("QUANTIZE", [x], m.tensor(X, "int8", scale=SCALE, zero=ZERO))
        scales = np.array([0.01, 0.02, 0.005], np.float32)
        w = m.constant(noise("w", (3, *kernel, 8)), scale=scales, axis=0)
        b = m.constant(ints(90, -40, 700), scale=scales * np.float32(SCALE))
        y = m.tensor(shape, "int8", scale=0.09, zero=10)
        y = m.add("TRANSPOSE_CONV", [m.constant(ints(*shape)), w, x, b], y, **options)
        m.outputs = [m.add("DEQUANTIZE", [y], m.tensor(shape))]
        return m
    inputs = [m.constant(ints(*shape)), m.constant(reals("w", (3, *kernel, 8))), x]
    if bias:
        inputs.append(m.constant(reals("b", (3,), 2)))
    m.outputs = [m.add("TRANSPOSE_CONV", inputs, m.tensor(shape), **options)]
    return m


for _label, _options in {
    "2x2 by 2": ((2, 2), (2, 2), VALID, (8, 12)),
    "3x3 by 2 same": ((3, 3), (2, 2), SAME, (8, 12)),
    "3x3 by 2 same, odd": ((3, 3), (2, 2), SAME, (7, 11)),
    "3x3 by 2 valid": ((3, 3), (2, 2), VALID, (9, 13)),
    "3x3 by 2 valid, more": ((3, 3), (2, 2), VALID, (10, 14)),
    "2x5 by 1 and 3 same": ((2, 5), (1, 3), SAME, (4, 18)),
    "1x1 by 2": ((1, 1), (2, 2), SAME, (8, 12)),
}.items():
    case(f"transpose conv {_label}", lambda o=_options: transpose_conv(*o))
case(
    "transpose conv with bias",
    lambda: transpose_conv((3, 3), (2, 2), SAME, (8, 12), bias=True, activation=RELU),
)
case("transpose conv int8", lambda: transpose_conv((3, 3), (2, 2), SAME, (8, 12), int8=True))


# MediaPipe's, which the default delegate runs, too.


def transpose_conv_bias(
    kernel: int, stride: int, padding: int, size: tuple[int, int]
) -> TinyTflite:
    """padding: C's, 1 for SAME, 2 for VALID."""
    weights, bias = reals("w", (3, kernel, kernel, 8)), reals("b", (3,), 2)
    options = np.array([padding, stride, stride], "<i4").tobytes()
    name = "CUSTOM Convolution2DTransposeBias"
    return one(name, [(1, *size, 3)], weights, bias, custom=options)


case("transpose conv bias 2 by 2", lambda: transpose_conv_bias(2, 2, 1, (8, 12)))
case("transpose conv bias 3 by 2", lambda: transpose_conv_bias(3, 2, 1, (8, 12)))
case("transpose conv bias 4 by 2 valid", lambda: transpose_conv_bias(4, 2, 2, (10, 14)))


# DEPTH_TO_SPACE, SPACE_TO_DEPTH, MIRROR_PAD.

for _int8 in (False, True):
    _end = ", int8" * _int8
    case(
        f"depth to space{_end}",
        lambda i=_int8: one(
            "DEPTH_TO_SPACE", [(1, 8, 12, 2)], int8=i, DepthToSpaceOptions={"BlockSize": 2}
        ),
    )
    case(
        f"space to depth{_end}",
        lambda i=_int8: one(
            "SPACE_TO_DEPTH", [(1, 2, 3, 32)], int8=i, SpaceToDepthOptions={"BlockSize": 2}
        ),
    )
    for _mode, _amounts, _shape in (
        (0, ([0, 0], [1, 3], [2, 0], [0, 0]), (1, 8, 8, 8)),
        (1, ([0, 0], [4, 1], [0, 2], [1, 0]), (1, 9, 8, 9)),
    ):
        case(
            f"mirror pad {_mode}{_end}",
            lambda i=_int8, m=_mode, a=_amounts, s=_shape: one(
                "MIRROR_PAD",
                [s],
                ints(*a),
                int8=i,
                after_conv=not i,
                MirrorPadOptions={"Mode": m},
            ),
        )


# Reductions and functions.

for _kind in ("SUM", "REDUCE_MAX", "REDUCE_MIN", "MEAN"):
    for _axes, _keep, _shape in (
        ((1, 2), True, (1, 1, 1, 8)),
        ((1, 2), False, (1, 8)),
        ((-1,), False, (1, 4, 6)),
        ((3, 1), True, (1, 1, 6, 1)),
    ):
        case(
            f"{_kind} {_axes} {_keep}",
            lambda k=_kind, a=_axes, e=_keep, s=_shape: one(
                k, [s], ints(*a), after_conv=True, ReducerOptions={"KeepDims": e}
            ),
        )


def functions() -> TinyTflite:
    """One after the other, within what each is defined for; a division at the end."""
    m = TinyTflite()
    x = m.tensor(X)
    m.inputs = [x]
    outputs = []
    for kind, table in (
        ("NEG", "NegOptions"),
        ("ABS", "AbsOptions"),
        ("SQUARE", "SquareOptions"),
        ("EXP", "ExpOptions"),
        ("SQRT", ""),
        ("LOG", ""),
        ("SIN", ""),
        ("COS", "CosOptions"),
        ("EXP", "ExpOptions"),
        ("RSQRT", ""),
    ):
        x = m.add(kind, [x], m.tensor(X), **({table: {}} if table else {}))
        outputs.append(x)
    for kind in ("ELU", "FLOOR", "CEIL"):
        outputs.append(m.add(kind, [m.inputs[0]], m.tensor(X)))
    options = {"DivOptions": {"FusedActivationFunction": RELU6}}
    outputs.append(m.add("DIV", [m.inputs[0], x], m.tensor(X), **options))
    m.outputs = outputs
    return m


case("functions", functions)


def probabilities() -> TinyTflite:
    """LOGISTIC of values down to -40, that leaves the net."""
    m = TinyTflite()
    m.inputs = [m.tensor(X)]
    options = {"MulOptions": {"FusedActivationFunction": NONE}}
    far = m.add("MUL", [0, m.constant(np.array(9, np.float32))], m.tensor(X), **options)
    options = {"SubOptions": {"FusedActivationFunction": NONE}}
    low = m.add("SUB", [far, m.constant(np.array(22, np.float32))], m.tensor(X), **options)
    m.outputs = [m.add("LOGISTIC", [low], m.tensor(X))]
    return m


case("probabilities", probabilities)


# Sparse weights, which DENSIFY (and DEQUANTIZE) bring to the operator.


def sparse(*, blocks: bool, half: bool) -> tuple[TinyTflite, np.ndarray]:
    """A FULLY_CONNECTED of weights [8, 8], of which a third is kept; and these weights.

    Rows are a dense level; columns, or blocks of 4 of them, are a list for each row.
    """
    width = 4 if blocks else 1
    kept = noise("kept", (8, 8 // width)) > 0
    weights = reals("w", (8, 8)) * np.repeat(kept, width, axis=1)
    values = weights.reshape(8, -1, width)[kept].reshape(-1)
    segments = np.concatenate([[0], kept.sum(1).cumsum()])
    levels: list[Any] = [8, (segments, np.nonzero(kept)[1])]
    if blocks:
        levels.append(4)
    m = TinyTflite()
    m.inputs = [m.tensor((2, 8))]
    dtype = "float16" if half else "float32"
    walk = {"order": [0, 1, 2][: 2 + blocks], "blocks": [1] * blocks, "levels": levels}
    w = m.tensor((8, 8), dtype, values.astype(dtype), sparse=walk)
    w = m.add("DENSIFY", [w], m.tensor((8, 8), dtype), DensifyOptions={})
    if half:
        w = m.add("DEQUANTIZE", [w], m.tensor((8, 8)))
    options = {"FusedActivationFunction": 0, "WeightsFormat": 0, "KeepNumDims": False}
    y = m.tensor((2, 8))
    m.outputs = [m.add("FULLY_CONNECTED", [0, w], y, FullyConnectedOptions=options)]
    return m, weights


for _blocks in (False, True):
    for _half in (False, True):
        _end = " of blocks" * _blocks + " half" * _half
        case(f"sparse{_end}", lambda b=_blocks, h=_half: sparse(blocks=b, half=h)[0])
