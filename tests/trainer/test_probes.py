import pytest
import torch

from thumbloop.artifacts import MOST_PROBES, Probe
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
    prompts = [(6, 7, 8), (9, 10)]
    continued = probes.continue_greedily(trained_trunk, prompts, range(40))
    assert [len(continuation) for (_, continuation), _ in continued] == [1, 1]


LENGTHS = tuple(probes.TRIES)


def tried(
    length: int = 5, *, lead: float = 1.0, step: float = 1.0, reward_step: float = 1.0
) -> probes.Try:
    """A try of one token; `step` and `reward_step` are what child and parent differ by."""
    probe = Probe(
        prompt=(6,) * length,
        continuation=(7,),
        logprobs=(-1.0,),
        parent_logprobs=(-1.0 - step,),
        reward=2.0,
        parent_reward=2.0 - reward_step,
    )
    return probes.Try(length, lead, lead >= 0.5, probe)


EACH = [tried(length) for length in LENGTHS]


def steps(chosen: list[Probe]) -> list[float]:
    return [round(p.logprobs[0] - p.parent_logprobs[0], 6) for p in chosen]


def choose(tries: list[probes.Try], dtype: str = "float32") -> list[float]:
    """What child and parent differ by in each chosen probe."""
    return steps(probes.choose(tries, dtype)[0])


def are_enough(tries: list[probes.Try], dtype: str = "float32") -> bool:
    return probes.choose(tries, dtype)[1]


def test_of_each_length_the_probe_is_the_one_that_differs_most_of_those_that_rounding_leaves_alone():
    tries = [*EACH[1:], tried(step=0.1), tried(step=-3.0), tried(step=9.0, lead=0.2)]
    assert choose(tries) == [-3.0, 1.0, 1.0, 1.0]
    assert are_enough(tries)


def test_where_nothing_continues_surely_the_surest_is_taken():
    unsure = [tried(100, lead=lead, step=lead) for lead in (0.1, 0.2, 0.15)]
    assert choose([*EACH[:-1], *unsure])[-1] == 0.2


def test_a_small_step_takes_more_probes_until_bfloat16_can_prove_it():
    """0.49 is needed: three of 0.1 and five of 0.2 are 0.479, with one more of 0.2 they are 0.52."""
    few = [tried(length, step=0.1) for length in LENGTHS]
    more = [tried(step=0.2, lead=lead) for lead in range(1, 10)]
    tries = [*few[1:], *more, few[0]]
    assert choose(tries) == [0.2, 0.1, 0.1, 0.1, *[0.2] * 5]
    assert are_enough(tries)
    assert not are_enough([*few[1:], *more[:5], few[0]])


def test_a_trainer_that_rounds_takes_what_says_more_than_that():
    """Two roundings of 0.035 each, taken twice: of a probe of one token 0.07 is none of the step, so 0.06 says nothing.

    Five of 0.3 are told by 6.4 standard deviations, and six by 7.
    """
    few = [tried(length, step=0.3) for length in LENGTHS]
    little = [tried(step=0.06, lead=lead) for lead in range(1, 5)]
    more = [tried(step=0.3, lead=lead) for lead in range(5, 8)]
    assert choose([*few, *little, more[0]], "bfloat16") == [0.3] * 5
    assert not are_enough([*few, *little, more[0]], "bfloat16")
    assert choose([*few, *little, *more], "bfloat16") == [0.3] * 6
    assert are_enough([*few, *little, *more], "bfloat16")


def test_a_small_step_of_the_rewards_takes_more_probes_too():
    """0.49 is needed: four of 0.1 and three of 0.3 are 0.556, with two of 0.3 they are 0.469."""
    few = [tried(length, reward_step=0.1) for length in LENGTHS]
    more = [tried(7, step=0.0, reward_step=0.3, lead=lead) for lead in range(1, 10)]
    assert len(choose([*few, *more])) == 4 + 3
    assert are_enough([*few, *more])
    assert not are_enough([*few, *more[:2]])


def test_there_are_never_more_probes_than_a_server_takes():
    small = [tried(length, step=1e-3, lead=lead) for lead in range(1, 30) for length in LENGTHS]
    assert len(choose(small)) == MOST_PROBES
    assert not are_enough(small)


def test_the_same_prompt_drawn_again_proves_nothing_more():
    few = [tried(length, step=0.1) for length in LENGTHS]
    assert len(choose(few * 9)) == 4


def test_nothing_more_is_looked_for_where_an_adapter_is_unchanged():
    same = [tried(length, step=5e-5, lead=lead) for lead in range(1, 10) for length in LENGTHS]
    assert len(choose(same)) == 4
    assert are_enough(same)


def test_one_number_that_differs_is_a_change():
    """However many others do not: a mean would hide it, and the probes are those that differ most."""
    assert probes.distance([-1.0] * 400, [-1.0] * 400) is None
    assert probes.distance([-1.0] * 400, [*[-1.0] * 399, -1.01]) == pytest.approx(0.01 / 400)


@pytest.mark.parametrize(("size", "draws"), [(1.0, 1), (1e-2, 4)])
def test_more_is_drawn_where_the_step_is_small(
    trunk, trained_weights, generator, monkeypatch: pytest.MonkeyPatch, size: float, draws: int
):
    """The parent is the base model, and the child so much of the way to the trained version."""
    parent = {adapter: trunk.snapshot(adapter) for adapter in ADAPTERS}
    for adapter in ADAPTERS:
        part = {
            name: weight + size * (trained_weights[adapter][name] - weight)
            for name, weight in parent[adapter].items()
        }
        trunk.restore(adapter, part)
    drawn = []
    draw = probes.draw

    def spy(*arguments):
        drawn.append(draw(*arguments))
        return drawn[-1]

    monkeypatch.setattr(probes, "draw", spy)
    made = probes.make(trunk, parent, vocabulary=VOCABULARY, end=END, generator=generator)
    assert len(drawn) == draws
    assert (len(made.probes) > 4) is (draws > 1)
    assert made.policy_distance is not None


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
