"""AdminService over the wire: versions, pages, states."""

from pathlib import Path

import grpc
import pytest

from server import collecting
from tests.publishing import Publisher
from tests.refusals import fields, refused
from tests.rows import finished_round, version
from tests.serving import Running, running, until
from thumbloop.config import State
from thumbloop.store import deployments, versions
from thumbloop.types import DEFAULT_POLICY, VersionState
from thumbloop.v1 import admin_pb2

List = admin_pb2.ListPolicyVersionsRequest
Get = admin_pb2.GetPolicyVersionRequest
Promote = admin_pb2.PromotePolicyVersionRequest
Rollback = admin_pb2.RollbackPolicyVersionRequest


def reject(server: Running, *numbers: int) -> None:
    """Publish versions that were rejected."""
    assert server.database is not None
    with server.database.begin() as connection:
        for number in numbers:
            row = version(number, feedback_count=3, first_feedback_id=4, last_feedback_id=9)
            versions.finish_round(connection, finished_round(number), row)
            state = VersionState.REJECTED
            deployments.set_state(connection, DEFAULT_POLICY, number, state, at=5.5, reason="bad")


async def test_a_blank_server_has_the_base_model(server: Running):
    answer = await server.client.versions()
    (base,) = answer.policy_versions
    assert (base.policy, base.policy_version) == ("default", 0)
    assert not base.HasField("parent_version")
    assert base.state == admin_pb2.POLICY_VERSION_STATE_CURRENT
    assert base.is_available
    assert answer.current_version == 0


async def test_a_version_shows_all_that_is_known_of_it(server: Running):
    reject(server, 1)
    shown = (await server.admin.GetPolicyVersion(Get(policy_version=1))).policy_version
    assert (shown.policy_version, shown.parent_version) == (1, 0)
    assert (shown.state, shown.reason) == (admin_pb2.POLICY_VERSION_STATE_REJECTED, "bad")
    assert shown.published_at.ToSeconds() == 1_700_000_001
    assert shown.state_since.ToMilliseconds() == 5_500
    assert (shown.policy_digest, shown.reward_digest) == ("p" * 64, "r" * 64)
    assert (shown.feedback_count, shown.first_feedback_id, shown.last_feedback_id) == (3, 4, 9)
    assert not shown.is_available


async def test_without_a_number_the_current_version_is_shown(server: Running):
    reject(server, 1)
    assert (await server.admin.GetPolicyVersion(Get())).policy_version.policy_version == 0
    zero = await server.admin.GetPolicyVersion(Get(policy_version=0))
    assert zero.policy_version.policy_version == 0


@pytest.mark.parametrize("size", [1, 2, 3, 6, 7, 1000])
async def test_pages_together_are_the_whole_list_newest_first(server: Running, size: int):
    reject(server, *range(1, 7))
    found, token, pages = [], "", 0
    while True:
        page = await server.admin.ListPolicyVersions(List(page_size=size, page_token=token))
        assert 1 <= len(page.policy_versions) <= size
        assert page.current_version == 0
        found += [v.policy_version for v in page.policy_versions]
        token, pages = page.next_page_token, pages + 1
        if not token:
            break
    assert found == [6, 5, 4, 3, 2, 1, 0]
    assert pages == -(-7 // size)


async def test_a_version_published_between_two_pages_shifts_nothing(server: Running):
    reject(server, 1, 2, 3)
    first = await server.admin.ListPolicyVersions(List(page_size=2))
    reject(server, 4)
    rest = await server.admin.ListPolicyVersions(List(page_token=first.next_page_token))
    assert [v.policy_version for v in rest.policy_versions] == [1, 0]


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        (List(page_size=0), ["page_size"]),
        (List(page_size=1001), ["page_size"]),
        (List(page_token="x"), ["page_token"]),
        (List(page_token="-1"), ["page_token"]),
    ],
)
async def test_a_page_that_cannot_be_is_refused(server: Running, request_: List, expected):
    assert fields(await refused(server.admin.ListPolicyVersions(request_))) == expected


async def test_what_does_not_exist_is_not_found(server: Running):
    for call in (
        server.admin.GetPolicyVersion(Get(policy_version=5)),
        server.admin.GetPolicyVersion(Get(policy="another")),
        server.admin.ListPolicyVersions(List(policy="another")),
    ):
        assert (await refused(call)).code() is grpc.StatusCode.NOT_FOUND


async def test_a_rollback_and_a_promotion_reach_the_next_request(
    server: Running, publisher: Publisher
):
    publisher.publish(1)
    await server.serves(1)
    shown = await server.client.roll_back(expected_current=1, reason="it swears")
    assert (shown.policy_version, shown.state) == (0, admin_pb2.POLICY_VERSION_STATE_CURRENT)
    assert shown.is_available
    assert (await server.generate("hello")).policy_version == 0
    bad = (await server.admin.GetPolicyVersion(Get(policy_version=1))).policy_version
    assert bad.state == admin_pb2.POLICY_VERSION_STATE_ROLLED_BACK
    assert bad.reason == "it swears"
    shown = await server.client.promote(1, expected_current=0)
    assert (shown.policy_version, shown.reason) == (1, "promoted")
    assert (await server.generate("hello")).policy_version == 1


async def test_a_version_whose_folder_was_deleted_says_so_and_is_not_promoted(
    tiny_model: Path, state: State, publisher: Publisher, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(collecting, "_INTERVAL_S", 0.02)
    settings = {"poll_interval_s": 0.02, "keep_versions": 1}
    async with running(tiny_model, state, delivery=settings, engine={"max_versions": 3}) as server:
        for number in (1, 2, 3, 4):
            publisher.publish(number, number - 1)
            await server.serves(number)
        folder = state.versions / DEFAULT_POLICY
        left = {"000000", "000003", "000004"}
        await until(lambda: {p.name for p in folder.iterdir()} == left)
        answer = await server.admin.GetPolicyVersion(Get(policy_version=1))
        shown, event = answer.policy_version, answer.events[-1]
        assert shown.state == admin_pb2.POLICY_VERSION_STATE_RETIRED
        assert shown.collected_at == event.at
        assert event.state == admin_pb2.POLICY_VERSION_STATE_UNSPECIFIED
        assert event.reason == "its folder is deleted: delivery.keep_versions is 1"
        there = (await server.admin.GetPolicyVersion(Get(policy_version=3))).policy_version
        assert not there.HasField("collected_at")
        promoting = Promote(policy_version=2, expected_current_version=4)
        error = await refused(server.admin.PromotePolicyVersion(promoting))
        assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert "its folder was deleted" in error.details()
        value = server.application._metrics.registry.get_sample_value
        assert value("thumbloop_collected_versions_total") == 2
        assert value("thumbloop_collected_bytes_total") > 50_000


async def test_a_move_from_another_version_than_the_caller_saw_is_aborted(server: Running):
    for call in (
        server.admin.PromotePolicyVersion(Promote(policy_version=0, expected_current_version=3)),
        server.admin.RollbackPolicyVersion(Rollback(expected_current_version=3)),
    ):
        error = await refused(call)
        assert error.code() is grpc.StatusCode.ABORTED
        assert error.details() == "version 3 is not current, version 0 is"


async def test_a_move_to_where_nobody_may_go_is_refused(server: Running):
    reject(server, 1)
    code = grpc.StatusCode
    for call, expected in (
        (Promote(policy_version=9, expected_current_version=0), code.NOT_FOUND),
        (Promote(policy_version=-1, expected_current_version=0), code.NOT_FOUND),
        (Promote(policy_version=1, expected_current_version=0), code.FAILED_PRECONDITION),
        (Promote(policy_version=0, expected_current_version=0), code.INVALID_ARGUMENT),
        (Promote(policy="another"), code.NOT_FOUND),
    ):
        assert (await refused(server.admin.PromotePolicyVersion(call))).code() is expected, call
    nowhere = server.admin.RollbackPolicyVersion(Rollback(expected_current_version=0))
    assert (await refused(nowhere)).code() is code.FAILED_PRECONDITION


async def test_what_a_move_lacks_is_named_all_at_once(server: Running):
    error = await refused(server.admin.PromotePolicyVersion(Promote(reason="x" * 1025)))
    assert sorted(fields(error)) == ["expected_current_version", "policy_version", "reason"]
    error = await refused(server.admin.RollbackPolicyVersion(Rollback()))
    assert fields(error) == ["expected_current_version"]
    fits = Promote(policy_version=9, expected_current_version=0, reason="x" * 1024)
    error = await refused(server.admin.PromotePolicyVersion(fits))
    assert error.code() is grpc.StatusCode.NOT_FOUND


async def test_a_server_that_starts_moves_nothing(server: Running):
    server.application._admin.serve(None)  # type: ignore[arg-type]
    error = await refused(server.admin.RollbackPolicyVersion(Rollback(expected_current_version=0)))
    assert error.code() is grpc.StatusCode.UNAVAILABLE


def test_every_state_of_a_version_is_on_the_wire():
    names = {name.removeprefix("POLICY_VERSION_STATE_") for name in _state_names()}
    assert names == {state.name for state in VersionState} | {"UNSPECIFIED"}


def _state_names() -> list[str]:
    return list(admin_pb2.PolicyVersionState.keys())


def test_the_protocol_file_is_where_the_stubs_say(request: pytest.FixtureRequest):
    root = Path(str(request.config.rootpath))
    assert (root / "protos" / admin_pb2.DESCRIPTOR.name).is_file()
