import pytest
from prometheus_client import CollectorRegistry

from server.by_version import ByVersion

RATIOS = ("thumbloop_version_promise_ratio", "thumbloop_version_thumb_up_ratio")


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


def versions(registry: CollectorRegistry, name: str) -> set[str]:
    (family,) = (f for f in registry.collect() if f.name == name)
    return {sample.labels["version"] for sample in family.samples}


def test_a_reward_promises_its_sigmoid(registry: CollectorRegistry):
    by_version = ByVersion(registry)
    for reward in (0.0, 800.0, -800.0):
        by_version.observe_reward(3, reward)
    value = registry.get_sample_value
    assert value("thumbloop_version_promise_ratio_sum", {"version": "3"}) == pytest.approx(1.5)
    assert value("thumbloop_version_promise_ratio_count", {"version": "3"}) == 3


def test_thumbs_are_counted_by_the_version_that_replied(registry: CollectorRegistry):
    by_version = ByVersion(registry)
    for version, is_up in ((1, True), (1, False), (2, True)):
        by_version.observe_thumb(version, is_up=is_up)
    value = registry.get_sample_value
    assert value("thumbloop_version_thumb_up_ratio_sum", {"version": "1"}) == 1
    assert value("thumbloop_version_thumb_up_ratio_count", {"version": "1"}) == 2
    assert value("thumbloop_version_thumb_up_ratio_sum", {"version": "2"}) == 1


def test_only_the_versions_heard_of_last_have_series(registry: CollectorRegistry):
    by_version = ByVersion(registry, most=3)
    for version in range(1, 100):
        by_version.observe_reward(version, 1.0)
        by_version.observe_thumb(1, is_up=True)  # is current, after a rollback
    for name in RATIOS:
        assert versions(registry, name) == {"1", "98", "99"}
