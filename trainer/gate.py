"""What a round has to show before it is published: evidence of learning, and none of harm.

A few dozen thumbs cannot prove that a version is better (the half-width of a difference at 64 thumbs
is 0.17); superiority is for delivery to prove.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from scipy.stats import norm

from thumbloop.config.trainer import Gate
from trainer.evidence import Evidence, held_out_auroc, ordered_right, pool
from trainer.harm import Values
from trainer.rollouts import Judgement, Thumb, unrated

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


def all_of(*results: GateResult) -> GateResult:
    """Return several results as one."""
    return GateResult(tuple(reason for result in results for reason in result.reasons))


def proof_confidence(look: int, error_rate: float) -> float:
    """Return the level at which the look of this number, from 1, has to prove that something was learned.

    The errors of all looks, 1 / (k (k + 1)) of the rate each, sum to the rate however many there are
    (alpha spending: Foster & Stine 2008, JRSS B 70), so that it holds for a run and not for a round.
    """
    return 1 - error_rate / (look * (look + 1))


def check_reward(latest: Evidence, settings: Gate, *, look: int, is_proven: bool) -> GateResult:
    """Ask for evidence that the reward model ranks feedback it was not fitted on.

    `is_proven`: the parent has a reward model, which passed. Once a policy is good nearly all replies
    shown are, and the few thumbs down are noise: no round could then prove anything, so what was proven
    holds. Where new feedback contradicts the parent's reward model, it is what the fit is for: see check_fit.
    """
    if is_proven:
        return GateResult(())
    bound = latest.lower_bound(proof_confidence(look, settings.error_rate))
    if bound > settings.min_auroc_bound:
        return GateResult(())
    return GateResult(
        (
            f"auroc: {latest.auroc:.3f} on held-out thumbs, lower bound {bound:.3f}"
            f" not above {settings.min_auroc_bound:.3f}",
        )
    )


def check_fit(fitted: Evidence, before: Evidence, settings: Gate) -> GateResult:
    """Ask that the fit broke nothing: on the thumbs it was fitted on it should rank better than before.

    `before` is held-out evidence on the same thumbs. Ranking what one was taught proves nothing, and
    failing at it is the sign of a fit that went astray, or of feedback that says the opposite of what was
    replayed beside it.
    """
    is_broken = fitted.auroc < before.lower_bound(settings.harm_confidence)
    is_reversed = fitted.upper_bound(settings.harm_confidence) < CHANCE
    if not (is_broken or is_reversed):
        return GateResult(())
    reason = f"fit: {fitted.auroc:.3f} on the thumbs it was fitted on, {before.auroc:.3f} before"
    return GateResult((reason,))


def check_finite(metrics: Mapping[str, float], norms: Mapping[str, float]) -> GateResult:
    """Ask that all numbers are finite."""
    return GateResult(
        tuple(
            f"not_finite: {name} is {value}"
            for name, value in {**metrics, **norms}.items()
            if not math.isfinite(value)
        )
    )


def check_update(
    metrics: Mapping[str, float], norms: Mapping[str, float], settings: Gate
) -> GateResult:
    """Ask that every module's update is bounded, and the divergence affordable."""
    reasons = []
    module, norm = max(norms.items(), key=lambda item: item[1])
    if norm > settings.max_update_norm:
        reasons.append(f"update_norm: {norm:.3g} in {module}, above {settings.max_update_norm:g}")
    kl = metrics["kl_to_reference"]
    if kl > settings.max_kl:
        reasons.append(f"kl: {kl:.3g} nats per reply, above {settings.max_kl:g}")
    return GateResult(tuple(reasons))


def check_values(values: Mapping[str, Values], settings: Gate) -> GateResult:
    """Ask that no estimate of the thumb rate says that the child is worse than its parent.

    An estimate that rests on a handful of replies, because the child hardly says what was rated, says nothing.
    """
    reasons = []
    for name, each in values.items():
        if each.effective_share < settings.min_effective_share:
            continue
        _, upper = each.gain.bounds(2 * settings.harm_confidence - 1)
        if upper < 0:
            reasons.append(
                f"harm: {name} estimates {each.child.value:.3f} of thumbs up after"
                f" {each.parent.value:.3f}, clearly fewer"
            )
    return GateResult(tuple(reasons))


def check_collapse(metrics: Mapping[str, float], settings: Gate) -> GateResult:
    """Ask that the child still has something to say, says it once, and comes to an end.

    And that enough of its parent's replies are such that it would say them: of another nothing is known here.
    """
    reasons = []
    if metrics["child_effective_share"] < settings.min_effective_share:
        reasons.append(
            f"unknown: {metrics['child_effective_share']:.2f} of the replies speak for the child, below"
            f" {settings.min_effective_share:g}"
        )
    share = metrics["child_entropy"] / max(metrics["reference_entropy"], 1e-9)
    if share < settings.min_entropy_share:
        reasons.append(
            f"entropy: {share:.2f} of the reference's, below {settings.min_entropy_share:g}"
        )
    for name, most in (
        ("repetition", settings.max_repetition_rise),
        ("unended_share", settings.max_unended_rise),
    ):
        rise = metrics.get(f"child_{name}", 0.0) - metrics.get(f"base_{name}", 0.0)
        if rise > most:
            reasons.append(f"{name}: {rise:.2f} above the base model's, at most {most:g} allowed")
    return GateResult(tuple(reasons))


def check_length(
    metrics: Mapping[str, float], judgements: Sequence[Judgement], settings: Gate
) -> GateResult:
    """Ask that replies grow or shrink only where what was said of the line's recent replies asks for it.

    It does where replies of such a length are the better ones, or where the estimated thumb rate has risen
    since a length was justified last. The drift is from that one, so that it cannot creep. Brevity is a
    legitimate wish, and so are words of thanks, which make replies longer. Where replies of such a length are
    clearly the worse ones, a step from the parent's is too much already, unless the reward model of thumbs says
    that these are better for another reason.
    """
    reasons = []
    if has_drifted(metrics, settings):
        drift = _length_drift(metrics)
        wish = length_evidence(judgements, is_longer=drift > 1)
        is_wished = wish.lower_bound(settings.length_confidence) > CHANCE
        if not (is_wished or has_risen(metrics, settings)):
            reasons.append(
                f"length: {drift:.2f} times what it was, and thumbs do not rise with it ({wish.auroc:.2f})"
            )
    step = _length_change(metrics, "parent_reply_tokens")
    if max(step, 1 / step) > settings.max_unwished_step and not pleases(metrics, settings):
        wish = length_evidence(judgements, is_longer=step > 1)
        if wish.upper_bound(settings.harm_confidence) < CHANCE:
            reasons.append(
                f"length: {step:.2f} times the parent's, and thumbs fall with it ({wish.auroc:.2f})"
            )
    return GateResult(tuple(reasons))


def pleases(metrics: Mapping[str, float], settings: Gate) -> bool:
    """Say whether the thumbs' reward model expects more thumbs up of the child than of its parent, and the thumbs
    themselves, where they can be asked, no fewer.

    The first holds wherever thumbs are all that the policy is rewarded for, and where another reward does not win over
    them. The second is what a reward model that is wrong has no say in.
    """
    expected = metrics.get("child_predicted_rate", 0.0) > metrics.get("parent_predicted_rate", 0.0)
    if not (expected and are_rates_known(metrics, settings)):
        return expected
    return metrics["child_rate"] >= metrics["parent_rate"]


def has_risen(metrics: Mapping[str, float], settings: Gate) -> bool:
    """Say whether the child's estimated thumb rate is above that of when its length was justified last."""
    if not are_rates_known(metrics, settings):
        return False
    error = math.hypot(metrics["child_rate_error"], metrics["justified_rate_error"])
    rise = metrics["child_rate"] - metrics["justified_rate"]
    return bool(rise > norm.ppf(settings.length_confidence) * error)


def are_rates_known(metrics: Mapping[str, float], settings: Gate) -> bool:
    """Say whether the estimated thumb rates rest on enough replies to make anything of them."""
    share = metrics.get("rated_effective_share")
    return share is not None and share >= settings.min_effective_share


def justify(metrics: Mapping[str, float], settings: Gate) -> dict[str, float]:
    """Return the metrics with the child's length, and its thumb rate, as those that later drift is from.

    A rate that is not known is none: the next round takes what it says of its parent.
    """
    names = ("reply_tokens", "rate", "rate_error")
    known = names if are_rates_known(metrics, settings) else names[:1]
    others = {k: x for k, x in metrics.items() if k not in {f"justified_{name}" for name in names}}
    return others | {f"justified_{name}": metrics[f"child_{name}"] for name in known}


def has_drifted(metrics: Mapping[str, float], settings: Gate) -> bool:
    """Say whether replies have grown or shrunk more than they may without being asked to."""
    drift = _length_drift(metrics)
    return max(drift, 1 / drift) > settings.max_length_drift


def _length_drift(metrics: Mapping[str, float]) -> float:
    """Return the child's length over that which was justified last; 1 where no reply was whole."""
    return _length_change(metrics, "justified_reply_tokens")


def _length_change(metrics: Mapping[str, float], since: str) -> float:
    if "child_reply_tokens" not in metrics:
        return 1.0
    return metrics["child_reply_tokens"] / metrics[since]


def length_evidence(judgements: Sequence[Judgement], *, is_longer: bool) -> Evidence:
    """Return how well longer replies, or shorter ones, are told from the others by what was said of them.

    Replies of different versions are not compared: later ones may be both longer and better, for reasons of
    their own.
    """
    sign = 1.0 if is_longer else -1.0
    by_version: dict[int, list[Thumb]] = defaultdict(list)
    for judgement in judgements:
        if isinstance(judgement, Thumb):
            by_version[judgement.policy_version].append(judgement)
    rated = [
        held_out_auroc([sign * len(t.response) for t in thumbs], [t.is_up for t in thumbs])
        for thumbs in by_version.values()
    ]
    pairs = unrated(judgements)
    margins = [sign * (len(pair.better) - len(pair.worse)) for pair in pairs]
    return pool([*rated, ordered_right(margins, [pair.response_id for pair in pairs])])
