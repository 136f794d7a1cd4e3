"""Settings of how a published version comes to answer."""

import re
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from thumbloop.config.shared import Section


class Guards(Section):
    """What takes a canary back whatever its thumbs say: how much higher than the others' its users' mean may
    be, of numbers in [0, 1]."""

    alpha: float = Field(0.001, gt=0, lt=1)
    """Probability with which each guard takes back a canary that keeps within its margin."""
    errors: float = Field(0.02, ge=0, le=1)
    """Margin of the share of failed requests."""
    latency: float = Field(0.1, ge=0, le=1)
    """Margin of the time in the engine, on a scale on which the current version's median is 0.5 and twice
    that is 0.67."""
    length: float = Field(0.15, ge=0, le=1)
    """Margin of the reply's tokens, longer or shorter, on the same kind of scale."""
    repetition: float = Field(0.1, ge=0, le=1)
    """Margin of the share of 4-grams of tokens that came before in the same reply."""
    refusals: float = Field(0.05, ge=0, le=1)
    """Margin of the share of replies that decline what was asked."""
    divergence: float = Field(0.1, ge=0, le=1)
    """Margin of half the difference between the thumbs that rewards promise and those that came."""
    refusal_pattern: str = (
        r"(i('m| am) (very |so )?sorry|sorry,|i apologi[sz]e|i (can ?not|can't|won't|am unable|'m unable)"
        r"|as an ai|unfortunately, i)"
    )
    """Regular expression of how a declining reply begins, whatever the case."""
    max_corrupted: int = Field(0, ge=0)
    """Replies whose log-probabilities are no numbers that a canary may give; one more takes it back."""

    @field_validator("refusal_pattern")
    @classmethod
    def _is_readable(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"is no regular expression: {error}") from None
        return pattern


class Canary(Section):
    """How a version is tried; what holds when a trial begins holds until it ends."""

    share: float = Field(0.1, gt=0, lt=1)
    """Share of the users who have the canary; the same users from the first reply to the last."""
    promote_alpha: float = Field(0.05, gt=0, lt=1)
    """Probability with which a version whose replies are liked no more often is promoted."""
    roll_back_alpha: float = Field(0.05, gt=0, lt=1)
    """Probability with which a version whose replies are liked no less often is taken back by its thumbs."""
    horizon: int = Field(2000, ge=1)
    """Users of the canary who rated after whom it is taken back undecided."""
    min_time_s: float = Field(0.0, ge=0)
    """Seconds before which nothing is promoted, for instance a day, so that all kinds of users come."""
    max_time_s: float = Field(604_800.0, gt=0)
    """Seconds after which it is taken back undecided."""
    look_interval_s: float = Field(1.0, gt=0)
    """Seconds between looks at what users did."""
    guards: Guards = Guards()
    """What takes it back whatever its thumbs say."""

    @model_validator(mode="after")
    def _has_time(self) -> Self:
        if self.min_time_s >= self.max_time_s:
            raise ValueError("min_time_s has to be below max_time_s")
        return self


class Delivery(Section):
    """How a published version comes to answer."""

    mode: Literal["direct", "canary"] = "direct"
    """direct: an attested version becomes current at once. canary: it first answers a share of the users,
    whose thumbs decide."""
    canary: Canary = Canary()
    """How a version is tried."""
    poll_interval_s: float = Field(0.1, gt=0)
    """Seconds between looks at the store."""
    drain_timeout_s: float = Field(120.0, ge=0)
    """Seconds after which a replaced version that still answers requests is reported."""
    max_norm_factor: float = Field(20.0, gt=1)
    """Largest growth of any module's update norm against the parent's."""
    small_update_norm: float = Field(0.5, gt=0)
    """Update norms below this count as this for max_norm_factor: a young adapter may grow."""
    max_update_norm: float = Field(1e3, gt=0)
    """Largest Frobenius norm of any module's update."""
    keep_versions: int = Field(10, ge=1)
    """Versions that nobody needs whose folders are kept, the last ones that served first; beside those that
    answer, wait, are loaded or that a rollback leads to. Of several servers the smallest number holds."""
