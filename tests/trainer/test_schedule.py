from tests.rows import version
from thumbloop.config.trainer import Round
from thumbloop.types import VersionState
from trainer.schedule import awaited, looks, needed_feedback


def rounds(*pairs: tuple[int, int]) -> list[dict]:
    return [
        {"parent": parent, "metrics": {"feedback_used": used}, "finished_at": 1000.0}
        for parent, used in pairs
    ]


SETTINGS = Round(first_feedback=64, min_feedback=32)
FIRST = version(0, None, reward_digest="")


def test_the_first_round_takes_more_than_those_that_go_on_from_a_reward_model():
    assert needed_feedback([], FIRST, SETTINGS, now=1000.0) == 64
    assert needed_feedback([], version(1), SETTINGS, now=1000.0) == 32


def test_a_blocked_round_waits_for_half_as_many_more():
    assert needed_feedback(rounds((0, 70)), FIRST, SETTINGS, now=1000.0) == 102
    assert needed_feedback(rounds((0, 70), (0, 110)), FIRST, SETTINGS, now=1000.0) == 142
    assert needed_feedback(rounds((1, 33)), version(1), SETTINGS, now=1000.0) == 49


def test_what_was_tried_and_has_grown_too_old_since_is_not_waited_for():
    settings = SETTINGS.model_copy(update={"max_feedback_age_s": 60.0})
    assert needed_feedback(rounds((0, 70)), FIRST, settings, now=1059.0) == 102
    assert needed_feedback(rounds((0, 70)), FIRST, settings, now=1061.0) == 64


def test_rounds_on_other_parents_do_not_count():
    assert needed_feedback(rounds((0, 300), (1, 64)), version(2, 1), SETTINGS, now=1000.0) == 32


def test_a_child_the_server_has_not_decided_about_is_awaited():
    current = version(3, 2, state=VersionState.CURRENT)
    for state in (VersionState.PUBLISHED, VersionState.ATTESTED):
        assert awaited([current, version(4, 3, state=state)], current).version == 4
    for state in (VersionState.REJECTED, VersionState.ROLLED_BACK):
        assert awaited([current, version(4, 3, state=state)], current) is None


def test_while_a_child_is_on_trial_the_trainer_goes_on():
    current = version(3, 2, state=VersionState.CURRENT)
    canary = version(4, 3, state=VersionState.CANARY)
    assert awaited([current, canary], current) is None
    rebuilt = version(6, 1, state=VersionState.PUBLISHED)
    assert awaited([version(1), current, rebuilt], version(1)) == rebuilt
    assert (
        awaited([version(1), current, canary, rebuilt], version(1)) is None
    )  # it waits for the end
    assert awaited([current, canary, version(5, 3)], current) is None  # a newer one supersedes it


def test_the_children_of_other_versions_are_not_awaited():
    current = version(3, 2, state=VersionState.CURRENT)
    assert awaited([current, version(4, 2, state=VersionState.PUBLISHED)], current) is None


def test_looks_are_counted_along_the_line():
    known = [version(0, None), version(1, 0), version(2, 1), version(3, 1)]
    tried = rounds((0, 64), (0, 96), (1, 64), (1, 64), (2, 64))
    assert looks(tried, known, known[0]) == 2
    assert looks(tried, known, known[2]) == 5
    assert looks(tried, known, known[3]) == 4  # version 2 is not in its line
