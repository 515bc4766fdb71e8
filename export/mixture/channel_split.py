"""The split of a feed-forward's channels: shared ones, and those of each domain's expert.

Source for the idea: Cai et al., Read-ME: Refactorizing LLMs as router-decoupled mixture of
experts with system co-design, 2024.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]
Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Split:
    """Channels of one layer: shared [s], and each expert's [experts, width]; ascending."""

    shared: Indices
    experts: Indices

    def of(self, experts: tuple[int, ...]) -> Indices:
        """Columns of the fit (shared ones, then expert by expert) that are active with these."""
        s, width = len(self.shared), self.experts.shape[1]
        parts = [np.arange(s)]
        parts += [np.arange(s + e * width, s + (e + 1) * width) for e in experts]
        return np.concatenate(parts)

    @property
    def all(self) -> Indices:
        """The channel behind each column of the fit, [s + experts * width]."""
        return np.concatenate([self.shared, self.experts.reshape(-1)])


def choose(importance: Doubles, shared: int, width: int) -> Split:
    """Splits channels by their importance [domains, channels] in each domain.

    importance: the mean energy that a channel adds to the output on the tokens of a domain.
    shared: how many common channels. width: channels of each expert (domain). If shared +
    domains * width is the number of channels, every channel has exactly one place; else experts
    take those that matter most in their domain, whether or not others have them as well.
    """
    domains, n = importance.shape
    # A domain with large activations must not decide alone.
    share = importance / np.maximum(importance.sum(axis=1, keepdims=True), 1e-300)
    # A high share in all domains: the geometric mean, floored for channels that a domain lacks.
    floor = 1e-3 / n
    common = np.sort(np.argsort(-np.log(share + floor).mean(axis=0), kind="stable")[:shared])
    rest = np.setdiff1d(np.arange(n), common)
    if shared + domains * width == n:
        return Split(common, _parted(share[:, rest], rest, width))
    order = np.argsort(-share[:, rest], axis=1, kind="stable")[:, :width]
    return Split(common, np.sort(rest[order], axis=1))


def _parted(share: Doubles, channels: Indices, width: int) -> Indices:
    """Gives every channel to the domain that misses it most without it; all domains get `width`."""
    domains = len(share)
    affinity = share - (share.sum(axis=0) - share) / max(1, domains - 1)
    members: list[list[int]] = [[] for _ in range(domains)]
    placed = np.zeros(len(channels), dtype=bool)
    for at in np.argsort(-affinity, axis=None, kind="stable"):
        domain, channel = divmod(int(at), len(channels))
        if not placed[channel] and len(members[domain]) < width:
            placed[channel] = True
            members[domain].append(int(channels[channel]))
    return np.sort(np.array(members, dtype=np.int64).reshape(domains, width), axis=1)
