"""What offloading computes on a mixture of real size is what the resident engine computes.

Runs where STOKER_TEST_MIXTURE names a mixture's GGUF file, which must fit into memory here:
    STOKER_TEST_MIXTURE=up64.gguf python -m pytest tests/offload/test_offload_real.py
"""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import stoker
from offload_models import MEBIBYTE, POLICIES, PREDICTORS, consistent, greedy, named_minimum, prompt
from stoker.offload.profile.profile import PREDICTORS as PREDICTORS_OF_PROFILES
from stoker.offload.profile.profile import fit, oracle_state, record
from stoker.offload.profile.profile_fit import Shape
from stoker.runtime import _core
from stoker.runtime.base import errors

NAMED = os.environ.get("STOKER_TEST_MIXTURE")
pytestmark = pytest.mark.skipif(not NAMED, reason="STOKER_TEST_MIXTURE names no mixture")

CONTEXT = 256
DECODE = 12
# Beyond the least that works, in which even a token's experts come and go: a part of the experts.
ROOM = 192 * MEBIBYTE
BACKENDS = ("pread_pool", "null:delay=0..0.5ms,spike=4ms@0.02,reorder,seed=3")


@dataclass(frozen=True)
class Real:
    """The mixture, its prompt and what the resident engine makes of it."""

    path: Path
    tokens: npt.NDArray[np.int32]
    expected: bytes  # of greedy()
    states: dict[str, bytes]  # predictor -> what it has learnt

    def offloaded(self, predictor: str, **options: object) -> _core.Engine:
        options = {"predictor": predictor, "threads": 2, "context": CONTEXT, **options}
        if predictor in self.states:
            options["predictor_state"] = self.states[predictor]
        file = _core.GgufFile(str(self.path))
        with pytest.raises(errors.BudgetError) as refused:
            _core.Engine(file, memory=1, **options)  # type: ignore[arg-type]
        memory = named_minimum(refused.value) + ROOM
        return _core.Engine(file, memory=memory, **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Real:
    path = Path(str(NAMED))
    model = stoker.load(path, threads=2, context=CONTEXT)
    e = model.engine
    if e.offload is not None:
        pytest.skip(f"this machine has not the memory to hold {path}")
    tokens = prompt(e, n=40)
    expected = greedy(e.sequence(), tokens, DECODE)
    others = [prompt(e, seed, CONTEXT // 2).tolist() for seed in (11, 12)]
    folder = tmp_path_factory.mktemp("profile")
    states = fit(record(model, others, str(folder)), PREDICTORS_OF_PROFILES)
    del model, e
    return Real(path, tokens, expected, states)


@pytest.fixture(scope="module")
def with_oracle(real: Real) -> Real:
    """The oracle has seen the very run."""
    e = real.offloaded("none")
    e.record_routing(True)
    assert greedy(e.sequence(), real.tokens, DECODE) == real.expected
    c = e.config
    shape = Shape(*(c[k] for k in ("n_layer", "n_embd", "n_expert", "n_expert_used")))
    state = oracle_state(e.take_routing(), shape)
    return Real(real.path, real.tokens, real.expected, {**real.states, "oracle": state})


@pytest.mark.parametrize(
    ("policy", "predictor", "io"),
    [
        (policy, predictor, BACKENDS[i % 2])
        for i, (policy, predictor) in enumerate(itertools.product(POLICIES, PREDICTORS))
    ],
)
def test_bit_for_bit(with_oracle: Real, policy: str, predictor: str, io: str) -> None:
    e = with_oracle.offloaded(predictor, policy=policy, prefetch="on", io=io)
    assert e.plan["slots"] < e.plan["experts"]
    t = e.sequence()
    for _ in range(2):  # from cold, then with what has stayed
        t.truncate(0)
        assert greedy(t, with_oracle.tokens, DECODE) == with_oracle.expected
    consistent(e.offload or {})
    assert e.offload is not None and e.offload["evictions"] > 0
    if predictor == "none":
        assert e.offload["prefetches"] == 0
