"""What recent traffic says about guidance: how long replies are and how fast they come, what a good best
reward is, and what a partial score is worth. Of rewards only audits are believed, in which nothing was
pruned; of lengths and times only requests in which nothing was left out.
"""

import math
import statistics
from collections import defaultdict, deque
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from scipy.stats import spearmanr

from server.guidance import Checkpoint, Choice, Enough, Outcome
from thumbloop.config.server import Guidance
from thumbloop.types import Arm, Candidate, Extent

WINDOW = 256
"""Requests that are remembered of each version."""
VERSIONS = 8
"""Versions that are remembered."""
WIDE = 0.75
"""Quantile of the audits' spreads above which a first wave is too spread out to stop at."""
FEWEST_RANKED = 3
"""Candidates still running at a checkpoint that make a rank correlation."""


def _window() -> "deque[float]":
    return deque(maxlen=WINDOW)


@dataclass(slots=True)
class _Recent:
    """The last requests that one version answered."""

    tokens: "deque[float]" = field(default_factory=_window)
    best: "deque[float]" = field(default_factory=_window)
    spread: "deque[float]" = field(default_factory=_window)
    pace: "deque[float]" = field(default_factory=_window)
    """Seconds for each token of a request's longest candidate."""
    correlations: "defaultdict[int, deque[float]]" = field(
        default_factory=lambda: defaultdict(_window)
    )
    """Checkpoint -> rank correlation of partial and final rewards, one for each audit."""

    def for_next_version(self, audits: int) -> "_Recent":
        """Return what a new version begins with: all but rewards, which are another model's.

        Of correlations the last few, as many `audits` as decide: its own soon outweigh them.
        """
        copied = {n: deque([*seen][-audits:], WINDOW) for n, seen in self.correlations.items()}
        return _Recent(
            tokens=deque(self.tokens, WINDOW),
            pace=deque(self.pace, WINDOW),
            correlations=defaultdict(_window, copied),
        )

    def length(self, max_tokens: int) -> float:
        """Return how long a reply is to be expected, tokens."""
        return min(_mean(self.tokens) or max_tokens, max_tokens)


class Calibration:
    """Turns what a request wants into what it gets, by what was seen. Lives on the event loop."""

    def __init__(self, settings: Guidance, capacity: int) -> None:
        self._settings = settings
        self._capacity = capacity
        self._recent: dict[int, _Recent] = {}

    def plan(
        self,
        version: int,
        wanted: Choice,
        max_tokens: int,
        in_flight: int,
        compared: Collection[int] = (),
    ) -> tuple[Choice, Extent]:
        """Return the choice with as many candidates as can be afforded, its waves and checkpoints.

        `in_flight` counts the candidates that other requests sample at the moment. `compared` are versions
        whose thumbs are compared: there is a first wave for all of them or for none.
        """
        recent = self._of(version)
        pace = _mean(recent.pace)
        n, extent = affordable(
            wanted.num_candidates,
            room=self._capacity - in_flight,
            time_limit_s=wanted.time_limit_s,
            expected_s=None if pace is None else pace * recent.length(max_tokens),
        )
        is_ready = all(self._enough(self._of(each)) for each in compared)
        enough = self._enough(recent) if is_ready else None
        planned = replace(
            wanted,
            num_candidates=n,
            first_wave=self._settings.first_wave if enough else 0,
            enough=enough,
            checkpoints=self._checkpoints(recent, n, max_tokens),
        )
        return planned, extent

    def observe(self, version: int, choice: Choice, outcome: Outcome, seconds: float) -> None:
        """Learn from a request that was answered; `seconds` is how long its guidance took."""
        if outcome.selected:
            return  # what was left says nothing about what was not
        recent, candidates = self._of(version), outcome.candidates
        lengths = [len(c.token_ids) for c in candidates]
        recent.tokens.extend(lengths)
        recent.pace.append(seconds / max(*lengths, 1))
        rewards = [c.reward for c in candidates if c.reward is not None]
        if outcome.arm is not Arm.AUDIT or not outcome.reranked or len(rewards) < 2:
            return
        recent.best.append(max(rewards))
        recent.spread.append(statistics.pstdev(rewards))
        for number in range(len(choice.checkpoints)):
            if (correlation := rank_correlation(candidates, number)) is not None:
                recent.correlations[number].append(correlation)

    def correlation(self, version: int, checkpoint: int) -> float:
        """Return the mean rank correlation of partial and final rewards; NaN before any audit."""
        recent = self._recent.get(version)
        mean = None if recent is None else _mean(recent.correlations.get(checkpoint, ()))
        return math.nan if mean is None else mean

    def is_pruning(self, version: int, checkpoint: int) -> bool:
        """Say whether a checkpoint prunes: until enough audits say that its scores mean too little."""
        recent = self._recent.get(version)
        return recent is None or self._prunes(recent, checkpoint)

    def _of(self, version: int) -> _Recent:
        """Return what is remembered of a version; a new one goes on from the one met last."""
        if version not in self._recent:
            before = next(reversed(self._recent.values()), _Recent())
            self._recent[version] = before.for_next_version(self._settings.min_audits)
            if len(self._recent) > VERSIONS:
                del self._recent[next(iter(self._recent))]
        return self._recent[version]

    def _prunes(self, recent: _Recent, checkpoint: int) -> bool:
        seen = recent.correlations.get(checkpoint, ())
        if len(seen) < self._settings.min_audits:
            return True
        return statistics.fmean(seen) >= self._settings.min_rank_correlation

    def _enough(self, recent: _Recent) -> Enough | None:
        """Return the threshold for a first wave, once there are audits to take it from."""
        if not self._settings.first_wave or len(recent.best) < self._settings.min_audits:
            return None
        quantile = self._settings.first_wave_quantile
        return Enough(
            best=float(np.quantile(recent.best, quantile)),
            spread=float(np.quantile(recent.spread, WIDE)),
        )

    def _checkpoints(self, recent: _Recent, n: int, max_tokens: int) -> tuple[Checkpoint, ...]:
        """Return where to look, in tokens of a reply of ordinary length, and how many go on."""
        length = recent.length(max_tokens)
        return tuple(
            Checkpoint(
                tokens=max(1, round(checkpoint.at * length)),
                keep=max(1, round(checkpoint.keep * n)),
                prunes=self._prunes(recent, number),
            )
            for number, checkpoint in enumerate(self._settings.checkpoints)
        )


def affordable(
    wanted: int, *, room: int, time_limit_s: float | None, expected_s: float | None
) -> tuple[int, Extent]:
    """Return how many candidates a request gets, at least one, and why.

    `room` is how many more the engine can decode at once; `expected_s` how long requests take.
    """
    n, extent = wanted, Extent.REQUESTED
    if room < n:
        n, extent = max(room, 1), Extent.LOAD
    if time_limit_s is not None and expected_s and time_limit_s < expected_s:
        in_time = max(int(wanted * time_limit_s / expected_s), 1)
        if in_time < n:
            n, extent = in_time, Extent.DEADLINE
    return n, extent if n < wanted else Extent.REQUESTED


def rank_correlation(candidates: Sequence[Candidate], checkpoint: int) -> float | None:
    """Return Spearman's correlation of rewards at a checkpoint with final ones.

    Over the candidates that were still running then; None where those are too few or all alike.
    """
    pairs = [
        (c.stage_rewards[checkpoint], c.reward)
        for c in candidates
        if len(c.stage_rewards) > checkpoint and c.reward is not None
    ]
    partial, final = {p for p, _ in pairs}, {f for _, f in pairs}
    if len(pairs) < FEWEST_RANKED or len(partial) == 1 or len(final) == 1:
        return None
    return float(spearmanr(*zip(*pairs, strict=True)).statistic)


def _mean(values: Iterable[float]) -> float | None:
    """Return the mean, None of nothing."""
    known = list(values)
    return statistics.fmean(known) if known else None
