"""Proof that the engine serves the version the trainer made: its numbers are nearer to the child's
than to the parent's, for prefilled and for decoded tokens, and for rewards."""

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from server.concurrency import gather_or_cancel
from server.engine import Engine
from server.engine.protocol import PROBE_PRIORITY
from server.routes import LoadedVersion
from thumbloop.artifacts import MOST_PROBES, AdapterFacts, Manifest, Probe
from thumbloop.errors import BadPolicyVersion, EngineUnavailable
from thumbloop.rendering import VerdictTokens
from thumbloop.rounding import INDISTINCT, LEAST_SURENESS, WANTED_SURENESS, sureness
from thumbloop.types import WAITING, Sampling

log = logging.getLogger(__name__)

# How far engine and trainer may differ for the same weights: mean absolute difference over all
# probes, nats or logits. float32: 4e-6 was measured between vLLM and transformers.
TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2, "float16": 2e-2}
# Where the engine has to stand on the way from the parent's numbers (0) to the child's (1).
_FROM_PARENT_TO_CHILD = (0.5, 1.5)
_FEWEST_PROBES = 4  # a trainer draws one of each length


@dataclass(frozen=True, slots=True)
class Attestation:
    """Mean absolute differences between engine and child; nats for log-probabilities."""

    prefilled: float
    decoded: float
    rewards: float


class _Claim(NamedTuple):
    """What a manifest says of an adapter's numbers: its own, its parent's (None: not said), whether they differ.

    `dtypes` are the engine's and the trainer's.
    """

    child: Sequence[float]
    parent: Sequence[float] | None
    is_unchanged: bool
    dtypes: tuple[str, str]

    @property
    def sureness(self) -> float:
        """Return how surely child and parent are told apart, infinite where nothing is to be."""
        if self.is_unchanged or self.parent is None:
            return math.inf
        return sureness(self.child, self.parent, *self.dtypes)


async def attest(
    engine: Engine, verdict: VerdictTokens, loaded: LoadedVersion, manifest: Manifest
) -> Attestation:
    """Reproduce the manifest's probes in the engine, as many of them as its dtype takes.

    Raises BadPolicyVersion: the engine's numbers are not the child's, or it gave up on a probe; or rounding hides
    whose they are, for which only what never answered is refused. EngineUnavailable: it is dead.
    """
    _check_probes(engine, verdict, manifest.probes)
    probes = _enough(engine.dtype, manifest)
    policy, reward = _claims(engine.dtype, manifest, probes)
    if loaded.facts.state in WAITING:
        _check_sureness(policy, reward)
    try:  # all at once: users' requests share as few steps of the engine with them as can be
        numbers = await gather_or_cancel(
            ask(engine, verdict, loaded, probe)
            for ask in (_prefill, _decode, _score)
            for probe in probes
        )
    except EngineUnavailable as error:
        await engine.check()  # raises for everybody's sake; else it was this version's requests
        raise BadPolicyVersion("not_answered", f"the engine gave up on a probe: {error}") from None
    each = len(probes)
    prefilled, decoded, scored = (
        _flat(numbers[start : start + each]) for start in range(0, len(numbers), each)
    )
    tolerance = TOLERANCE[engine.dtype]
    return Attestation(
        _compare("prefilled", prefilled, policy, tolerance),
        _compare("decoded", decoded, policy, tolerance),
        # a reward is the difference of two logits of a sharpened model
        _compare("rewards", scored, reward, 10 * tolerance),
    )


def _check_probes(engine: Engine, verdict: VerdictTokens, probes: Sequence[Probe]) -> None:
    """Refuse probes that the engine cannot be asked: it would fail for everybody, not only for us."""
    if not probes:
        raise BadPolicyVersion("no_probes", "a version without probes cannot be attested")
    if len(probes) > MOST_PROBES:
        raise BadPolicyVersion("bad_probes", f"{len(probes)} probes, at most {MOST_PROBES}")
    vocabulary = set(engine.tokenizer.get_vocab().values())
    for probe in probes:
        is_sound = (
            probe.prompt
            and probe.continuation
            and len(probe.continuation) == len(probe.logprobs) == len(probe.parent_logprobs)
            and vocabulary.issuperset(probe.prompt + probe.continuation)
            and len(verdict.wrap(probe.prompt, probe.continuation)) < engine.max_model_len
        )
        if not is_sound:
            raise BadPolicyVersion("bad_probes", "a probe is empty, uneven, too long or not text")


async def _prefill(
    engine: Engine, _verdict: VerdictTokens, loaded: LoadedVersion, probe: Probe
) -> tuple[float, ...]:
    """Return the log-probabilities of a probe's continuation, read as a prompt."""
    return await engine.logprobs(
        probe.prompt, probe.continuation, loaded.policy, priority=PROBE_PRIORITY
    )


async def _decode(
    engine: Engine, _verdict: VerdictTokens, loaded: LoadedVersion, probe: Probe
) -> tuple[float, ...]:
    """Return the same, decoded greedily. Raises BadPolicyVersion: it is another continuation."""
    greedy = Sampling(max_tokens=len(probe.continuation), temperature=0.0)
    decoded = await engine.sample(probe.prompt, greedy, loaded.policy, priority=PROBE_PRIORITY)
    if decoded.token_ids != probe.continuation:
        raise BadPolicyVersion("attestation", "the engine decodes other tokens than the trainer")
    return decoded.logprobs


async def _score(
    engine: Engine, verdict: VerdictTokens, loaded: LoadedVersion, probe: Probe
) -> tuple[float, ...]:
    """Return the reward of a probe's continuation, alone."""
    assert loaded.reward is not None, "a published version has a reward adapter"
    up, down = await engine.next_logprobs(
        verdict.wrap(probe.prompt, probe.continuation),
        (verdict.up, verdict.down),
        loaded.reward,
        priority=PROBE_PRIORITY,
    )
    return (up - down,)


def _enough(dtype: str, manifest: Manifest) -> Sequence[Probe]:
    """Return as many of the probes as it takes to be sure in spite of rounding, else those that tell the most."""
    best, most = manifest.probes[:_FEWEST_PROBES], -math.inf
    for count in range(len(best), len(manifest.probes) + 1):
        probes = manifest.probes[:count]
        told = min(claim.sureness for claim in _claims(dtype, manifest, probes))
        if told > most:
            best, most = probes, told
        if told >= WANTED_SURENESS:
            break
    return best


def _claims(dtype: str, manifest: Manifest, probes: Sequence[Probe]) -> tuple[_Claim, _Claim]:
    """Return what is said of the policy and of the reward adapter; `dtype` is the engine's."""
    rewards = [p.parent_reward for p in probes if p.parent_reward is not None]
    dtypes = dtype, manifest.dtype
    return (
        _Claim(
            _flat(p.logprobs for p in probes),
            _flat(p.parent_logprobs for p in probes),
            _is_unchanged(manifest.policy_adapter),
            dtypes,
        ),
        _Claim(
            [p.reward for p in probes],
            rewards if len(rewards) == len(probes) else None,
            _is_unchanged(manifest.reward_adapter),
            dtypes,
        ),
    )


def _check_sureness(policy: _Claim, reward: _Claim) -> None:
    for what, claim in (("policy", policy), ("reward", reward)):
        if claim.parent is None:
            raise BadPolicyVersion("bad_probes", f"{what}: the parent's numbers are not there")
        if claim.sureness < LEAST_SURENESS:
            engine, trainer = claim.dtypes
            raise BadPolicyVersion(
                "indistinct",
                f"{what}: told from the parent's by {claim.sureness:.2g} standard deviations of rounding, in {engine}"
                f" and {trainer} of the trainer, less than {LEAST_SURENESS:g}: the parent might be served",
            )


def _is_unchanged(adapter: AdapterFacts | None) -> bool:
    assert adapter is not None, "verified before"
    return adapter.distance is None


def _compare(what: str, engine: Sequence[float], claim: _Claim, tolerance: float) -> float:
    """Return the engine's distance from the child, or raise when it is too far or not nearer.

    Nearer in the Euclidean sense: rounding points anywhere, so much of it cancels in the projection on
    the line from parent to child. Where the step is lost in rounding, the projection says nothing. What
    is said to be unchanged has to be borne out by the probes.
    """
    from_child = _mean_distance(engine, claim.child)
    if not from_child <= tolerance:
        raise BadPolicyVersion(
            "attestation", f"{what}: {from_child:.3g} from the trainer's, allowed {tolerance:.3g}"
        )
    if claim.parent is None:
        return from_child
    if claim.is_unchanged:
        if _mean_distance(claim.child, claim.parent) > 2 * INDISTINCT:
            raise BadPolicyVersion("bad_probes", f"{what}: said to be unchanged, and are not")
        return from_child
    if claim.sureness < LEAST_SURENESS:
        log.warning("%s: %s hides the step from the parent's", what, claim.dtypes[0])
        return from_child
    way = _projection(engine, claim.parent, claim.child)
    low, high = _FROM_PARENT_TO_CHILD
    if not low <= way <= high:
        raise BadPolicyVersion(
            "attestation",
            f"{what}: the engine stands at {way:.2g} on the way from the parent's numbers (0) to the"
            " child's (1); it may be serving the parent",
        )
    return from_child


def _mean_distance(one: Sequence[float], other: Sequence[float]) -> float:
    return sum(abs(a - b) for a, b in zip(one, other, strict=True)) / len(one)


def _projection(point: Sequence[float], start: Sequence[float], end: Sequence[float]) -> float:
    """Return how far along from start to end a point lies: 0 at the start, 1 at the end."""
    step = [b - a for a, b in zip(start, end, strict=True)]
    walked = sum((p - a) * s for p, a, s in zip(point, start, step, strict=True))
    length = sum(s * s for s in step)
    return walked / length


def _flat(rows: Iterable[Sequence[float]]) -> tuple[float, ...]:
    return tuple(value for row in rows for value in row)
