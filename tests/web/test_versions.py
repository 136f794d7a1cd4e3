"""What is known of versions, as rows."""

from google.protobuf.timestamp_pb2 import Timestamp

from thumbloop.v1 import admin_pb2
from web.figures import Liking
from web.tables import Share
from web.versions import DECISIONS, course_rows, decision_rows, liking_rows

AT = 1_790_000_000
TIME = "2026-09-21 14:13:20"


def version(number: int, **fields: object) -> admin_pb2.PolicyVersion:
    return admin_pb2.PolicyVersion(
        policy_version=number, published_at=Timestamp(seconds=AT), **fields
    )


def event(at: int, state: str, **fields: object) -> admin_pb2.PolicyVersionEvent:
    value = admin_pb2.PolicyVersionState.Value(f"POLICY_VERSION_STATE_{state}")
    return admin_pb2.PolicyVersionEvent(at=Timestamp(seconds=at), state=value, **fields)


def test_what_nobody_said_of_a_version_is_said():
    likings = [Liking(0, Share(0.25, 8), None), Liking(1, None, Share(0.6, 3))]
    assert liking_rows(likings) == [
        ("0", Share(0.25, 8), "no rewards"),
        ("1", "not rated yet", Share(0.6, 3)),
    ]


def test_the_course_of_thumbs_is_that_of_the_versions_that_were_learned_oldest_first():
    learned = {"thumb_up_rate": 0.25, "feedback_used": 80.0, "preferences_used": 0.0}
    later = {"thumb_up_rate": 0.75, "feedback_used": 40.0, "preferences_used": 8.0}
    picked = {"thumb_up_rate": 0.5, "feedback_used": 9.0, "preferences_used": 9.0}
    listed = [
        version(3, metrics=picked),
        version(2, metrics=later),
        version(1, metrics=learned | {"child_predicted_rate": 0.5}),
        version(0),
    ]
    assert course_rows(listed) == [
        (TIME, "1", Share(0.25, 80), "50%"),
        (TIME, "2", Share(0.75, 32), "no rewards"),
        (TIME, "3", "preferences only", "no rewards"),
    ]


def test_decisions_come_newest_first_with_their_evidence():
    thumbs = admin_pb2.TrialMeasure(
        name="thumbs", canary_users=40, current_users=1, canary_mean=0.625, current_mean=0.5
    )
    unmeasured = admin_pb2.TrialMeasure(name="errors")
    found = [
        admin_pb2.GetPolicyVersionResponse(
            policy_version=version(2),
            events=[
                event(AT, "CANARY", actor="server"),
                event(AT + 9, "CURRENT", actor="server", evidence=[thumbs, unmeasured]),
            ],
        ),
        admin_pb2.GetPolicyVersionResponse(
            policy_version=version(1),
            events=[event(AT + 5, "UNSPECIFIED", actor="user", reason="tainted by an erasure")],
        ),
    ]
    rows = decision_rows(found, most=10)
    assert rows == [
        (
            "2026-09-21 14:13:29",
            "2",
            "current",
            "server",
            "",
            "thumbs: 62% of 40 users against 50% of 1 user",
        ),
        ("2026-09-21 14:13:25", "1", "", "user", "tainted by an erasure", ""),
        (TIME, "2", "canary", "server", "", ""),
    ]
    assert {len(row) for row in rows} == {len(DECISIONS)}
    assert decision_rows(found, most=1) == rows[:1]


def test_a_trial_that_runs_comes_first():
    thumbs = admin_pb2.TrialMeasure(name="thumbs", canary_users=3, canary_mean=1.0)
    running = admin_pb2.GetPolicyVersionResponse(
        policy_version=version(2), events=[event(AT, "CANARY", actor="server")], trial=[thumbs]
    )
    first = decision_rows([running], most=5)[0]
    assert first == ("now", "2", "on trial", "", "", "thumbs: 100% of 3 users against 0 users")
