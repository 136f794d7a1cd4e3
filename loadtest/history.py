"""What a round of the demo starts from, read from its store: a version, its last replies, new and older thumbs."""

from dataclasses import replace

from sqlalchemy import Connection

from loadtest.fill import History, Said
from thumbloop.config import State
from thumbloop.store import feedback, interactions, open_store, reading, versions
from thumbloop.types import BASE_VERSION, DEFAULT_POLICY, Interaction, RatedReply

PROVEN = {"reward_auroc": 1.0, "reward_auroc_variance": 0.0, "reward_auroc_pairs": 1e9}
"""What the first trainer's gate asked of a parent, and later ones do not."""


class TooFew(Exception):
    """A run of the demo has less than a round; the message says how much."""


def history_of(state: State, number: int, *, prompts: int, candidates: int, thumbs: int) -> History:
    """Return what a version's next round learns from, as if its parent were the base model.

    Its candidates are those of the newest replies with that many; its new thumbs are the newest on its own
    or earlier replies, and older ones are what it has learned. Raises TooFew.
    """
    store = open_store(state)
    try:
        with reading(store) as connection:
            version = versions.get(connection, DEFAULT_POLICY, number)
            assert version is not None, "the run's report names its versions"
            learned_by = versions.learned_by(connection, DEFAULT_POLICY, number)
            rated = [
                each
                for each in feedback.list_rated(connection, DEFAULT_POLICY, learned_by)
                if each.policy_version <= number
            ]
            learned = [each for each in rated if not each.is_new]
            new = [each for each in rated if each.is_new][-thumbs:]
            if len(new) < thumbs:
                raise TooFew(f"version {number} has {len(new)} new thumbs, {thumbs} are needed")
            groups = newest_groups(connection, number, prompts, candidates)
            ids = {each.response_id for each in (*learned, *new)}
            ids |= {each.response_id for each in groups}
            replies = [interactions.get(connection, response_id) for response_id in sorted(ids)]
    finally:
        store.dispose()
    return History(
        version=replace(version, parent=BASE_VERSION, metrics={**version.metrics, **PROVEN}),
        interactions=tuple(reply for reply in replies if reply is not None),
        learned=tuple(map(_said, learned)),
        new=tuple(map(_said, new)),
    )


def newest_groups(
    connection: Connection, number: int, prompts: int, candidates: int
) -> list[Interaction]:
    """Return a version's newest replies with that many candidates to learn from. Raises TooFew."""
    groups = [
        reply
        for reply in interactions.list_since(connection, DEFAULT_POLICY, number)
        if reply.policy_version == number
        and reply.trainable
        and len(reply.candidates) == candidates
    ]
    if len(groups) < prompts:
        raise TooFew(
            f"version {number} answered {len(groups)} prompts with {candidates} candidates,"
            f" {prompts} are needed"
        )
    return groups[-prompts:]


def _said(rated: RatedReply) -> Said:
    return Said(rated.response_id, rated.user, rated.value, rated.created_at)
