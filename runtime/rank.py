"""Scores of candidates as continuations of one prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from .base import arguments
from .base.errors import OptionError
from .session import common_prefix

if TYPE_CHECKING:
    from . import _core
    from .backends.engine import Tokens
    from .session import Session


@dataclass(frozen=True)
class CandidateScore:
    """logprob: ln p(candidate | prompt), nats. tokens: of the candidate."""

    logprob: float
    tokens: int

    @property
    def per_token(self) -> float:
        """The mean of its tokens, with which candidates of different lengths compare."""
        return self.logprob / self.tokens


class RankingModel(Protocol):
    """What ranking needs of a model."""

    @property
    def engine(self) -> _core.Engine:
        """The native engine."""

    def session(self) -> Session:
        """Makes a new, empty session."""

    def _encode(
        self, text: str | Tokens, *, add_special: bool, parse_special: bool
    ) -> list[int]: ...


def rank(
    model: RankingModel, prompt: str | Tokens, candidates: Sequence[str | Tokens]
) -> list[CandidateScore]:
    """As Model.rank."""
    engine: Any = model.engine
    candidates = arguments.sequence("candidates", candidates, "a sequence of texts")
    head = model._encode(prompt, add_special=True, parse_special=True)
    texts = [_continued(model, prompt, head, candidate) for candidate in candidates]
    if not texts:
        return []
    # Where a text's tokens differ from the prompt's own before its end, they are the candidate's.
    shared = min(common_prefix(head, text) for text in texts)
    if shared == 0:
        raise OptionError("the prompt is empty and the model has no beginning-of-text token")
    for text, candidate in zip(texts, candidates, strict=True):
        if len(text) == shared:
            raise OptionError(f"candidates: expected texts that are not empty, found {candidate!r}")
    session = model.session()
    if shared > 1:
        session.append(head[: shared - 1])
    sequences = [session._sequence.fork() for _ in texts]
    rows = [
        (sequence, text[i], text[i + 1])
        for sequence, text in zip(sequences, texts, strict=True)
        for i in range(shared - 1, len(text) - 1)
    ]
    nats = engine.score(rows).tolist()
    scores = []
    for text in texts:
        own, nats = nats[: len(text) - shared], nats[len(text) - shared :]
        scores.append(CandidateScore(-sum(own), len(own)))
    return scores


def _continued(
    model: RankingModel, prompt: str | Tokens, head: list[int], candidate: str | Tokens
) -> list[int]:
    if isinstance(prompt, str) and isinstance(candidate, str):
        return model._encode(prompt + candidate, add_special=True, parse_special=True)
    return head + model._encode(candidate, add_special=False, parse_special=True)
