"""Results of a profile's predictors, as a table and as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from ..base.display import aligned, size

if TYPE_CHECKING:
    from ...offload.profile.profile import Profile


def as_table(made: Profile) -> str:
    """Returns a table of each predictor's recall of the experts that held-out text uses."""
    recalls = made.recalls
    columns = sorted({(r.width, r.distance) for r in recalls})
    names: Sequence[str] = list(dict.fromkeys(r.predictor for r in recalls))
    of = {(r.predictor, r.width, r.distance): r for r in recalls}
    rows = [["recall", *(f"{w} wide, {d} ahead" for w, d in columns)]]
    for name in names:
        cells = [of[name, w, d] for w, d in columns]
        rows.append([name, *("-" if r.mean is None else f"{r.mean * 100:.1f}%" for r in cells)])
    head = f"{made.path}: {size(made.nbytes)}, {made.tokens} tokens, 1/8 of them held out"
    return "\n".join([head, "", *aligned(rows, left=1)])


def as_json_text(made: Profile) -> str:
    """Returns the profile's results as one JSON object."""
    return json.dumps(asdict(made) | {"path": str(made.path)}, indent=2)
