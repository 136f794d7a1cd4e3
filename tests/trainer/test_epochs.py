from itertools import pairwise

import pytest
import torch

from tests.trainer.conftest import LORA, VERDICT, tiny_model
from tests.trainer.test_update import sampled
from thumbloop.config.trainer import Ppo
from trainer.epochs import RatioMismatch, improve, minibatches
from trainer.measure import measure
from trainer.models import Trunk

SETTINGS = Ppo(minibatch_size=8, epochs=1, learning_rate=3e-3, target_kl=1.0)


@pytest.fixture
def fixed(trained_trunk):
    return measure(trained_trunk, sampled(trained_trunk, 16, 0))


def run(trunk, fixed, generator, *, blamed: int | None = None, settings=SETTINGS):
    """Run the epochs with advantages that are 1 but for one rollout, which has none that is a number."""
    advantages = torch.ones(fixed.mask.shape)
    if blamed is not None:
        advantages[blamed] = torch.nan
    return improve(trunk, fixed, advantages, settings, generator, step_scale=1.0)


def has_moved(trunk, before) -> bool:
    return any(not torch.equal(p, before[n]) for n, p in trunk.parameters("policy").items())


def test_a_policy_that_disagrees_with_itself_before_its_first_step_is_an_error(
    trained_trunk, fixed, generator
):
    before = trained_trunk.snapshot("policy")
    off = fixed._replace(prox_logprobs=fixed.prox_logprobs + 0.01)
    with pytest.raises(RatioMismatch, match=r"off by 0\.01 nats"):
        run(trained_trunk, off, generator)
    assert not has_moved(trained_trunk, before)


def test_in_half_precision_one_token_may_be_off_and_a_wrong_temperature_is_a_mistake(generator):
    trunk = Trunk(tiny_model().bfloat16(), LORA, VERDICT)
    fixed = measure(trunk, sampled(trunk, 32, 0))
    wrong = fixed._replace(temperature=0.5 * fixed.temperature)
    with pytest.raises(RatioMismatch):
        run(trunk, wrong, generator)
    one_off = fixed.prox_logprobs.clone()
    one_off[:, 0] += 0.4 * (torch.arange(32) % 8 == 0)  # about one token in each minibatch
    settings = SETTINGS.model_copy(update={"minibatch_size": 16})
    rounded = fixed._replace(prox_logprobs=one_off)
    assert run(trunk, rounded, generator, settings=settings).steps == 2


def test_a_minibatch_whose_loss_is_no_number_is_skipped_and_the_others_are_not(
    trained_trunk, fixed, generator
):
    before = trained_trunk.snapshot("policy")
    settings = SETTINGS.model_copy(update={"epochs": 2})  # so that a step follows what was skipped
    progress = run(trained_trunk, fixed, generator, blamed=3, settings=settings)
    assert (progress.steps, progress.skipped, len(progress.losses)) == (2, 2, 2)
    assert all(outcome.loss.isfinite() for outcome in progress.losses)
    assert has_moved(trained_trunk, before)
    assert all(p.isfinite().all() for p in trained_trunk.parameters("policy").values())


def test_a_minibatch_in_which_a_token_counts_twentyfold_moves_nothing(
    trained_trunk, fixed, generator
):
    before = trained_trunk.snapshot("policy")
    old = fixed.old_logprobs.clone()
    old[:, 0] -= 3.5  # e^3.5 is 33
    settings = SETTINGS.model_copy(update={"max_importance_weight": 100.0})
    unlikely = fixed._replace(old_logprobs=old)
    progress = run(trained_trunk, unlikely, generator, settings=settings)
    assert (progress.steps, progress.skipped, progress.losses) == (0, 2, [])
    assert not has_moved(trained_trunk, before)
    run(trained_trunk, unlikely, generator)  # whose weights are truncated at 2
    assert has_moved(trained_trunk, before)


PAIRS = [((k % 8, 1), (k,)) for k in range(32)]


@pytest.mark.parametrize("of", ["prompts", "rollouts"])
def test_an_epoch_takes_every_rollout_once_in_random_order(of):
    settings = SETTINGS.model_copy(update={"minibatches": of})
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.cat(list(minibatches(PAIRS, settings, generator))) for _ in (0, 1))
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(32))
    assert first.tolist() != second.tolist()
    assert first.tolist() != sorted(first.tolist())


def test_minibatches_of_prompts_hold_all_rollouts_of_theirs():
    settings = SETTINGS.model_copy(update={"minibatches": "prompts"})
    parts = minibatches(PAIRS, settings, torch.Generator().manual_seed(0))
    assert [len({PAIRS[i][0] for i in part.tolist()}) for part in parts] == [2, 2, 2, 2]


def test_minibatches_cut_at_most_one_prompt_at_each_border():
    pairs = [((k // 3,), (k,)) for k in range(30)]
    settings = SETTINGS.model_copy(update={"minibatches": "prompts"})
    parts = minibatches(pairs, settings, torch.Generator().manual_seed(0))
    assert [len(part) for part in parts] == [8, 8, 8, 6]
    prompts = [{pairs[i][0] for i in part.tolist()} for part in parts]
    assert all(len(a & b) <= 1 for a, b in pairwise(prompts))
    assert all(len(of) <= 4 for of in prompts)
