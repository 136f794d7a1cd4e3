import pytest
from sqlalchemy import Engine

from tests.rows import ANN, candidate, interaction, rated
from tests.stores import empty_state
from thumbloop.errors import BadDataFile
from thumbloop.exchange.shapes import Prompts, Record, Shape, records
from thumbloop.store import feedback, interactions, open_store, preferences
from thumbloop.types import DEFAULT_POLICY, Message, Prompt, Role, User

CHAT = Prompt(messages=(Message(Role.SYSTEM, "Be brief."), Message(Role.USER, "How was it?")))
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "How was it?"},
]


def assistant(text: str) -> list[Record]:
    return [{"role": "assistant", "content": text}]


@pytest.fixture
def store(tmp_path):
    engine = open_store(empty_state(tmp_path))
    yield engine
    engine.dispose()


def of(store: Engine, shape: Shape, **how: object) -> list[Record]:
    return list(records(store, DEFAULT_POLICY, shape, **how))  # type: ignore[arg-type]


def test_a_thumb_on_a_text_is_trls_unpaired_preference(store: Engine):
    with store.begin() as connection:
        rated(connection, 1)
        rated(connection, 0)
    shared = {"prompt": "How was the film?", "completion": "reply 0"}
    assert of(store, Shape.KTO) == [shared | {"label": True}, shared | {"label": False}]


def test_a_thumb_in_a_conversation_is_conversational(store: Engine):
    with store.begin() as connection:
        rated(connection, 1, prompt=CHAT)
    assert of(store, Shape.KTO) == [
        {"prompt": TURNS, "completion": assistant("reply 0"), "label": True}
    ]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        (
            Prompt(text="How?"),
            {"prompt": "How?", "chosen": "reply 1", "rejected": "reply 0"},
        ),
        (
            CHAT,
            {"prompt": TURNS, "chosen": assistant("reply 1"), "rejected": assistant("reply 0")},
        ),
    ],
)
def test_a_preference_is_trls_preference(store: Engine, prompt: Prompt, expected: Record):
    with store.begin() as connection:
        reply = interaction(prompt=prompt)
        interactions.append(connection, reply)
        preferences.submit_preference(connection, reply.response_id, 1, 0, ANN, at=1.0)
    assert of(store, Shape.DPO) == [expected]


def test_one_kind_of_prompts_is_chosen_where_there_are_two(store: Engine):
    with store.begin() as connection:
        rated(connection, 1)
        rated(connection, 0, prompt=CHAT)
    with pytest.raises(BadDataFile, match="--prompts text or --prompts chat"):
        of(store, Shape.KTO)
    assert [r["label"] for r in of(store, Shape.KTO, prompts=Prompts.TEXT)] == [True]
    assert [r["label"] for r in of(store, Shape.KTO, prompts=Prompts.CHAT)] == [False]
    assert len(of(store, Shape.ROLLOUTS)) == 2
    assert len(of(store, Shape.ROLLOUTS, prompts=Prompts.CHAT)) == 1


def test_names_of_people_leave_on_demand_only(store: Engine):
    user = User("a backend", "somebody")
    with store.begin() as connection:
        reply = interaction(user=user, session_id="their session", policy_version=7)
        interactions.append(connection, reply)
        feedback.submit_thumb(connection, reply.response_id, 1, user, at=1_700_000_000.5)
        preferences.submit_preference(connection, reply.response_id, 1, 0, user, at=1.0)
    for shape in Shape:
        (plain,) = of(store, shape)
        assert all(name not in repr(plain) for name in ("backend", "somebody", "session"))
    (record,) = of(store, Shape.KTO, has_origin=True)
    assert {name: record[name] for name in ("response_id", "policy_version")} == {
        "response_id": reply.response_id,
        "policy_version": 7,
    }
    assert (record["subject"], record["user_id"]) == ("a backend", "somebody")
    assert record["created_at"] == "2023-11-14T22:13:20.500000+00:00"
    (rollout,) = of(store, Shape.ROLLOUTS, has_origin=True)
    assert (rollout["user_id"], rollout["session_id"]) == ("somebody", "their session")


def test_a_rollout_has_all_that_was_sampled_with_what_was_said_of_it(store: Engine):
    last = candidate(1, reward=float("-inf"), reward_components={"thumbs": -4.0, "short": 0.5})
    with store.begin() as connection:
        reply, _ = rated(connection, 1, candidates=(candidate(0), last), trainable=False)
        preferences.submit_preference(connection, reply, 1, 0, ANN, at=1.0)
    (record,) = of(store, Shape.ROLLOUTS)
    first, second = record.pop("candidates")
    assert record == {
        "response_id": reply,
        "policy_version": 1,
        "created_at": "2023-11-14T22:13:20.250000+00:00",
        "text": "How was the film?",
        "messages": None,
        "prompt_token_ids": [7, 8, 9],
        "sampling": {
            "max_tokens": 8,
            "temperature": 1.0,
            "top_p": 1.0,
            "top_k": 0,
            "seed": 2**64 - 1,
            "stop": [],
        },
        "strategy": "soft_best_of_n",
        "arm": "strategy",
        "reranked": True,
        "trainable": False,
        "untrainable_reason": None,
        "thumb": True,
        "preferences": [{"better": 1, "worse": 0}],
    }
    assert first == {
        "index": 0,
        "policy_version": 1,
        "chosen": True,
        "text": "reply 0",
        "finish_reason": "stop",
        "token_ids": [10, 11, 1],
        "logprobs": [-0.5, -0.25, -1.5],
        "reward": 0.0,
        "reward_components": [],
        "stage_rewards": [],
        "propensity": 0.5,
    }
    assert second["reward"] is None  # minus infinity is no JSON
    assert second["reward_components"] == [
        {"name": "thumbs", "value": -4.0},
        {"name": "short", "value": 0.5},
    ]
