"""How versions are liked, and what was decided about them, as rows of tables."""

from collections.abc import Iterable, Sequence

from thumbloop.operating import time_in_words
from thumbloop.tracing import state_in_words
from thumbloop.v1 import admin_pb2
from web.figures import Liking
from web.tables import Row, Share

Words = tuple[str, ...]

LIKINGS = ("version", "thumbs up", "rewards promise")
COURSE = ("published (UTC)", "version", "thumbs up until then", "thumbs up expected of it")
DECISIONS = ("when (UTC)", "version", "became", "decided by", "why", "evidence")


def liking_rows(likings: Iterable[Liking]) -> list[Row]:
    """Return a row for each version that somebody asked or rated."""
    return [
        (str(of.version), of.thumbs_up or "not rated yet", of.promised or "no rewards")
        for of in likings
    ]


def course_rows(listed: Sequence[admin_pb2.PolicyVersion]) -> list[Row]:
    """Return a row for each version that was learned, oldest first: what users said until then, and what the reward
    model expects of it. `listed` is newest first."""
    rows: list[Row] = []
    for version in reversed(listed):
        if "thumb_up_rate" not in version.metrics:
            continue
        thumbs = int(version.metrics["feedback_used"] - version.metrics["preferences_used"])
        said = Share(version.metrics["thumb_up_rate"], thumbs) if thumbs else "preferences only"
        expected = version.metrics.get("child_predicted_rate")
        words = "no rewards" if expected is None else f"{expected:.0%}"
        rows.append((time_in_words(version.published_at), str(version.policy_version), said, words))
    return rows


def decision_rows(found: Sequence[admin_pb2.GetPolicyVersionResponse], most: int) -> list[Words]:
    """Return what happened to versions last, newest first; a trial that runs comes before all."""
    running = [
        ("now", str(one.policy_version.policy_version), "on trial", "", "", _evidence(one.trial))
        for one in found
        if one.trial
    ]
    past = sorted(
        ((event, one.policy_version.policy_version) for one in found for event in one.events),
        key=lambda pair: (pair[0].at.ToNanoseconds(), pair[1]),
        reverse=True,
    )
    return [*running, *(_decision(event, version) for event, version in past)][:most]


def _decision(event: admin_pb2.PolicyVersionEvent, version: int) -> Words:
    is_state = event.state != admin_pb2.POLICY_VERSION_STATE_UNSPECIFIED
    became = state_in_words(event.state, is_tainted=False) if is_state else ""
    return (
        time_in_words(event.at),
        str(version),
        became,
        event.actor,
        event.reason,
        _evidence(event.evidence),
    )


def _evidence(measures: Iterable[admin_pb2.TrialMeasure]) -> str:
    """Return what users of the canary said beside the others, measure by measure."""
    return "; ".join(
        f"{of.name}: {_said(of.canary_mean, of.canary_users)} against {_said(of.current_mean, of.current_users)}"
        for of in measures
        if of.canary_users or of.current_users
    )


def _said(mean: float, users: int) -> str:
    who = f"{users} user{'' if users == 1 else 's'}"
    return f"{mean:.0%} of {who}" if users else who
