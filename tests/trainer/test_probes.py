import pytest
import torch

from thumbloop.artifacts import Probe
from trainer import probes
from trainer.models import ADAPTERS

VOCABULARY = range(6, 40)
END = (1,)


@pytest.fixture
def made(trunk, trained_weights, generator) -> probes.Probes:
    """Probes of a trained version whose parent is the base model."""
    parent = {adapter: trunk.snapshot(adapter) for adapter in ADAPTERS}
    for adapter in ADAPTERS:
        trunk.restore(adapter, trained_weights[adapter])
    return probes.make(trunk, parent, vocabulary=VOCABULARY, end=END, generator=generator)


def logprobs_one_by_one(trunk, probe: Probe, role: str) -> list[float]:
    """What a server that decodes token by token would see."""
    seen, ids = [], list(probe.prompt)
    with torch.no_grad(), trunk.role(role):
        for token in probe.continuation:
            logits = trunk.causal(input_ids=torch.tensor([ids])).logits[0, -1]
            assert role == "reference" or int(logits.argmax()) == token
            seen.append(logits.log_softmax(dim=-1)[token].item())
            ids.append(token)
    return seen


def test_the_child_decodes_every_continuation_and_finds_it_as_likely_as_stated(made, trunk):
    for probe in made.probes:
        assert logprobs_one_by_one(trunk, probe, "policy") == pytest.approx(
            probe.logprobs, abs=1e-4
        )


def test_the_parents_numbers_are_the_parents(made, trunk):
    for probe in made.probes:
        assert logprobs_one_by_one(trunk, probe, "reference") == pytest.approx(
            probe.parent_logprobs, abs=1e-4
        )
        assert probe.parent_reward is not None


def test_making_probes_leaves_the_child_in_the_trunk(made, trunk, trained_weights):
    for adapter in ADAPTERS:
        for name, parameter in trunk.parameters(adapter).items():
            assert torch.equal(parameter, trained_weights[adapter][name])


def test_both_distances_are_stated(made):
    pairs = [
        (a, b)
        for probe in made.probes
        for a, b in zip(probe.logprobs, probe.parent_logprobs, strict=True)
    ]
    mean = sum(abs(a - b) for a, b in pairs) / len(pairs)
    assert made.policy_distance == pytest.approx(mean)
    assert made.reward_distance > 0


def test_some_prompts_are_longer_than_three_kv_blocks_and_none_holds_a_special_token(made):
    assert max(len(p.prompt) for p in made.probes) > 3 * 32
    assert {token for p in made.probes for token in p.prompt} <= set(VOCABULARY)


def test_a_continuation_stops_at_an_end_token(trained_trunk, generator):
    pairs = probes.draw(trained_trunk, VOCABULARY, range(40), generator)
    assert {len(continuation) for _, continuation in pairs} == {1}


def test_an_unchanged_version_says_so(trained_trunk, generator):
    parent = {adapter: trained_trunk.snapshot(adapter) for adapter in ADAPTERS}
    same = probes.make(
        trained_trunk,
        parent,
        vocabulary=VOCABULARY,
        end=END,
        generator=generator,
    )
    assert (same.policy_distance, same.reward_distance) == (None, None)
    assert all(p.parent_reward == pytest.approx(p.reward) for p in same.probes)
