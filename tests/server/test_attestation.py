"""A version may answer only when the engine's numbers are the child's, and not its parent's."""

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from server.attestation import Attestation, attest
from server.engine.protocol import PROBE_PRIORITY
from server.routes import LoadedVersion
from tests.fakes import BASE, FakeEngine, weights_in
from tests.publishing import Publisher
from thumbloop import artifacts
from thumbloop.artifacts import Manifest, Probe
from thumbloop.config import State
from thumbloop.errors import BadPolicyVersion, EngineUnavailable
from thumbloop.rendering import VerdictTokens
from thumbloop.types import PolicyVersion, VersionState


class Bench:
    """Loads versions into a fake engine and attests them."""

    def __init__(
        self, engine: FakeEngine, publisher: Publisher, state: State, verdict: VerdictTokens
    ) -> None:
        self.engine = engine
        self.publisher = publisher
        self.versions = state.versions
        self._verdict = verdict

    async def attest(self, row: PolicyVersion) -> Attestation:
        folder = self.versions / row.folder
        manifest = artifacts.read_manifest(folder, row.manifest_digest)
        loaded = LoadedVersion(
            row,
            await self.engine.load(f"v{row.version}-policy", folder / "policy"),
            await self.engine.load(f"v{row.version}-reward", folder / "reward"),
        )
        return await attest(self.engine, self._verdict, loaded, manifest)

    def weights(self, row: PolicyVersion, role: str) -> str:
        return weights_in(self.versions / row.folder / role)


@pytest.fixture
def bench(engine: FakeEngine, publisher: Publisher, state: State, verdict: VerdictTokens) -> Bench:
    return Bench(engine, publisher, state, verdict)


async def test_a_faithful_engine_passes(bench: Bench):
    result = await bench.attest(bench.publisher.write(1))
    assert result == Attestation(prefilled=0.0, decoded=0.0, rewards=0.0)
    bench.publisher.write(2, 1)
    await bench.attest(bench.publisher.write(3, 2))


async def test_probes_go_before_anybodys_request(bench: Bench):
    priorities = set()
    for name in ("sample", "logprobs", "next_logprobs"):
        call = getattr(bench.engine, name)

        async def spy(*arguments: Any, call: Any = call, priority: int = 0) -> Any:
            priorities.add(priority)
            return await call(*arguments, priority=priority)

        setattr(bench.engine, name, spy)
    await bench.attest(bench.publisher.write(1))
    assert priorities == {PROBE_PRIORITY}


@pytest.mark.parametrize("role", ["policy", "reward"])
async def test_an_adapter_that_does_nothing_in_the_engine_is_refused(bench: Bench, role: str):
    row = bench.publisher.write(1)
    bench.engine.speaks_for[f"v1-{role}"] = BASE
    with pytest.raises(BadPolicyVersion) as raised:
        await bench.attest(row)
    assert raised.value.reason == "attestation"


@pytest.mark.parametrize("role", ["policy", "reward"])
async def test_an_engine_that_still_serves_the_parent_is_refused(bench: Bench, role: str):
    parent = bench.publisher.write(1)
    row = bench.publisher.write(2, 1)
    bench.engine.speaks_for[f"v2-{role}"] = bench.weights(parent, role)
    with pytest.raises(BadPolicyVersion, match="attestation"):
        await bench.attest(row)


async def test_an_engine_that_prefills_by_the_parent_is_refused_however_small_the_update(
    bench: Bench,
):
    """As behind a stale prefix cache: what it decodes is right, what it prefills is the parent's."""

    def moved_a_little(manifest: Manifest) -> Manifest:  # less than the tolerance, less and less
        probes = []
        for p in manifest.probes:
            parent = tuple(v - 8e-4 / (i + 1) for i, v in enumerate(p.logprobs))
            probes.append(p.model_copy(update={"parent_logprobs": parent}))
        return manifest.model_copy(update={"probes": tuple(probes)})

    await bench.attest(bench.publisher.write(1, alter=moved_a_little))
    row = bench.publisher.write(2, alter=moved_a_little)
    manifest = artifacts.read_manifest(bench.versions / row.folder)
    parents = {p.prompt: p.parent_logprobs for p in manifest.probes}

    async def stale(prompt: tuple[int, ...], *_others: Any, **_options: Any) -> tuple[float, ...]:
        return parents[prompt]

    bench.engine.logprobs = stale  # type: ignore[method-assign]
    with pytest.raises(BadPolicyVersion, match=r"prefilled: .* may be serving the parent"):
        await bench.attest(row)


async def test_a_first_reward_that_is_not_applied_is_refused_where_rounding_would_hide_it(
    bench: Bench,
):
    """In half precision so small a step is within the tolerance: what tells is the base model's own number."""

    def moved_a_little(manifest: Manifest) -> Manifest:
        probes = [p.model_copy(update={"reward": p.parent_reward + 0.3}) for p in manifest.probes]
        return manifest.model_copy(update={"probes": tuple(probes)})

    bench.engine.dtype = "bfloat16"
    bench.engine.speaks_for["v1-reward"] = BASE
    with pytest.raises(BadPolicyVersion, match=r"rewards: .* may be serving the parent"):
        await bench.attest(bench.publisher.write(1, alter=moved_a_little))


@pytest.mark.parametrize("adapter", ["policy_adapter", "reward_adapter"])
async def test_who_says_that_nothing_changed_has_to_have_probes_that_say_so(
    bench: Bench, adapter: str
):
    def unchanged(manifest: Manifest) -> Manifest:
        facts = getattr(manifest, adapter).model_copy(update={"distance": None})
        return manifest.model_copy(update={adapter: facts})

    with pytest.raises(BadPolicyVersion, match="said to be unchanged") as raised:
        await bench.attest(bench.publisher.write(1, alter=unchanged))
    assert raised.value.reason == "bad_probes"


async def test_a_new_version_has_to_say_what_its_parent_would_for_every_probe(bench: Bench):
    """Else an engine that applies no reward adapter might pass where rounding is allowed for; what served once may."""

    def left_out(manifest: Manifest) -> Manifest:
        first, *rest = manifest.probes
        probes = (first.model_copy(update={"parent_reward": None}), *rest)
        return manifest.model_copy(update={"probes": probes})

    row = bench.publisher.write(1, alter=left_out)
    with pytest.raises(BadPolicyVersion, match="the parent's numbers are not there") as raised:
        await bench.attest(row)
    assert raised.value.reason == "bad_probes"
    served = bench.publisher.write(2, alter=left_out)
    await bench.attest(replace(served, state=VersionState.RETIRED))


async def test_other_tokens_than_the_trainers_are_refused(bench: Bench):
    def other_token(manifest: Manifest) -> Manifest:
        first, *rest = manifest.probes
        changed = (first.continuation[0] + 1, *first.continuation[1:])
        probe = first.model_copy(update={"continuation": changed})
        return manifest.model_copy(update={"probes": (probe, *rest)})

    with pytest.raises(BadPolicyVersion, match="decodes other tokens"):
        await bench.attest(bench.publisher.write(1, alter=other_token))


def shifted(field: str, by: float) -> Callable[[Manifest], Manifest]:
    """Return what moves a number of every probe, and of the parent beside it, by so much."""

    def move(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(v + by for v in value)
        return value + by

    def alter(manifest: Manifest) -> Manifest:
        probes = [p.model_copy(update={field: move(getattr(p, field))}) for p in manifest.probes]
        return manifest.model_copy(update={"probes": tuple(probes)})

    return alter


@pytest.mark.parametrize(
    ("field", "within", "beyond"), [("logprobs", 5e-4, 2e-3), ("reward", 5e-3, 2e-2)]
)
async def test_rounding_is_tolerated_and_nothing_more(
    bench: Bench, field: str, within: float, beyond: float
):
    result = await bench.attest(bench.publisher.write(1, alter=shifted(field, within)))
    assert max(result.decoded, result.prefilled, result.rewards) == pytest.approx(within)
    with pytest.raises(BadPolicyVersion, match="from the trainer's, allowed"):
        await bench.attest(bench.publisher.write(2, alter=shifted(field, beyond)))


async def test_within_the_tolerance_the_child_still_has_to_be_nearer_than_the_parent(bench: Bench):
    """The whole update is smaller than the tolerance: only the comparison can tell."""

    def parent_is_near(manifest: Manifest) -> Manifest:
        probes = []
        for p in manifest.probes:
            child = tuple(v + 6e-4 for v in p.logprobs)  # the engine is 6e-4 from the child
            parent = tuple(v + 1e-4 for v in p.logprobs)  # and 1e-4 from the parent
            probes.append(p.model_copy(update={"logprobs": child, "parent_logprobs": parent}))
        return manifest.model_copy(update={"probes": tuple(probes)})

    with pytest.raises(BadPolicyVersion, match="may be serving the parent"):
        await bench.attest(bench.publisher.write(1, alter=parent_is_near))


def noisy(stands_at: float, step: float, rounding: float = 0.03) -> Callable[[Manifest], Manifest]:
    """Return what puts the engine, whose numbers are given, at this point between parent (0) and child (1).

    Each number is rounded as in bfloat16, in any direction; `step` is what child and parent differ by in each.
    """
    directions = random.Random(0)

    def alter(manifest: Manifest) -> Manifest:
        probes = []
        for p in manifest.probes:
            steps = [directions.choice((-step, step)) for _ in p.logprobs]
            noise = [directions.choice((-rounding, rounding)) for _ in p.logprobs]
            child = [
                v + n + (1 - stands_at) * s
                for v, n, s in zip(p.logprobs, noise, steps, strict=True)
            ]
            parent = [c - s for c, s in zip(child, steps, strict=True)]
            changes = {"logprobs": tuple(child), "parent_logprobs": tuple(parent)}
            probes.append(p.model_copy(update=changes))
        return manifest.model_copy(update={"probes": tuple(probes)})

    return alter


def often(alter: Callable[[Manifest], Manifest], times: int = 6) -> Callable[[Manifest], Manifest]:
    """Return what also repeats the probes: three of five tokens each."""
    return lambda manifest: alter(manifest.model_copy(update={"probes": manifest.probes * times}))


async def test_rounding_nearly_as_large_as_the_step_does_not_hide_the_child(bench: Bench):
    """Over 90 numbers it cancels, and the parent is refused though it is within the tolerance."""
    bench.engine.dtype = "bfloat16"
    result = await bench.attest(bench.publisher.write(1, alter=often(noisy(1.0, 0.04))))
    assert result.decoded == pytest.approx(0.03)
    with pytest.raises(BadPolicyVersion, match="may be serving the parent"):
        await bench.attest(bench.publisher.write(2, alter=often(noisy(0.0, 0.04))))


async def test_where_rounding_could_hide_the_parent_a_new_version_is_refused_though_it_is_served(
    bench: Bench,
):
    """Twelve numbers that differ by 0.01 are 0.035 in all; in bfloat16 0.28 is what can be told."""
    small = noisy(1.0, 0.01, rounding=0.0)
    await bench.attest(bench.publisher.write(1, alter=small))
    bench.engine.dtype = "bfloat16"
    row = bench.publisher.write(2, alter=small)
    before = bench.engine.started
    with pytest.raises(
        BadPolicyVersion, match=r"policy: told from the parent's by 0\.49"
    ) as raised:
        await bench.attest(row)
    assert raised.value.reason == "indistinct"
    assert bench.engine.started == before


@pytest.mark.parametrize("was", [VersionState.CURRENT, VersionState.CANARY, VersionState.RETIRED])
async def test_what_answered_before_is_not_refused_for_a_step_that_rounding_hides(
    bench: Bench, was: VersionState
):
    """Older releases took fewer probes, and an engine may be started in another dtype."""
    bench.engine.dtype = "bfloat16"
    row = bench.publisher.write(1, alter=noisy(3.0, 0.01, rounding=0.0))
    await bench.attest(replace(row, state=was))
    await bench.attest(bench.publisher.write(2, alter=noisy(1.0, 0.09, rounding=0.0)))
    other = bench.publisher.write(3, alter=often(noisy(0.0, 0.04)))
    with pytest.raises(BadPolicyVersion, match="may be serving the parent"):
        await bench.attest(replace(other, state=was))


async def test_a_reward_has_to_be_told_from_its_parents_too(bench: Bench):
    def moved_a_little(manifest: Manifest) -> Manifest:
        probes = [p.model_copy(update={"parent_reward": p.reward - 0.1}) for p in manifest.probes]
        return manifest.model_copy(update={"probes": tuple(probes)})

    await bench.attest(bench.publisher.write(1, alter=moved_a_little))
    bench.engine.dtype = "bfloat16"
    with pytest.raises(BadPolicyVersion, match=r"reward: told from the parent's by 2\.5") as raised:
        await bench.attest(bench.publisher.write(2, alter=moved_a_little))
    assert raised.value.reason == "indistinct"


async def test_of_probes_that_say_less_than_the_trainers_rounding_none_is_asked(bench: Bench):
    """Each of five numbers, 0.16 apart in the first four probes and 0.05 in 56 more: these add more rounding than step."""

    def then_less(manifest: Manifest) -> Manifest:
        first = often(noisy(1.0, 0.16, rounding=0.0), 2)(manifest)
        less = often(noisy(1.0, 0.05, rounding=0.0), 19)(manifest)
        probes = (*first.probes[:4], *less.probes[:56])
        return manifest.model_copy(update={"probes": probes, "dtype": "bfloat16"})

    bench.engine.dtype = "bfloat16"
    row = bench.publisher.write(1, alter=then_less)
    await bench.attest(row)
    assert bench.engine.started == 4


@pytest.mark.parametrize(("dtype", "step", "asked"), [("float32", 0.01, 4), ("bfloat16", 0.07, 11)])
async def test_no_more_probes_are_asked_than_rounding_takes(
    bench: Bench, dtype: str, step: float, asked: int
):
    """49 numbers that differ by 0.07 are 0.49 in all, 14 times the rounding; three probes have 13 numbers."""
    bench.engine.dtype = dtype
    row = bench.publisher.write(1, alter=often(noisy(1.0, step, rounding=0.0)))
    await bench.attest(row)
    assert bench.engine.started == asked


async def test_an_unchanged_adapter_need_not_differ_from_the_parents(bench: Bench):
    await bench.attest(bench.publisher.write(1, is_policy_unchanged=True))
    bench.publisher.write(2)
    row = bench.publisher.write(3, 2, is_policy_unchanged=True)
    assert (await bench.attest(row)).decoded == 0.0
    assert bench.weights(row, "policy") != bench.weights(row, "reward")


async def test_an_unchanged_adapter_still_has_to_be_the_one_that_is_served(bench: Bench):
    bench.publisher.write(1)
    row = bench.publisher.write(2, 1, is_policy_unchanged=True)
    bench.engine.speaks_for["v2-policy"] = BASE
    with pytest.raises(BadPolicyVersion, match="attestation"):
        await bench.attest(row)


def _probe(**changes: Any) -> Callable[[Manifest], Manifest]:
    def alter(manifest: Manifest) -> Manifest:
        first, *rest = manifest.probes
        return manifest.model_copy(update={"probes": (first.model_copy(update=changes), *rest)})

    return alter


@pytest.mark.parametrize(
    ("alter", "reason"),
    [
        (lambda m: m.model_copy(update={"probes": ()}), "no_probes"),
        (lambda m: m.model_copy(update={"probes": m.probes * 22}), "bad_probes"),
        (_probe(continuation=(), logprobs=(), parent_logprobs=()), "bad_probes"),
        (_probe(prompt=()), "bad_probes"),
        (_probe(logprobs=(-1.0,)), "bad_probes"),
        (_probe(parent_logprobs=(-1.0,)), "bad_probes"),
        (_probe(prompt=(10**6,)), "bad_probes"),
        (_probe(prompt=(-1,)), "bad_probes"),
        (_probe(prompt=(50,) * 600), "bad_probes"),
    ],
)
async def test_probes_that_cannot_be_asked_are_refused_before_the_engine_hears_of_them(
    bench: Bench, alter: Callable[[Manifest], Manifest], reason: str
):
    row = bench.publisher.write(1, alter=alter)
    with pytest.raises(BadPolicyVersion) as raised:
        await bench.attest(row)
    assert raised.value.reason == reason
    assert bench.engine.started == 0


async def test_an_engine_that_dies_meanwhile_is_no_fault_of_the_version(bench: Bench):
    bench.engine.may_sample.clear()

    async def die(*_arguments: Any, **_options: Any) -> tuple[float, ...]:
        bench.engine.is_dead = True
        raise EngineUnavailable("dead")

    bench.engine.next_logprobs = die  # type: ignore[method-assign]
    bench.engine.may_sample.set()
    with pytest.raises(EngineUnavailable):
        await bench.attest(bench.publisher.write(1))


def test_the_probe_type_is_what_publishing_writes(bench: Bench):
    row = bench.publisher.write(1)
    manifest = artifacts.read_manifest(Path(bench.versions) / row.folder)
    assert all(isinstance(p, Probe) and p.parent_reward is not None for p in manifest.probes)
