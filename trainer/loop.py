"""The trainer's rounds: wait until enough is new, learn, then publish or say why not."""

import math
import re
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from time import perf_counter, sleep, time
from typing import NamedTuple

import uuid_utils
from sqlalchemy import Engine

from thumbloop.artifacts import BaseModelIdentity
from thumbloop.config import TrainerConfig
from thumbloop.errors import BadPolicyVersion, StoreUnavailable
from thumbloop.leases import hold
from thumbloop.store import feedback, preferences, reading, versions
from thumbloop.types import DEFAULT_POLICY, PolicyVersion, VersionState
from trainer import components, dataset, probes, publishing
from trainer.crowd import count_within
from trainer.dataset import Dataset
from trainer.learning import Learner, Lesson
from trainer.metrics import TrainerMetrics
from trainer.models import ADAPTERS, Trunk
from trainer.parents import next_parent
from trainer.publishing import Attempt, Ended
from trainer.schedule import awaited, looks, needed_feedback

RESTS_PER_LOOK = 20
"""How many times as long as it looks into the store the loop rests while no round is due."""
LONGEST_REST_S = 60.0
"""How long it rests at most, however long it looked; `round.poll_interval_s` may be longer."""


class Due(NamedTuple):
    """A round to come: its parent, its number, how much feedback it needs, and how many rounds of the
    parent's line looked at evidence, this one included."""

    parent: PolicyVersion
    number: int
    needed: int
    look: int


class Loop:
    """Turns new feedback into policy versions, one round at a time."""

    def __init__(
        self,
        config: TrainerConfig,
        engine: Engine,
        trunk: Trunk,
        learner: Learner,
        base: BaseModelIdentity,
        metrics: TrainerMetrics,
        *,
        vocabulary: Sequence[int],
        end: Sequence[int],
        policy: str = DEFAULT_POLICY,
    ) -> None:
        self._config = config
        self._learner = learner
        self._engine = engine
        self._trunk = trunk
        self._base = base
        self._metrics = metrics
        self._vocabulary = vocabulary
        self._end = end
        self._policy = policy
        self._waiting_for = ""
        self._rest_s = 0.0
        gate = config.gate
        metrics.show_limits(
            {"kl_to_reference": gate.max_kl, "largest_update_norm": gate.max_update_norm}
        )

    def run(self) -> None:
        """Run rounds until there have been enough of them, or for ever."""
        done = 0
        while self._config.round.max_rounds is None or done < self._config.round.max_rounds:
            if self._step_when_readable():
                done += 1
            else:
                sleep(max(self._config.round.poll_interval_s, self._rest_s))
        self._trunk.workers.tell(None)

    def _step_when_readable(self) -> bool:
        """Run a round if one is due; a store that does not answer is waited for."""
        try:
            return self.step()
        except StoreUnavailable as error:
            self._wait(f"{error}; trying again")
            return False

    def step(self) -> bool:
        """Run a round if one is due; say whether it ended. One that cannot be recorded is dropped, after a pause.

        Raises StoreUnavailable: the store cannot be read. BadPolicyVersion: the parent's folder is damaged.
        """
        self._rest_s, started = 0.0, perf_counter()
        self._metrics.last_look.set(time())
        due = self._due()
        data = None if due is None else self._read(due)
        if due is None or data is None:
            # Years of feedback take longer to look through, and are not looked through all the time.
            self._rest_s = min(LONGEST_REST_S, RESTS_PER_LOOK * (perf_counter() - started))
            return False
        self._waiting_for = ""
        try:
            with self._hold(due.parent):
                self._round(due, data)
        except StoreUnavailable as error:
            self._drop(due, error)
            return False
        return True

    def _hold(self, parent: PolicyVersion) -> AbstractContextManager[object]:
        """Keep the parent's folder from being deleted; none of our processes has to do the same.

        Raises StoreUnavailable: it was deleted, as others are current by now. BadPolicyVersion: it is gone otherwise.
        """
        if not parent.policy_digest:
            return nullcontext()
        try:
            return hold(self._config.state.versions / parent.folder)
        except BadPolicyVersion:
            with reading(self._engine) as connection:
                found = versions.get(connection, parent.policy, parent.version)
            if found is None or found.collected_at is None:
                raise
            raise StoreUnavailable(f"version {parent.version} is not current any more") from None

    def _due(self) -> Due | None:
        """Return what the next round is about, once there is feedback for it."""
        now, settings = time(), self._config.round
        oldest, most = settings.oldest_feedback(now), settings.max_older_feedback
        with reading(self._engine) as connection:
            known = versions.list_versions(connection, self._policy)
            parent = next_parent(known, self._config.round, self._config.state.versions)
            rounds = versions.list_rounds(connection, self._policy)
            learned_by = versions.rounds_behind(self._policy, parent.version)
            new = feedback.count_new(connection, self._policy, learned_by, oldest, most)
            if self._config.reward.uses_preferences:
                new = new.plus(
                    preferences.count_new(connection, self._policy, learned_by, oldest, most)
                )
        within = count_within(new.new_of, new.older_of, settings.max_user_factor)
        self._metrics.parent.set(parent.version)
        self._metrics.new_feedback.set(within)
        published = [r["finished_at"] for r in rounds if r["version"] is not None]
        self._metrics.last_success.set(max(published, default=0.0))
        tainted = {v.version for v in known if v.is_tainted}
        tried = [r for r in rounds if r["version"] not in tainted]  # with what is gone
        needed = needed_feedback(tried, parent, settings, now=now)
        self._metrics.needed_feedback.set(needed)
        if child := awaited(known, parent):
            self._wait(f"waiting for the server to try version {child.version}")
            return None
        if within < needed:
            words = (
                f"waiting for {needed} new thumbs; version {parent.version} {_what_it_is(parent)}"
            )
            left_out = Counter(new.left_out) + Counter(over_user_factor=new.usable - within)
            if left_out and new.total >= needed:
                words += f"; there are {within}, left out {dict(left_out)}"
            self._wait(words)
            return None
        return Due(parent, len(rounds) + 1, needed, look=1 + looks(rounds, known, parent))

    def _read(self, due: Due) -> Dataset | None:
        """Read what the round learns from, once there is enough of it; else say what there is."""
        with reading(self._engine) as connection:
            data = dataset.read(
                connection,
                self._policy,
                due.parent,
                self._config.round,
                uses_preferences=self._config.reward.uses_preferences,
                logged=components.logged(self._config.rewards),
            )
        is_enough = data.new and data.num_new >= due.needed
        if is_enough and len(data.rollouts) >= self._config.round.min_rollouts:
            return data
        seen = "; ".join(
            f"{kind}: {intake.came_in} came in, left out {dict(intake.left_out)}"
            for kind, intake in data.intake.items()
        )
        self._wait(
            f"waiting for {self._config.round.min_rollouts} candidates and {due.needed} of new"
            f" feedback: there are {len(data.rollouts)} and {data.num_new} to learn from; {seen}"
        )
        return None

    def _round(self, due: Due, data: Dataset) -> None:
        """Learn from the data, then publish a version or record why there is none."""
        started, started_at = perf_counter(), time()
        parent, number = due.parent, due.number
        thumbs, pairs = len(data.new_thumbs), len(data.new) - len(data.new_thumbs)
        preferences_too = f", {pairs} preferences" if pairs else ""
        self._metrics.say(
            f"round {number}: {thumbs} new thumbs{preferences_too} and {len(data.rollouts)} candidates"
            f" on version {parent.version}"
        )
        lesson = self._trunk.workers.tell(Lesson(parent, number, due.look, data))
        generator = self._learner.take(lesson)
        before = {adapter: self._trunk.snapshot(adapter) for adapter in ADAPTERS}
        learned = self._learner.learn(lesson, generator)
        attempt = Attempt(str(uuid_utils.uuid7()), self._policy, parent, started_at, data, learned)
        if learned.gate.passed:
            with self._metrics.stage("probes"):
                proof = probes.make(
                    self._trunk,
                    before,
                    vocabulary=self._vocabulary,
                    end=self._end,
                    generator=generator,
                )
            with self._metrics.stage("publish"):
                ended = publishing.publish(
                    self._engine, self._trunk, attempt, proof, self._base, self._config
                )
        else:
            ended = publishing.record_blocked(self._engine, attempt)
        self._report(number, attempt, ended, perf_counter() - started)
        self._trunk.pace.rest()

    def _report(self, number: int, attempt: Attempt, ended: Ended, seconds: float) -> None:
        """Show what came of a round."""
        numbers = attempt.learned.metrics
        self._metrics.say(
            f"round {number}: {ended.words}; {seconds:.1f} s,"
            f" reward AUROC {numbers.get('reward_auroc', math.nan):.3f},"
            f" KL to the reference {numbers.get('kl_to_reference', 0.0):.2f} nats per reply"
        )
        self._metrics.round_ended(number, ended.outcome, seconds, numbers, attempt.data.left_out)

    def _drop(self, due: Due, error: StoreUnavailable) -> None:
        """Give up a round that could not be recorded; whatever it would have used is still new."""
        pause_s = self._config.round.retry_interval_s
        self._metrics.say(
            f"round {due.number}: dropped, as {error}; nothing is lost, its feedback stays new;"
            f" trying again in {pause_s:g} s"
        )
        self._metrics.round_failed()
        sleep(pause_s)

    def _wait(self, words: str) -> None:
        """Say what is missing, once, however the counts go on."""
        what = re.sub(r"\d+", "", words)
        if what != self._waiting_for:
            self._waiting_for = what
            self._metrics.say(words)


def _what_it_is(parent: PolicyVersion) -> str:
    is_current = parent.state is VersionState.CURRENT
    return "is current" if is_current else "is learned from, as the current one is tainted"
