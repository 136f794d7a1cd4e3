"""runs/demo/report.json: what happened, from the store and from what the demo saw itself."""

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import Engine as Database

from demo.evaluation import Evaluation
from demo.ledger import Ledger
from thumbloop.store import feedback, interactions, reading, versions
from thumbloop.types import DEFAULT_POLICY, Interaction, Learning, PolicyVersion, RatedReply

_SETTLING_S = 5.0  # failures this long around a swap are counted as the swap's


@dataclass(slots=True)
class Run:
    """One run of the demo, as it goes on."""

    preference: str
    seed: int
    shuffled: bool
    ledger: Ledger
    started_at: float
    evaluations: dict[int, Evaluation] = field(default_factory=dict)
    guided: dict[int, Evaluation] = field(default_factory=dict)
    memory: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Stored:
    """What the store holds at the end."""

    versions: list[PolicyVersion]
    rated: list[RatedReply]
    interactions: list[Interaction]
    feedback_events: int
    rounds: list[dict[str, Any]]
    learned_from: dict[int, set[int]]
    """version -> the feedback it learned from as new."""


def read_store(database: Database) -> Stored:
    """Read all that the report needs, in short transactions."""
    with reading(database) as connection:
        rows = versions.list_versions(connection, DEFAULT_POLICY)
        learned_from = versions.feedback_by_version(connection, DEFAULT_POLICY)
        rounds = [dict(row) for row in versions.list_rounds(connection, DEFAULT_POLICY)]
    with reading(database) as connection:
        rated = feedback.list_rated(connection, DEFAULT_POLICY)
        events, _ = feedback.counts(connection)
    with reading(database) as connection:
        answered = interactions.list_since(connection, DEFAULT_POLICY, 0)
    return Stored(rows, rated, answered, events, rounds, learned_from)


def version_rows(run: Run, database: Database) -> list[dict[str, Any]]:
    """Return the versions so far; cheap enough to be shown while it runs."""
    with reading(database) as connection:
        rows = versions.list_versions(connection, DEFAULT_POLICY)
        learned_from = versions.feedback_by_version(connection, DEFAULT_POLICY)
        aurocs = _aurocs(versions.list_rounds(connection, DEFAULT_POLICY))
    return [_version(run, learned_from, aurocs, row) for row in rows]


def _aurocs(rounds: Iterable[Mapping[Any, Any]]) -> dict[int, float]:
    """Return version -> AUROC of its own reward model, on the thumbs of the round after it.

    Those came when the reward model was finished, so it cannot have seen them.
    """
    return {
        row["parent"]: row["metrics"]["reward_auroc_latest"]
        for row in rounds
        if row["parent"] > 0 and "reward_auroc_latest" in row["metrics"]
    }


def make_report(run: Run, stored: Stored, finished_at: float) -> dict[str, Any]:
    """Return the report; every number in it was counted or measured in this run."""
    published = [v for v in stored.versions if v.version > 0]
    aurocs = _aurocs(stored.rounds)
    return {
        "seed": run.seed,
        "preference": run.preference,
        "shuffled_thumbs": run.shuffled,
        "versions": [_version(run, stored.learned_from, aurocs, v) for v in stored.versions],
        "requests": {"total": run.ledger.requests, "failed": len(run.ledger.failed)},
        "failures": dict(Counter(why for _, why in run.ledger.failed + run.ledger.failed_thumbs)),
        "feedback": _feedback(run, stored),
        "rounds": [_round(row) for row in stored.rounds],
        "swaps": [s for v in published if (s := _swap(run, v)) is not None],
        "feedback_to_served_s": _feedback_to_served(run, stored),
        "tokens": _tokens(run, stored),
        "sampler_trainer_kl": _worst(stored.versions, "sampler_trainer_kl"),
        "peak_memory_mib": round(run.memory.get("peak_mib", 0.0), 1),
        "wall_s": round(finished_at - run.started_at, 1),
    }


def _version(
    run: Run,
    learned_from: dict[int, set[int]],
    aurocs: Mapping[int, float],
    version: PolicyVersion,
) -> dict[str, Any]:
    evaluation = run.evaluations.get(version.version)
    guided = run.guided.get(version.version)
    return {
        "policy_version": version.version,
        "state": version.state.value,
        "reason": version.reason,
        "published_s": round(max(version.published_at - run.started_at, 0.0), 1),
        "policy_thumb_up_rate": evaluation.thumb_up_rate if evaluation else None,
        "policy_thumb_up_rate_ci": list(evaluation.interval) if evaluation else None,
        "guided_thumb_up_rate": guided.thumb_up_rate if guided else None,
        "guided_thumb_up_rate_ci": list(guided.interval) if guided else None,
        "served_thumb_up_rate": run.ledger.served_rates().get(version.version),
        "reward_model_auroc": aurocs.get(version.version),
        "kl_to_reference": version.metrics.get("kl_to_reference"),
        "mean_reply_tokens": evaluation.mean_reply_tokens if evaluation else None,
        "well_formed_share": evaluation.well_formed_share if evaluation else None,
        "thumbs_so_far": run.ledger.thumbs_before(version.published_at),
        "feedback_used": len(learned_from.get(version.version, ())),
    }


def _round(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "parent": row["parent"],
        "version": row["version"],
        "reason": row["reason"],
        "seconds": round(row["finished_at"] - row["started_at"], 1),
        "metrics": row["metrics"],
    }


def _feedback(run: Run, stored: Stored) -> dict[str, Any]:
    acknowledged = {key: value for key, (_, value) in run.ledger.acknowledged.items()}
    effective = {r.response_id: r.value for r in stored.rated}
    kept = sum(1 for key, value in acknowledged.items() if effective.get(key) == value)
    discarded: Counter[str] = Counter()
    for row in stored.rounds[-1:]:
        discarded.update(row["metrics"].get("left_out", {}).get("thumb", {}))
    return {
        "sent": run.ledger.sent,
        "unacknowledged": len(run.ledger.failed_thumbs),
        "stored": stored.feedback_events,
        "lost": len(acknowledged) - kept,
        "duplicated": stored.feedback_events - len(effective),
        "discarded": dict(discarded),
    }


def _swap(run: Run, version: PolicyVersion) -> dict[str, Any] | None:
    to_user = run.ledger.first_reply_at(version.version)
    answers = [run.ledger.first_answers.get(version.version), to_user]
    first = min((at for at in answers if at is not None), default=None)
    if first is None:
        return None
    near = (version.published_at - _SETTLING_S, first + _SETTLING_S)
    return {
        "policy_version": version.version,
        "published_to_serving_s": round(first - version.published_at, 3),
        "published_to_user_s": None
        if to_user is None
        else round(to_user - version.published_at, 3),
        "requests_failed": sum(1 for at, _ in run.ledger.failed if near[0] <= at <= near[1]),
    }


def _feedback_to_served(run: Run, stored: Stored) -> dict[str, float | None]:
    """Return how long thumbs took to shape a reply: acknowledged to first reply by a version."""
    rated_at = {r.feedback_id: r.created_at for r in stored.rated}
    waits = [
        first - rated_at[feedback_id]
        for version, used in stored.learned_from.items()
        if (first := run.ledger.first_reply_at(version)) is not None
        for feedback_id in used
        if feedback_id in rated_at
    ]
    if len(waits) < 2:
        return {"p50": None, "p95": None}
    cuts = statistics.quantiles(waits, n=20, method="inclusive")
    return {"p50": round(cuts[9], 2), "p95": round(cuts[18], 2)}


def _tokens(run: Run, stored: Stored) -> dict[str, int]:
    """Count sampled tokens in the store by who asked: users, the examiner, or nobody we know."""
    asked = {s.response_id for s in run.ledger.served}
    counts = {"served": 0, "evaluation": 0, "generated_for_training_only": 0}
    for interaction in stored.interactions:
        tokens = sum(len(c.token_ids) for c in interaction.candidates)
        if interaction.learning is Learning.EXCLUDED:
            counts["evaluation"] += tokens
        elif interaction.response_id in asked:
            counts["served"] += tokens
        else:
            counts["generated_for_training_only"] += tokens
    return counts


def _worst(rows: list[PolicyVersion], name: str) -> float | None:
    return max((v.metrics[name] for v in rows if name in v.metrics), default=None)


def summary(report: dict[str, Any], folder: Path) -> str:
    """Return a few lines that say what happened to somebody who has never seen this."""
    rated = [v for v in report["versions"] if v["policy_thumb_up_rate"] is not None]
    first, last = rated[0], rated[-1]
    learned = sum(1 for v in report["versions"] if v["policy_version"] > 0)
    thumbs, failed = report["feedback"], report["requests"]["failed"]
    lines = [
        f"The policy began with {first['policy_thumb_up_rate']:.0%} of its replies liked"
        f" and ended with {last['policy_thumb_up_rate']:.0%}, over"
        f" {learned} versions learned from {thumbs['stored']} thumbs.",
    ]
    if last["guided_thumb_up_rate"] is not None:
        lines.append(
            f"With the reward model choosing among 4 candidates, {last['guided_thumb_up_rate']:.0%}"
            " of the replies are liked."
        )
    if report["shuffled_thumbs"]:
        lines.append("This was the control: thumbs were permuted, so there was nothing to learn.")
    lines += [
        f"{report['requests']['total'] - failed} requests were answered while it learned, {failed} failed;"
        f" {thumbs['lost']} thumbs were lost.",
        f"Details: {folder / 'report.json'}; the curve: {folder / 'learning.png'}",
    ]
    return "\n".join(lines)
