"""What a round has to show before it is published: evidence of learning, and none of harm.

A few dozen thumbs cannot prove that a version is better (the half-width of a difference at 64 thumbs
is 0.17); superiority is for delivery to prove.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

from thumbloop.config.trainer import Gate
from trainer.evidence import Evidence

CHANCE = 0.5


class GateResult(NamedTuple):
    """Whether a round may be published; the reasons why not, each with its number."""

    reasons: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Say whether nothing speaks against the round."""
        return not self.reasons

    @property
    def reason(self) -> str:
        """Return all reasons in one line; empty when the round passed."""
        return "; ".join(self.reasons)


def check_reward(proven: Evidence, latest: Evidence, settings: Gate) -> GateResult:
    """Ask for evidence that the reward model ranks thumbs it was not fitted on, and for none against.

    `proven` is the strongest evidence of the lineage, `latest` that of this round alone. Once a
    policy is good nearly all replies shown are, and the few thumbs down are noise: no round alone
    could then prove anything, so what was proven holds until a round contradicts it.
    """
    reasons = []
    bound = proven.lower_bound(settings.confidence)
    if bound <= settings.min_auroc_bound:
        reasons.append(
            f"auroc: {proven.auroc:.3f} on held-out thumbs, lower bound {bound:.3f}"
            f" not above {settings.min_auroc_bound:.3f}"
        )
    if latest.upper_bound(settings.confidence) < CHANCE:
        reasons.append(f"auroc_reversed: {latest.auroc:.3f} on new thumbs, clearly below {CHANCE}")
    return GateResult(tuple(reasons))


def check_fit(fitted: Evidence, before: Evidence, settings: Gate) -> GateResult:
    """Ask that the fit broke nothing: on the thumbs it was fitted on it should rank better than before.

    `before` is held-out evidence on the same thumbs. Ranking what one was taught proves nothing, and
    failing at it is the sign of a fit that went astray.
    """
    bound = before.lower_bound(settings.confidence)
    if fitted.auroc >= bound:
        return GateResult(())
    reason = f"fit: {fitted.auroc:.3f} on the thumbs it was fitted on, {before.auroc:.3f} before"
    return GateResult((reason,))


def check_update(
    metrics: Mapping[str, float], norms: Mapping[str, float], settings: Gate
) -> GateResult:
    """Ask that all numbers are finite, every module's update bounded, the divergence affordable."""
    reasons = [
        f"not_finite: {name} is {value}"
        for name, value in {**metrics, **norms}.items()
        if not math.isfinite(value)
    ]
    module, norm = max(norms.items(), key=lambda item: item[1])
    if norm > settings.max_update_norm:
        reasons.append(f"update_norm: {norm:.3g} in {module}, above {settings.max_update_norm:g}")
    kl = metrics["kl_to_reference"]
    if kl > settings.max_kl:
        reasons.append(f"kl: {kl:.3g} nats per reply, above {settings.max_kl:g}")
    return GateResult(tuple(reasons))
