import time

import pytest

from tests.rows import ANN, BOB, candidate, finished_round, interaction, rated, version
from tests.stores import empty_state
from thumbloop.config.trainer import Round
from thumbloop.store import deployments, feedback, interactions, open_store, preferences, versions
from thumbloop.types import (
    IMPORTED_VERSION,
    FinishReason,
    Learning,
    Sampling,
    Status,
    User,
    VersionState,
)
from trainer import dataset
from trainer.dataset import usable_versions
from trainer.rollouts import Comparison, Rollout, Thumb

SETTINGS = Round(max_rollouts=100, max_staleness=1)


@pytest.fixture
def connection(tmp_path):
    """A store with versions 0 to 3 in one line, 3 being current."""
    engine = open_store(empty_state(tmp_path))
    with engine.begin() as connection:
        for number in (1, 2, 3):
            versions.finish_round(
                connection, finished_round(number, number - 1), version(number, number - 1)
            )
            deployments.set_state(connection, "default", number, VersionState.CURRENT, at=1.0)
        yield connection
    engine.dispose()


def read(connection, settings=SETTINGS, **how) -> dataset.Dataset:
    """Read, and see that of all that came in nothing is missing and nothing there twice."""
    parent = versions.current(connection, "default")
    data = dataset.read(connection, "default", parent, settings, **how)
    thumbs = [f for f in (*data.new, *data.older) if isinstance(f, Thumb)]
    used = {
        "reply": data.intake["thumb"].came_in,
        "thumb": len(thumbs),
        "preference": len(data.new) + len(data.older) - len(thumbs),
        "candidate": len(data.rollouts),
    }
    for kind, intake in data.intake.items():
        assert used[kind] + sum(intake.left_out.values()) == intake.came_in
        assert all(intake.left_out.values())
    return data


def store(connection, number=3, **changes) -> str:
    """Store an unrated reply of two candidates by a version."""
    pair = tuple(candidate(i, policy_version=number) for i in (0, 1))
    reply = interaction(**{"policy_version": number, "candidates": pair, **changes})
    interactions.append(connection, reply)
    return reply.response_id


def test_an_empty_store_is_no_error(connection):
    data = read(connection)
    assert (data.new, data.older, data.rollouts) == ((), (), ())


def test_all_candidates_become_rollouts_chosen_or_not(connection):
    response_id = store(connection)
    rollouts = read(connection).rollouts
    assert [r.response_id for r in rollouts] == [response_id] * 2
    assert rollouts[1].response == (11, 11, 1)
    assert rollouts[1].logprobs == pytest.approx((-0.5, -0.25, -1.5))
    assert rollouts[0].prompt == (7, 8, 9)
    assert (rollouts[0].policy_version, rollouts[0].temperature) == (3, 1.0)


def test_thumbs_are_new_until_an_ancestor_has_learned_from_them(connection):
    _, old = rated(connection, 1)
    _, new = rated(connection, 0)
    done = finished_round(4, 3, new_feedback=(old,))
    versions.finish_round(connection, done, version(4, 3))
    assert [t.feedback_id for t in read(connection).new] == [old, new]
    deployments.set_state(connection, "default", 4, VersionState.CURRENT, at=1.0)
    data = read(connection)
    assert [t.feedback_id for t in data.older] == [old]
    assert [(t.feedback_id, t.is_up) for t in data.new] == [(new, False)]


def test_a_changed_mind_is_learned_from_but_is_no_evidence(connection):
    reply, learned = rated(connection, 1)
    versions.finish_round(connection, finished_round(4, 3, new_feedback=(learned,)), version(4, 3))
    deployments.set_state(connection, "default", 4, VersionState.CURRENT, at=1.0)
    feedback.submit_thumb(connection, reply, 0, ANN, at=2.0)
    rated(connection, 1)
    assert [(t.is_up, t.is_seen) for t in read(connection).new] == [(False, True), (True, False)]


def test_whatever_was_learned_of_a_reply_nothing_else_said_of_it_is_evidence(connection):
    reply, thumb = rated(connection, 1)
    other = store(connection)
    learned = preferences.submit_preference(connection, other, 1, 0, ANN, at=1.0)
    done = finished_round(4, 3, new_feedback=(thumb,), new_preferences=(learned.preference_id,))
    versions.finish_round(connection, done, version(4, 3))
    deployments.set_state(connection, "default", 4, VersionState.CURRENT, at=1.0)
    preferences.submit_preference(connection, reply, 1, 0, ANN, at=2.0)
    feedback.submit_thumb(connection, other, 0, ANN, at=3.0)
    rated(connection, 1)
    assert [
        (j.response_id == reply, j.response_id == other, j.is_seen) for j in read(connection).new
    ] == [
        (True, False, True),
        (False, True, True),
        (False, False, False),
    ]


def test_a_rollback_gives_feedback_back(connection):
    _, thumb = rated(connection)
    versions.finish_round(connection, finished_round(4, 3, new_feedback=(thumb,)), version(4, 3))
    deployments.set_state(connection, "default", 4, VersionState.CURRENT, at=1.0)
    deployments.set_state(connection, "default", 3, VersionState.CURRENT, at=2.0)
    assert [t.feedback_id for t in read(connection).new] == [thumb]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"learning": Learning.EXCLUDED}, "learning_excluded"),
        ({"status": Status.CANCELLED}, "cancelled"),
    ],
)
def test_what_may_not_be_learned_from_is_counted(connection, changes, reason):
    rated(connection, **changes, policy_version=3)
    data = read(connection)
    assert (data.new, data.left_out["thumb"]) == ((), {reason: 1})
    assert (data.rollouts, data.left_out["candidate"]) == ((), {reason: 2})


def test_thumbs_on_untrainable_replies_still_teach_the_reward_model(connection):
    rated(connection, trainable=False, untrainable_reason="greedy", policy_version=3)
    data = read(connection)
    assert len(data.new) == 1
    assert data.left_out["candidate"] == {"greedy": 2}


def test_stale_rollouts_are_dropped_and_counted(connection):
    for number in (0, 1, 2, 3):
        store(connection, number)
    data = read(connection)
    assert {r.policy_version for r in data.rollouts} == {2, 3}
    assert data.left_out["candidate"] == {"too_old": 4}


def test_only_the_parents_own_line_is_usable():
    known = [version(0, None), version(1, 0), version(2, 1), version(3, 1), version(4, 3)]
    assert usable_versions(known, known[4], 2) == {4, 3, 1}
    assert usable_versions(known, known[1], 4) == {1, 0}
    assert usable_versions(known, known[4], 0) == {4}


def test_rollouts_of_a_version_taken_back_are_counted(connection):
    versions.finish_round(connection, finished_round(4, 2), version(4, 2))
    store(connection, 4)
    assert read(connection).left_out["candidate"] == {"other_lineage": 2}


def test_rollouts_are_used_once(connection):
    response_id = store(connection)
    done = finished_round(4, 3, rollouts=(response_id,))
    versions.finish_round(connection, done, version(4, 3))
    deployments.set_state(connection, "default", 4, VersionState.CURRENT, at=1.0)
    assert read(connection).left_out["candidate"] == {"used": 2}


def test_the_same_draw_again_is_no_new_sample(connection):
    for _ in range(2):
        store(connection, sampling=Sampling(max_tokens=8, seed=5))
    store(connection, sampling=Sampling(max_tokens=8, seed=6))
    data = read(connection)
    assert len(data.rollouts) == 4
    assert data.left_out["candidate"] == {"repeated": 2}


def test_of_the_same_draws_the_newest_counts(connection):
    draw = Sampling(max_tokens=8, seed=5)
    _, newest = [store(connection, sampling=draw) for _ in range(2)]
    assert {r.response_id for r in read(connection).rollouts} == {newest}


def test_a_draw_that_was_used_is_no_new_sample_when_it_comes_again(connection):
    draw = Sampling(max_tokens=8, seed=5)
    used = store(connection, sampling=draw)
    done = finished_round(4, 3, rollouts=(used,))
    versions.finish_round(connection, done, version(4, 3))
    deployments.set_state(connection, "default", 4, VersionState.CURRENT, at=1.0)
    store(connection, sampling=draw)
    assert read(connection).rollouts == ()


def test_malformed_candidates_are_counted(connection):
    broken = (
        candidate(0, policy_version=3, token_ids=(), logprobs=()),
        candidate(1, policy_version=3, logprobs=(-1.0,)),
    )
    store(connection, candidates=broken)
    assert read(connection).left_out["candidate"] == {"empty": 1, "no_logprobs": 1}


def test_how_a_candidate_ended_is_kept(connection):
    ends = (FinishReason.STOP, FinishReason.LENGTH)
    store(
        connection,
        candidates=tuple(
            candidate(i, policy_version=3, finish_reason=end) for i, end in enumerate(ends)
        ),
    )
    assert [(r.is_finished, r.has_eos) for r in read(connection).rollouts] == [
        (True, True),
        (True, False),
    ]


def test_how_likely_a_candidate_was_to_be_shown_is_kept(connection):
    store(
        connection,
        candidates=tuple(
            candidate(i, policy_version=3, propensity=p) for i, p in enumerate((0.9, 0.1))
        ),
    )
    assert [r.propensity for r in read(connection).rollouts] == [0.9, 0.1]


def test_a_group_of_which_a_part_was_left_out_trains_no_policy(connection):
    """What survived pruning or a deadline is the better, or the shorter, part."""
    for reason in ("pruned", "cut"):
        store(connection, trainable=False, untrainable_reason=reason)
    data = read(connection, SETTINGS.model_copy(update={"pruned": "exclude"}))
    assert data.rollouts == ()
    assert data.left_out["candidate"] == {"pruned": 2, "cut": 2}


def test_the_newest_rollouts_are_kept_and_all_add_up(connection):
    ids = [store(connection, sampling=Sampling(max_tokens=8, seed=i)) for i in range(5)]
    data = read(connection, Round(max_rollouts=4, min_rollouts=1))
    assert [r.response_id for r in data.rollouts] == [ids[3], ids[3], ids[4], ids[4]]
    assert data.left_out["candidate"] == {"over_limit": 6}


def test_candidates_that_a_limit_cuts_off_are_counted_and_not_looked_at(connection, monkeypatch):
    for _ in range(3 * interactions.BATCH):
        store(connection, sampling=Sampling(max_tokens=8))
    loaded = []
    list_newest = interactions.newest_since

    def noted(*which):
        for found in list_newest(*which):
            loaded.append(found.response_id)
            yield found

    monkeypatch.setattr(interactions, "newest_since", noted)
    data = read(connection, Round(max_rollouts=5, min_rollouts=1))
    newest_first = loaded[0], loaded[0], loaded[1], loaded[1], loaded[2]
    assert [r.response_id for r in data.rollouts] == list(newest_first[::-1])
    assert data.rollouts[0].response == (11, 11, 1)  # of the oldest reply the last candidate
    assert len(loaded) == 3
    assert data.left_out["candidate"] == {"over_limit": 6 * interactions.BATCH - 5}


def test_what_is_not_eligible_takes_no_place_of_the_newest_rollouts(connection):
    ids = [store(connection, sampling=Sampling(max_tokens=8)) for _ in range(3)]
    store(connection, trainable=False, untrainable_reason="greedy")
    data = read(connection, Round(max_rollouts=4, min_rollouts=1))
    assert [r.response_id for r in data.rollouts] == [ids[1], ids[1], ids[2], ids[2]]
    assert data.left_out["candidate"] == {"greedy": 2, "over_limit": 2}


def test_of_what_was_learned_before_only_the_newest_is_read(connection):
    thumbs = [rated(connection)[1] for _ in range(4)]
    replies = [store(connection) for _ in range(4)]
    pairs = [
        preferences.submit_preference(connection, reply, 1, 0, ANN, at=1.0).preference_id
        for reply in replies
    ]
    done = finished_round(4, 3, new_feedback=tuple(thumbs[:3]), new_preferences=tuple(pairs[:3]))
    versions.finish_round(connection, done, version(4, 3))
    deployments.set_state(connection, "default", 4, VersionState.CURRENT, at=1.0)
    data = read(connection, SETTINGS.model_copy(update={"max_older_feedback": 2}))
    assert [p.preference_id for p in data.older if isinstance(p, Comparison)] == pairs[1:3]
    assert [t.feedback_id for t in data.older if isinstance(t, Thumb)] == thumbs[1:3]
    assert len(data.new) == 2
    assert data.left_out["thumb"] == data.left_out["preference"] == {"over_limit": 1}
    assert data.intake["thumb"].came_in == data.intake["preference"].came_in == 4


def test_pruned_groups_may_be_bootstrapped_or_reduced_to_their_survivors(connection):
    ends = (FinishReason.STOP, FinishReason.ABORTED)
    group = tuple(candidate(i, policy_version=3, finish_reason=e) for i, e in enumerate(ends))
    store(connection, candidates=group, trainable=False, untrainable_reason="pruned")
    store(connection, candidates=group, trainable=False, untrainable_reason="cut")
    whole = read(connection, SETTINGS.model_copy(update={"pruned": "bootstrap"}))
    assert [r.is_finished for r in whole.rollouts] == [True, False]
    assert whole.left_out["candidate"] == {"cut": 2}
    survivors = read(connection)  # the default
    assert [r.is_finished for r in survivors.rollouts] == [True]
    assert survivors.left_out["candidate"] == {"cut": 2, "aborted": 1}


def test_chosen_candidates_alone_may_be_asked_for(connection):
    store(connection)
    data = read(connection, SETTINGS.model_copy(update={"candidates": "chosen"}))
    assert len(data.rollouts) == 1
    assert data.left_out["candidate"] == {"not_chosen": 1}


def test_replies_that_nobody_rated_are_counted_by_why_they_could_not_matter(connection):
    for changes in ({}, {}, {"learning": Learning.EXCLUDED}, {"status": Status.CANCELLED}):
        store(connection, **changes)
    rated(connection, policy_version=3)
    data = read(connection)
    assert data.intake["reply"].came_in == 5
    assert data.left_out["reply"] == {"unrated": 2, "learning_excluded": 1, "cancelled": 1}


def test_of_one_users_new_thumbs_the_newest_are_taken_and_the_rest_stays_new(connection):
    of_ann = [rated(connection, user=ANN)[1] for _ in range(5)]
    _, of_bob = rated(connection, user=BOB)
    settings = SETTINGS.model_copy(update={"max_user_feedback": 2})
    data = read(connection, settings)
    assert [t.feedback_id for t in data.new] == [*of_ann[3:], of_bob]
    assert data.left_out["thumb"] == {"over_user_cap": 3}
    done = finished_round(4, 3, new_feedback=(*of_ann[3:], of_bob))
    versions.finish_round(connection, done, version(4, 3))
    deployments.set_state(connection, "default", 4, VersionState.CURRENT, at=1.0)
    assert [t.feedback_id for t in read(connection, settings).new] == of_ann[1:3]


def crowd(connection, *, of_each: int = 1) -> list[int]:
    """Let nineteen users rate; return the ids of their thumbs."""
    return [
        rated(connection, user=User(user_id=f"user {i}"))[1]
        for i in range(19)
        for _ in range(of_each)
    ]


def test_a_user_gives_at_most_twice_what_the_average_user_does(connection):
    flood = [rated(connection, 0, user=ANN)[1] for _ in range(30)]
    others = crowd(connection)
    data = read(connection)
    assert [t.feedback_id for t in data.new] == [*flood[-2:], *others]
    assert (data.num_new, data.left_out["thumb"]) == (21, {"over_user_factor": 28})
    settings = SETTINGS.model_copy(update={"max_user_factor": 10.0})
    assert len(read(connection, settings).new) == 19 + 19  # 10 * (19 + x) / 20 = x


def test_what_was_learned_of_a_user_counts_too(connection):
    flood = [rated(connection, 0, user=ANN)[1] for _ in range(30)]
    done = finished_round(4, 3, new_feedback=(*flood[-2:], *crowd(connection)))
    versions.finish_round(connection, done, version(4, 3))
    deployments.set_state(connection, "default", 4, VersionState.CURRENT, at=1.0)
    assert read(connection).new == ()
    assert len(read(connection).older) == 21
    others = crowd(connection)  # now the average user has given two
    assert [t.feedback_id for t in read(connection).new] == [*flood[-4:-2], *others]


def test_who_asks_most_is_little_of_a_batch(connection):
    anew = {"sampling": Sampling(max_tokens=9)}  # without a seed
    others = {store(connection, user=User(user_id=f"user {i}"), **anew) for i in range(19)}
    flood = [store(connection, user=ANN, **anew) for _ in range(100)]
    batch = Round(min_rollouts=2, max_rollouts=38, max_staleness=1)
    data = read(connection, batch)
    # 38 / 18 of what then counts, 19 + 38 / 18, is a tenth of the batch; replies are not divided.
    of_ann = [r.response_id for r in data.rollouts if r.response_id not in others]
    assert of_ann == [flood[98]] * 2 + [flood[99]] * 2
    assert len(data.rollouts) == 38
    assert data.left_out["candidate"] == {"over_user_factor": 196, "over_limit": 4}
    unbounded = read(connection, batch.model_copy(update={"max_user_factor": 1e9}))
    assert {r.response_id for r in unbounded.rollouts} <= set(flood)


def test_flips_and_floods_of_one_reply_leave_one_thumb(connection):
    reply, first = rated(connection, 1, user=ANN)
    for i in range(20):
        feedback.submit_thumb(connection, reply, i % 2, ANN, at=2.0 + i)
    (thumb,) = read(connection).new
    assert (thumb.is_up, thumb.feedback_id > first) == (True, True)


def test_the_same_name_of_another_subject_is_another_user(connection):
    crowd(connection)
    for subject in ("", "a backend"):
        for _ in range(3):
            rated(connection, user=User(subject, "ann"))
    # 21 users, 19 of them with one: 2 * (19 + 2 x) / 21 = x, 2.2
    assert len(read(connection).new) == 19 + 2 + 2


def test_thumbs_and_preferences_of_a_user_share_the_cap(connection):
    _, oldest = rated(connection, user=ANN)
    reply = store(connection)
    late = time.time() + 1
    pair = preferences.submit_preference(connection, reply, 1, 0, ANN, at=late)
    newest = feedback.submit_thumb(connection, reply, 1, ANN, at=late + 1)
    data = read(connection, SETTINGS.model_copy(update={"max_user_feedback": 2}))
    assert isinstance(data.new[0], Comparison)
    assert data.new[0].preference_id == pair.preference_id
    assert [t.feedback_id for t in data.new_thumbs] == [newest.feedback_id]
    assert data.left_out["thumb"] == {"over_user_cap": 1}
    assert oldest not in [t.feedback_id for t in data.new_thumbs]


def test_preferences_that_are_turned_off_stay_new(connection):
    preferences.submit_preference(connection, store(connection), 1, 0, ANN, at=1.0)
    data = read(connection, uses_preferences=False)
    assert (data.new, data.num_new, data.left_out["preference"]) == ((), 0, {"turned_off": 1})
    assert len(read(connection).new) == 1


def test_one_users_feedback_is_enough_for_a_first_round(connection):
    settings = Round()
    for _ in range(settings.first_feedback):
        rated(connection, user=ANN)
    assert len(read(connection, settings).new) == settings.first_feedback


def test_recent_is_what_was_said_of_versions_whose_rollouts_still_count(connection):
    for number in (1, 2, 3):
        rated(connection, candidates=(candidate(0, policy_version=number),))
    assert [t.policy_version for t in read(connection).recent] == [2, 3]


def test_feedback_may_grow_too_old(connection):
    rated(connection, policy_version=3)
    settings = SETTINGS.model_copy(update={"max_feedback_age_s": 60.0})
    (row,) = feedback.list_rated(connection, "default")
    assert len(read(connection, settings, now=row.created_at + 59).new) == 1
    late = read(connection, settings, now=row.created_at + 61)
    assert (late.new, late.left_out["thumb"]) == ((), {"too_old": 1})


def test_preferences_come_with_both_candidates_until_learned(connection):
    response_id = store(connection)
    first = preferences.submit_preference(connection, response_id, 1, 0, ANN, at=1.0)
    (pair,) = read(connection).new
    assert (pair.preference_id, pair.prompt) == (first.preference_id, (7, 8, 9))
    assert (pair.better, pair.worse) == ((11, 11, 1), (10, 11, 1))
    done = finished_round(4, 3, new_preferences=(first.preference_id,))
    versions.finish_round(connection, done, version(4, 3))
    deployments.set_state(connection, "default", 4, VersionState.CURRENT, at=1.0)
    data = read(connection)
    assert (data.new, [p.preference_id for p in data.older]) == ((), [first.preference_id])


def test_preferences_that_may_not_be_learned_from_are_counted(connection):
    response_id = store(connection, learning=Learning.EXCLUDED)
    preferences.submit_preference(connection, response_id, 1, 0, ANN, at=1.0)
    assert read(connection).left_out["preference"] == {"learning_excluded": 1}


def test_candidates_without_a_reward_that_only_the_server_has_are_left_out(connection):
    pair = (
        candidate(0, policy_version=3, reward_components={"thumbs": 1.0, "safety": -2.0}),
        candidate(1, policy_version=3),
    )
    store(connection, candidates=pair)
    data = read(connection, logged={"safety"})
    assert [(r.reward, r.components["safety"]) for r in data.rollouts] == [(1.0, -2.0)]
    assert data.left_out["candidate"] == {"no_reward": 1}
    assert [r.reward for r in read(connection).rollouts] == [1.0, 0.5]


def test_a_candidate_that_was_aborted_needs_no_reward_of_the_servers(connection):
    pair = (
        candidate(0, policy_version=3, reward_components={"safety": -2.0}),
        candidate(1, policy_version=3, finish_reason=FinishReason.ABORTED, reward=None),
    )
    store(connection, candidates=pair, trainable=False, untrainable_reason="pruned")
    settings = SETTINGS.model_copy(update={"pruned": "bootstrap"})
    data = read(connection, settings, logged={"safety"})
    assert [r.is_finished for r in data.rollouts] == [True, False]


def test_a_thumb_knows_how_its_reply_was_sampled_where_that_was_plain(connection):
    rated(connection, policy_version=3, user=BOB)
    rated(connection, sampling=Sampling(max_tokens=8, top_p=0.5))
    plain, truncated = read(connection).new
    assert plain.sample.user == "\0bob"
    assert (plain.sample.temperature, plain.sample.logprobs) == (1.0, (-0.5, -0.25, -1.5))
    assert truncated.sample is None


def test_an_imported_thumb_teaches_the_reward_model_alone(connection):
    only = candidate(policy_version=IMPORTED_VERSION, logprobs=(), propensity=None, reward=None)
    rated(
        connection,
        policy_version=IMPORTED_VERSION,
        candidates=(only,),
        trainable=False,
        untrainable_reason="imported",
    )
    store(connection, 1)  # by a version that is too far back
    data = read(connection)
    (thumb,) = data.new
    assert isinstance(thumb, Thumb)
    assert (thumb.sample, thumb.propensity) == (None, None)
    assert (data.recent, data.rollouts) == ((), ())
    assert data.left_out["candidate"] == {"imported": 1, "too_old": 2}


def test_staleness_is_in_generations_of_the_parents_line():
    of = {v: Rollout("r", v, (5,), (6,), (-1.0,), 1.0) for v in (3, 5, 9)}
    assert dataset.staleness([], {9, 5, 3}) == 0
    assert dataset.staleness([of[9]], {9, 5, 3}) == 0
    assert dataset.staleness([of[9], of[5], of[3], of[3]], {9, 5, 3}) == 1.25
