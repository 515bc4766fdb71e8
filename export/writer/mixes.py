"""llama.cpp's file types: which tensor of a model gets which tensor type.

A file type is a mixture: "Q4_K_M" keeps most matrices in Q4_K and spends more bits where they pay:
on the output, on attention's values and on the feed-forward's down matrices, in the first and last
eighth of the layers and in every third between. Source: llama.cpp's quantization tool, whose
choices are reproduced so that sizes and results can be compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Protocol

from ...runtime.base.errors import OptionError
from .tensor_types import format_row


class Weight(Protocol):
    """A tensor: its name and shape, shape[0] the contiguous dimension."""

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def shape(self) -> tuple[int, ...]: ...  # noqa: D102


@dataclass(frozen=True)
class FileType:
    """A row of llama.cpp's list: its number in general.file_type, the type of most tensors."""

    name: str
    id: int
    type: str


FILE_TYPES: Mapping[str, FileType] = {
    row.name: row
    for row in (
        FileType("F32", 0, "F32"),
        FileType("F16", 1, "F16"),
        FileType("BF16", 32, "BF16"),
        FileType("Q8_0", 7, "Q8_0"),
        FileType("Q6_K", 18, "Q6_K"),
        FileType("Q5_K_M", 17, "Q5_K"),
        FileType("Q5_K_S", 16, "Q5_K"),
        FileType("Q5_1", 9, "Q5_1"),
        FileType("Q5_0", 8, "Q5_0"),
        FileType("Q4_K_M", 15, "Q4_K"),
        FileType("Q4_K_S", 14, "Q4_K"),
        FileType("Q4_1", 3, "Q4_1"),
        FileType("Q4_0", 2, "Q4_0"),
        FileType("IQ4_NL", 25, "IQ4_NL"),
        FileType("IQ4_XS", 30, "IQ4_XS"),
        FileType("MXFP4", 38, "MXFP4"),
        FileType("Q3_K_L", 13, "Q3_K"),
        FileType("Q3_K_M", 12, "Q3_K"),
        FileType("Q3_K_S", 11, "Q3_K"),
        FileType("Q2_K", 10, "Q2_K"),
    )
}

_FLOATS = ("F32", "F16", "BF16")
# A type's fallback if its block does not divide the rows; F16 if that fails too.
_FALLBACKS = {
    "Q2_K": "Q4_0",
    "Q3_K": "Q4_0",
    "IQ4_XS": "IQ4_NL",
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}
# Matrices that keep their type: routers, convolutions and small tables decide much and weigh
# little.
_KEPT = (
    "_norm.weight",
    "ffn_gate_inp.weight",
    "ffn_gate_inp_shexp.weight",
    "ffn_pregate.weight",
    "altup",
    "laurel",
    "per_layer_model_proj",
    "ssm_conv1d",
    "shortconv.conv",
    "attn_rel_b.weight",
    "time_mix_",
)
_KEPT_NAMES = ("position_embd.weight", "token_types.weight")


@dataclass(frozen=True)
class Sizes:
    """Sizes of the model that the choice depends on."""

    n_layer: int
    n_expert: int = 0  # 0: dense
    n_gqa: int = 1  # query heads that share a head of keys and values
    architecture: str = "llama"


@dataclass(frozen=True)
class Choice:
    """The tensor types by name (tensors that keep theirs have none), and notes for the user."""

    types: Mapping[str, str]
    notes: Sequence[str] = field(default=())


def file_type(name: str) -> FileType:
    """The row of a file type's name; OptionError if there is none."""
    if name.upper() not in FILE_TYPES:
        raise OptionError(f"type: expected one of {', '.join(FILE_TYPES)}, found {name}")
    return FILE_TYPES[name.upper()]


def quantizable(tensor: Weight) -> bool:
    """True for the matrices that a file type covers; norms, routers, biases keep their type."""
    name = tensor.name
    return (
        name.endswith("weight")
        and len(_significant(tensor.shape)) >= 2
        and name not in _KEPT_NAMES
        and not any(part in name for part in _KEPT)
    )


def _significant(shape: Sequence[int]) -> Sequence[int]:
    """The shape without its trailing ones."""
    n = len(shape)
    while n > 1 and shape[n - 1] == 1:
        n -= 1
    return shape[:n]


def choose(
    name: str,
    tensors: Sequence[Weight],
    sizes: Sizes,
    *,
    imatrix: bool = False,
    overrides: Iterable[tuple[str, str]] = (),
) -> Choice:
    """The type of each tensor of a file of type `name` (a key of FILE_TYPES).

    imatrix: whether an importance matrix will be used; some choices depend on it. overrides:
    (glob, tensor type), matched against a tensor's name with or without ".weight"; the last that
    matches decides. Rows that a type's block does not divide fall back, with a note; in an
    override they are an error. Raises OptionError.
    """
    mixture = _Mixture(file_type(name), tensors, sizes, imatrix)
    types = {t.name: mixture.type_of(t) for t in mixture.ordered}
    short: dict[tuple[str, str], list[str]] = {}
    for t in mixture.ordered:
        wanted, found = types[t.name], fitting(types[t.name], t.shape[0])
        if wanted != found:
            types[t.name] = found
            short.setdefault((wanted, found), []).append(t.name)
    for pattern, type in overrides:
        _override(types, mixture.ordered, pattern, type)
    notes = [
        f"{len(names)} tensors take {found} instead of {wanted}, whose blocks of "
        f"{format_row(wanted)['block']} weights do not divide their rows ({names[0]}"
        f"{', ...' if len(names) > 1 else ''})"
        for (wanted, found), names in short.items()
    ]
    return Choice(types, notes)


def parse_override(text: str) -> tuple[str, str]:
    """(glob, type) of "GLOB=TYPE", such as "blk.*.ffn_down=Q6_K"; OptionError."""
    pattern, _, type = text.rpartition("=")
    if not pattern or not type:
        raise OptionError(f"override: expected GLOB=TYPE such as blk.*.ffn_down=Q6_K, found {text}")
    check_types("override", [type])
    return pattern, type


def check_types(what: str, types: Iterable[str]) -> None:
    """Raises OptionError for a tensor type that is not a quantization target; what: the option."""
    from ...runtime._core import formats

    writable = [f["name"] for f in formats() if f["quantizes"]]
    for type in types:
        if type not in writable:
            raise OptionError(f"{what}: expected a type of {', '.join(writable)}, found {type}")


def _override(types: dict[str, str], tensors: Sequence[Weight], pattern: str, type: str) -> None:
    check_types("override", [type])
    block = int(format_row(type)["block"])
    found = 0
    for t in tensors:
        if not (
            fnmatchcase(t.name, pattern) or fnmatchcase(t.name.removesuffix(".weight"), pattern)
        ):
            continue
        if t.shape[0] % block:
            raise OptionError(
                f"override {pattern}={type}: tensor {t.name}: expected rows of a multiple of "
                f"{block} weights, found {t.shape[0]}"
            )
        types[t.name] = type
        found += 1
    if not found:
        raise OptionError(
            f"override {pattern}={type}: expected a pattern that some matrix matches, found none"
        )


def fitting(type: str, cols: int) -> str:
    """The type, or its fallback if its block does not divide rows of `cols` weights."""
    if cols % format_row(type)["block"] == 0:
        return type
    other = _FALLBACKS.get(type, "F16")
    return other if cols % format_row(other)["block"] == 0 else "F16"


def layer_of(name: str) -> int:
    """The layer of "blk.N. ...", -1 for other tensors."""
    pieces = name.split(".")
    return int(pieces[1]) if pieces[0] == "blk" and pieces[1].isdecimal() else -1


class _Mixture:
    """One file type, applied to one model."""

    def __init__(
        self, row: FileType, tensors: Sequence[Weight], sizes: Sizes, imatrix: bool
    ) -> None:
        self._row, self._sizes, self._imatrix = row, sizes, imatrix
        # Tensors of a kind are counted layer by layer.
        self.ordered = sorted(
            (t for t in tensors if quantizable(t)), key=lambda t: (layer_of(t.name), t.name)
        )
        names = [t.name for t in self.ordered]
        self._has_output = "output.weight" in names
        kinds = ("attn_v.weight", "attn_qkv.weight", "attn_kv_b.weight")
        self._n_values = sum(name.endswith(kinds) for name in names)
        values = [n for n in names if "attn_v.weight" in n]
        downs = [n for n in names if "ffn_down" in n]
        self._value_rank = {n: i for i, n in enumerate(values)}
        self._down_rank = {n: i for i, n in enumerate(downs)}

    def type_of(self, tensor: Weight) -> str:
        name, row = tensor.name, self._row
        if row.type in _FLOATS:
            return row.type
        if name == "output.weight" or (name == "token_embd.weight" and not self._has_output):
            return self._output(tensor)
        if row.name == "MXFP4":
            # llama.cpp knows this type for mixtures only and keeps all but the experts in Q8_0.
            expert = len(tensor.shape) > 2 and tensor.shape[2] > 1
            return "MXFP4" if expert or not self._sizes.n_expert else "Q8_0"
        if "attn_v.weight" in name:
            return self._value(name)
        if "attn_k.weight" in name and self._sizes.n_expert == 8:
            return "Q8_0"
        if "ffn_down" in name:
            return self._down(name)
        if "attn_output.weight" in name:
            return self._attention_output()
        if "attn_qkv.weight" in name:
            more = {"Q3_K_M": "Q4_K", "Q3_K_L": "Q4_K", "Q4_K_M": "Q5_K", "Q5_K_M": "Q6_K"}
            return more.get(row.name, row.type)
        return row.type

    def _output(self, tensor: Weight) -> str:
        row = self._row
        whole = tensor.shape[0] % format_row(row.type)["block"] == 0
        if row.name in ("MXFP4", "Q8_0") or self._sizes.architecture == "falcon" or not whole:
            return "Q8_0"
        return "Q6_K"

    def _value(self, name: str) -> str:
        row, sizes, i = self._row, self._sizes, self._value_rank[name]
        type = row.type
        if row.name == "Q2_K":
            type = "Q4_K" if sizes.n_gqa >= 4 else "Q3_K"
        elif row.name == "Q3_K_M":
            type = "Q5_K" if i < 2 else "Q4_K"
        elif row.name == "Q3_K_L" or (row.name in ("IQ4_NL", "IQ4_XS") and sizes.n_gqa >= 4):
            type = "Q5_K"
        elif row.name in ("Q4_K_M", "Q5_K_M") and _more_bits(i, self._n_values):
            type = "Q6_K"
        elif row.name == "Q4_K_S" and i < 4:
            type = "Q5_K"
        # Eight heads of the 70B models share these weights.
        if sizes.n_layer == 80 and sizes.architecture in ("llama", "qwen2"):
            type = "Q5_K" if type in ("Q3_K", "Q4_K") else type
        return "Q8_0" if sizes.n_expert == 8 else type

    def _down(self, name: str) -> str:
        row, n = self._row, self._sizes.n_layer
        i = layer_of(name) if self._sizes.n_expert > 1 else self._down_rank[name]
        falcon = self._sizes.architecture == "falcon"
        kind = row.name
        if kind == "Q2_K":
            return "Q3_K"
        if kind == "Q3_K_M":
            if i < n // 16:
                return "Q5_K"
            return "Q4_K" if not falcon or _more_bits(i, n) else "Q3_K"
        if kind == "Q3_K_L":
            return "Q4_K" if falcon else "Q5_K"
        if kind == "Q4_K_M" and falcon:
            if i < n // 16:
                return "Q6_K"
            return "Q5_K" if _more_bits(i, n) else "Q4_K"
        if kind in ("Q4_K_M", "Q5_K_M") and _more_bits(i, n):
            return "Q6_K"
        if i < n // 8:
            if kind == "Q4_K_S" and not falcon:
                return "Q5_K"
            if kind in ("IQ4_NL", "IQ4_XS") and not self._imatrix:
                return "Q5_K"
            if kind in ("Q4_0", "Q5_0") and self._imatrix:
                return {"Q4_0": "Q4_1", "Q5_0": "Q5_1"}[kind]
        return row.type

    def _attention_output(self) -> str:
        row = self._row
        if self._sizes.architecture == "falcon":
            return "Q4_K" if row.name == "Q3_K_L" else row.type
        if self._sizes.n_expert == 8:
            small = ("Q2_K", "Q3_K_S", "Q3_K_M", "Q4_K_S", "Q4_K_M", "IQ4_NL", "IQ4_XS")
            return "Q5_K" if row.name in small else row.type
        return {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K"}.get(row.name, row.type)


def _more_bits(i: int, n: int) -> bool:
    """True for the first and last eighth of n layers and for every third between."""
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2
