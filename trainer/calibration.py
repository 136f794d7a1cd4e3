"""What a reward is worth as a probability: temperature, shift, and how far off the claims were.

Pure functions of numbers.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit, log_expit

BINS = 10
_SPREAD_OF_LOG_TEMPERATURE, _SPREAD_OF_SHIFT, _NO_SPREAD = 0.3, 0.5, 0.0
"""How far, in standard deviations, one round moves a calibration from its parent's: without that prior a
dozen thumbs that all agree would make every claim certain. Chosen on logged runs: docs/algorithm.md."""


class Calibration(NamedTuple):
    """P(thumb up) = sigmoid(reward / temperature + offset + shift).

    The offset is the one under which the reward model was fitted; temperature and shift are what claims of the line's
    models were found to be off by.
    """

    temperature: float = 1.0
    offset: float = 0.0
    shift: float = 0.0

    @classmethod
    def of(cls, metrics: Mapping[str, float]) -> "Calibration":
        """Return how the rewards of a version with these metrics are to be read."""
        return cls(
            metrics.get("reward_temperature", 1.0),
            metrics.get("reward_offset", 0.0),
            metrics.get("reward_shift", 0.0),
        )

    @property
    def metrics(self) -> dict[str, float]:
        """Return what `of` reads."""
        return {
            "reward_temperature": self.temperature,
            "reward_offset": self.offset,
            "reward_shift": self.shift,
        }

    def logits(self, rewards: Sequence[float] | np.ndarray) -> np.ndarray:
        """Return the predicted log-odds (N,) of a thumb up."""
        return np.asarray(rewards) / self.temperature + self.offset + self.shift

    def probabilities(self, rewards: Sequence[float] | np.ndarray) -> np.ndarray:
        """Return the predicted probabilities (N,) of a thumb up."""
        return np.asarray(expit(self.logits(rewards)))


class Claims(NamedTuple):
    """What one reward model said of thumbs that it was not fitted on; all (N,)."""

    rewards: Sequence[float]
    ups: Sequence[bool]
    offset: float = 0.0


def recalibrate(parts: Sequence[Claims], prior: Calibration) -> Calibration:
    """Return temperature and shift that make claims about unseen thumbs most likely (Platt 1999; Guo et al. 2017,
    arXiv 1706.04599).

    With a normal prior around the parent's log-temperature and shift, which a few dozen thumbs move and a few hundred
    overrule: a line's thumbs add up, older ones counting less and less. The offset stays.
    """
    return _fit(parts, prior, _SPREAD_OF_LOG_TEMPERATURE, _SPREAD_OF_SHIFT)


def settle(parts: Sequence[Claims], prior: Calibration) -> Calibration:
    """Return the shift that makes claims about thumbs that a model was fitted on most likely.

    A few steps leave a fit off its mean, which even these thumbs tell; that they were learned makes claims about
    them too sharp to tell the temperature, which stays.
    """
    return _fit(parts, prior, _NO_SPREAD, _SPREAD_OF_SHIFT)


def _fit(parts: Sequence[Claims], prior: Calibration, *spreads: float) -> Calibration:
    """Return the most likely calibration, log-temperature and shift being normal around the prior's."""
    rewards = np.concatenate([[], *(np.asarray(p.rewards, dtype=float) for p in parts)])
    signs = np.concatenate([[], *(np.where(np.asarray(p.ups, bool), 1.0, -1.0) for p in parts)])
    offsets = np.concatenate([[], *(np.full(len(p.ups), p.offset) for p in parts)])
    before = np.array([math.log(prior.temperature), prior.shift])

    def loss(moved: np.ndarray) -> float:
        log_temperature, shift = before + moved * spreads
        logits = rewards * math.exp(-log_temperature) + offsets + shift
        return float(0.5 * (moved**2).sum() - log_expit(signs * logits).sum())

    log_temperature, shift = (before + minimize(loss, np.zeros(2)).x * spreads).tolist()
    return prior._replace(temperature=math.exp(log_temperature), shift=shift)


def log_odds(ups: float, downs: float) -> float:
    """Return the log-odds of a thumb up, one imagined thumb of each kind added."""
    return math.log((ups + 1) / (downs + 1))


def calibration_error(
    probabilities: Sequence[float], outcomes: Sequence[float], bins: int = BINS
) -> float:
    """Return the expected calibration error: the mean gap of claim and outcome, in bins of equal number.

    Naeini et al. 2015 (AAAI), with the bins of Nguyen & O'Connor 2015 (EMNLP). Outcomes are 0 or 1, or
    probabilities where those are known.
    """
    claims, truths = np.asarray(probabilities, dtype=float), np.asarray(outcomes, dtype=float)
    gaps = [abs(claims[i].sum() - truths[i].sum()) for i in _bins(claims, bins)]
    return float(sum(gaps) / len(claims))


def calibration_noise(probabilities: Sequence[float], bins: int = BINS) -> float:
    """Return the error that a perfectly calibrated model would show, with outcomes drawn by its claims.

    In a bin the gap is nearly normal around 0 with the variance of its draws, and E|N(0, s)| is
    s * sqrt(2 / pi).
    """
    claims = np.asarray(probabilities, dtype=float)
    spreads = [math.sqrt((claims[i] * (1 - claims[i])).sum()) for i in _bins(claims, bins)]
    return float(sum(spreads) * math.sqrt(2 / math.pi) / len(claims))


def _bins(claims: np.ndarray, bins: int) -> list[np.ndarray]:
    """Return indices by rising claim, in groups of equal number as far as that goes."""
    order = np.argsort(claims, kind="stable")
    return [part for part in np.array_split(order, bins) if len(part)]
