"""The judge finds what was planted, and nothing where all is well."""

import asyncio
from dataclasses import replace
from pathlib import Path

from loadtest.journal import OK, Entry, Journal, People
from loadtest.judge import (
    Move,
    Stored,
    answered_after_rollback,
    first_replies,
    longest_silence_s,
    lost_moves,
    lost_thumbs,
    mixed_replies,
    not_one_current,
    read,
    thumbs_learned_twice,
    thumbs_stored_twice,
    told_apart,
    trials,
    unstored_replies,
    users_on_both_sides,
    verdict,
)
from tests.rows import candidate, interaction
from tests.serving import running
from thumbloop.config import State
from thumbloop.types import User


def reply(
    version: int, text: str, *, prompt: int | None = 0, kind: str = "generate", at: float = 1.0
) -> Entry:
    what = {"response_id": f"r{at}", "version": version, "text": text}
    return Entry(kind, at - 0.5, at, OK, prompt, what)


def thumb(response_id: str, *, up: bool, status: str = OK) -> Entry:
    return Entry("rate", 1.0, 2.0, status, None, {"response_id": response_id, "up": up})


NOTHING = Stored({}, {}, {}, {}, {0: None}, [0], [])


def test_a_reply_has_to_be_what_its_version_says_alone():
    solo = [reply(1, "a", kind="solo"), reply(2, "b", kind="solo")]
    good = [reply(1, "a", at=2.0), reply(2, "b", at=3.0), reply(1, "c", prompt=None)]
    assert mixed_replies([*good, *solo], {}) == []
    (wrong,) = mixed_replies([*good, reply(2, "a", at=4.0), *solo], {})
    assert wrong == "r4.0 names version 2, which answers prompt 0 otherwise"


def test_without_what_it_says_alone_a_version_has_to_agree_with_itself():
    assert mixed_replies([reply(1, "a"), reply(1, "a"), reply(1, "z", prompt=1)], {}) == []
    assert len(mixed_replies([reply(1, "a"), reply(1, "b")], {})) == 1
    assert len(mixed_replies([reply(1, "a"), reply(3, "b")], {})) == 0
    assert len(mixed_replies([reply(1, "a"), reply(3, "b")], {1: "one", 3: "one"})) == 1


def test_prompts_tell_weights_apart_where_no_two_answer_alike():
    said = {
        (1, 0): "a",
        (2, 0): "b",
        (3, 0): "c",
        (1, 1): "a",
        (2, 1): "b",
        (3, 1): "a",
        (1, 2): "a",
    }
    entries = [reply(v, text, prompt=prompt, kind="solo") for (v, prompt), text in said.items()]
    assert told_apart(entries, {}) == 1
    assert told_apart(entries, {3: "one", 1: "one"}) == 2
    assert told_apart(entries[:6], {}) == 1
    assert told_apart([e for e in entries if e.what["version"] == 1], {}) == 0
    assert told_apart([replace(each, kind="generate") for each in entries], {}) == 0


def test_what_somebody_got_has_to_be_stored():
    row = interaction("r1.0", policy_version=1, candidates=(candidate(text="a"),))
    stored = NOTHING._replace(replies={"r1.0": row})
    assert unstored_replies([reply(1, "a")], stored) == []
    assert unstored_replies([reply(1, "a")], NOTHING) == ["r1.0 is not stored"]
    assert unstored_replies([reply(1, "b")], stored) == ["r1.0 is stored as another reply"]
    assert unstored_replies([reply(2, "a")], stored) == ["r1.0 is stored as another reply"]
    nul = replace(row, candidates=(candidate(text="a\ufffd"),))
    assert unstored_replies([reply(1, "a\0")], NOTHING._replace(replies={"r1.0": nul})) == []
    mixed = replace(row, candidates=(candidate(text="a"), candidate(1, policy_version=2)))
    assert unstored_replies([reply(1, "a")], NOTHING._replace(replies={"r1.0": mixed})) == [
        "r1.0 has candidates of other versions"
    ]


def test_an_acknowledged_thumb_has_to_be_there():
    stored = NOTHING._replace(thumbs={"r1": (7, 1)})
    assert lost_thumbs([thumb("r1", up=True)], stored) == []
    assert lost_thumbs([thumb("r1", up=False)], stored) == ["r1"]
    assert lost_thumbs([thumb("r2", up=True)], stored) == ["r2"]
    assert lost_thumbs([thumb("r2", up=True, status="UNAVAILABLE")], stored) == []


def test_a_thumb_is_stored_once_however_often_it_is_sent():
    assert thumbs_stored_twice(NOTHING._replace(events={"r1": 1, "r2": 1})) == []
    assert thumbs_stored_twice(NOTHING._replace(events={"r1": 1, "r2": 2})) == ["r2"]


def test_a_thumb_is_learned_once_along_a_line():
    line = NOTHING._replace(parents={0: None, 1: 0, 2: 1, 3: 1})
    assert thumbs_learned_twice(line._replace(learned={1: {7}, 2: {8}, 3: {8}})) == []
    assert thumbs_learned_twice(line._replace(learned={1: {7}, 2: {7, 8}})) == [7]


def test_who_asks_after_a_rollback_is_answered_by_another_version():
    back = Entry("rollback", 4.0, 5.0, OK, None, {"version": 2})
    before, after = reply(2, "a", at=5.4), reply(2, "a", at=5.6)  # asked half a second earlier
    assert answered_after_rollback([back, before, reply(1, "a", at=7.0)]) == []
    assert answered_after_rollback([back, before, after]) == ["r5.6"]
    refused = replace(back, status="ABORTED")
    assert answered_after_rollback([refused, after]) == []


def test_exactly_one_version_is_current():
    assert not_one_current(NOTHING) == []
    assert not_one_current(NOTHING._replace(currents=[])) == ["versions [] are current"]
    assert not_one_current(NOTHING._replace(currents=[1, 2])) == ["versions [1, 2] are current"]


TRIED = [Move(10.0, "canary", 1), Move(20.0, "current", 1), Move(30.0, "canary", 2)]


def test_at_most_one_version_is_on_trial():
    assert not_one_current(NOTHING._replace(moves=TRIED)) == []
    second = [*TRIED, Move(40.0, "canary", 3), Move(50.0, "rolled_back", 2)]
    assert not_one_current(NOTHING._replace(moves=second)) == ["version 3 went on trial beside 2"]
    assert trials(NOTHING._replace(moves=TRIED)) == [(1, 10.0, 20.0), (2, 30.0, float("inf"))]
    moved = [*TRIED, Move(35.0, "current", 0), Move(36.0, "rolled_back", 2)]
    assert trials(NOTHING._replace(moves=moved))[1] == (2, 30.0, 35.0)


def test_a_user_stays_on_one_side_for_a_whole_trial():
    def had(*replies: tuple[str, int, float]) -> list[str]:
        """Who had which version in a reply that came then, and was asked for half a second before."""
        entries = [reply(v, "a", at=at) for _, v, at in replies]
        rows = {
            f"r{at}": interaction(policy_version=v, user=User(user_id=who))
            for who, v, at in replies
        }
        return users_on_both_sides(entries, NOTHING._replace(replies=rows, moves=TRIED))

    assert had(("a", 1, 12.0), ("a", 1, 18.0), ("b", 0, 13.0)) == []
    assert had(("a", 1, 12.0), ("a", 0, 18.0)) == ["a had versions [0, 1] while 1 was on trial"]
    assert had(("a", 1, 12.0), ("a", 0, 8.0), ("a", 0, 19.5)) == []
    assert had(("a", 1, 12.0), ("a", 0, 11.2)) == []  # asked for when the trial had just begun
    assert had(("a", 0, 12.0), ("a", 3, 18.0)) == []
    assert had(("a", 2, 32.0), ("a", 1, 99.0)) != []


def test_an_acknowledged_move_is_in_the_store():
    def lost(*moves: tuple[str, int, str]) -> list[str]:
        entries = [Entry(kind, 1.0, 2.0, status, None, {"version": v}) for kind, v, status in moves]
        back = [*TRIED, Move(40.0, "rolled_back", 1)]
        return lost_moves(entries, NOTHING._replace(moves=back))

    assert lost(("promote", 1, OK), ("rollback", 1, OK), ("promote", 2, "ABORTED")) == []
    assert lost(("promote", 2, OK)) == ["promote of version 2"]
    assert lost(("rollback", 2, OK)) == ["rollback of version 2"]


def test_times_are_those_of_replies():
    published = Entry("publish", 1.0, 1.0, OK, None, {"version": 1})
    entries = [published, reply(0, "a", at=1.5), reply(1, "a", at=3.0), reply(1, "a", at=2.0)]
    assert first_replies(entries) == {1: 1.0}
    assert longest_silence_s(entries) == 1.0


async def test_people_write_down_what_a_server_does(tiny_model: Path, tmp_path: Path):
    state = State(folder=tmp_path / "state")
    journal = Journal(tmp_path / "journal.jsonl")
    async with running(tiny_model, state) as server:
        people = People(
            server.client,
            journal,
            ["a b", "c d"],
            max_tokens=8,
            greedy_share=0.5,
            rates=True,
            seed=0,
        )
        leaving = asyncio.Event()
        users = [asyncio.create_task(people.use(n, leaving)) for n in range(3)]
        while len(journal.of("rate")) < 30:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        await people.ask(0, "solo", is_greedy=True, pin=0)
        await people.ask(0, "solo", is_greedy=True, pin=9)
        leaving.set()
        await asyncio.gather(*users)
    journal.close()
    assert len((tmp_path / "journal.jsonl").read_text().splitlines()) == len(journal.entries)
    assert [e.status for e in journal.of("solo")] == [OK, "NOT_FOUND"]
    assert {e.prompt for e in journal.of("generate")} == {0, 1, None}
    found = verdict(journal.entries, read(state), {})
    assert found["calls"].keys() == {"generate OK", "rate OK"}
    assert [found[n] for n in ("mixed_replies", "unstored_replies", "lost_thumbs")] == [0, 0, 0]
    assert found["wrong"] == {}
    swapped = [
        replace(e, what=e.what | {"text": "?"}) if e is journal.of("generate")[0] else e
        for e in journal.entries
    ]
    assert verdict(swapped, read(state), {})["unstored_replies"] == 1
