"""The settings of a refactoring, checked against its base."""

from __future__ import annotations

from dataclasses import dataclass

from ...runtime.base.errors import OptionError, UnsupportedModelError
from .dense_base import DenseBase


@dataclass(frozen=True)
class Recipe:
    """All settings; they are kept in the file."""

    experts: int
    used: int
    shared: int  # channels of a feed-forward that every token uses
    width: int  # channels of an expert
    type: str | None  # type of the feed-forwards; None: the base's
    minutes: float
    seed: int


def recipe(
    dense: DenseBase,
    *,
    experts: int,
    used: int,
    shared: int | None,
    width: int | None,
    type: str | None,
    minutes: float,
    seed: int,
) -> Recipe:
    """The recipe, its defaults filled in. Raises OptionError, UnsupportedModelError."""
    unit = _unit(dense, type)
    n_ff = dense.n_ff
    shared = n_ff // 2 // unit * unit if shared is None else shared
    width = max(unit, n_ff // 4 // unit * unit) if width is None else width
    if not 1 <= experts <= 1024:
        raise OptionError(f"experts: expected 1 to 1024, found {experts}")
    if not 1 <= used <= experts:
        raise OptionError(f"used: expected 1 to {experts} (the experts), found {used}")
    for name, value, least in (("shared", shared, 0), ("width", width, 1)):
        if not least <= value <= n_ff or value % unit:
            of = f" in steps of {unit} (the block of the type)" if unit > 1 else ""
            raise OptionError(f"{name}: expected {least} to {n_ff} channels{of}, found {value}")
    if shared + width > n_ff:
        raise OptionError(
            f"shared and width: expected at most {n_ff} channels together, found {shared + width}"
        )
    if not 0 <= minutes <= 24 * 60:
        raise OptionError(f"minutes: expected 0 to 1440, found {minutes:g}")
    if not 0 <= seed < 2**32:
        raise OptionError(f"seed: expected 0 to {2**32 - 1}, found {seed}")
    return Recipe(experts, used, shared, width, type, float(minutes), seed)


def _unit(dense: DenseBase, type: str | None) -> int:
    """Number of channels that the down matrices' types store together."""
    from ...runtime._core import formats

    writable = {f["name"]: int(f["block"]) for f in formats() if f["quantizes"]}
    if type is not None and type not in writable:
        raise OptionError(f"type: expected one of {', '.join(writable)}, found {type}")
    if dense.n_layer < 2:
        raise UnsupportedModelError(f"{dense.file.path}: expected at least 2 layers, found 1")
    if type is not None and dense.n_embd % writable[type]:
        raise OptionError(
            f"type: {type} needs rows of a multiple of {writable[type]} weights, found "
            f"{dense.n_embd}: choose one with smaller blocks, such as Q4_0"
        )
    unit = 1
    for layer in range(1, dense.n_layer):
        kind = type or dense.tensor(f"blk.{layer}.ffn_down.weight").type
        if kind not in writable:
            raise OptionError(
                f"type: the base's feed-forwards are {kind}, which cannot be written: choose one "
                f"of {', '.join(writable)}"
            )
        unit = max(unit, writable[kind])
    return unit
