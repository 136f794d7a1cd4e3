import torch

from tests.trainer.test_reward import LIKED, thumbs_for_a_token
from thumbloop.config.trainer import Supervised
from trainer.measure import response_logprobs
from trainer.rollouts import Rollout, Thumb
from trainer.supervised import imitate

SETTINGS = Supervised(enabled=True, learning_rate=5e-3, epochs=3, batch_size=8)


def likelihood(trunk, thumbs: list[Thumb], *, is_up: bool) -> float:
    rollouts = [Rollout("r", 0, t.prompt, t.response, (), 1.0) for t in thumbs if t.is_up is is_up]
    return response_logprobs(trunk, rollouts).mean().item()


def test_what_was_liked_becomes_likelier_and_what_was_not_does_not(trunk, generator):
    thumbs, unseen = thumbs_for_a_token(64, seed=0), thumbs_for_a_token(64, seed=9)
    before = [likelihood(trunk, unseen, is_up=up) for up in (True, False)]
    loss = imitate(trunk, thumbs, torch.ones(64), SETTINGS, generator)
    after = [likelihood(trunk, unseen, is_up=up) for up in (True, False)]
    assert loss > 0
    assert after[0] - before[0] > after[1] - before[1]
    tokens = torch.tensor([[6, 7]])
    with torch.no_grad(), trunk.role("policy"):
        liked = trunk.causal(input_ids=tokens).logits[0, -1].softmax(dim=-1)[LIKED]
    with torch.no_grad(), trunk.role("reference"):
        assert liked > trunk.causal(input_ids=tokens).logits[0, -1].softmax(dim=-1)[LIKED]


def test_a_reply_of_weight_zero_is_not_imitated(trunk, generator):
    before = trunk.snapshot("policy")
    imitate(trunk, thumbs_for_a_token(16, seed=0), torch.zeros(16), SETTINGS, generator)
    assert all(torch.equal(p, before[n]) for n, p in trunk.parameters("policy").items())


def test_without_a_thumb_up_nothing_is_done(trunk, generator):
    before = trunk.snapshot("policy")
    disliked = [t for t in thumbs_for_a_token(16, seed=0) if not t.is_up]
    assert imitate(trunk, disliked, torch.ones(len(disliked)), SETTINGS, generator) == 0
    assert all(torch.equal(p, before[n]) for n, p in trunk.parameters("policy").items())


def test_imitating_leaves_the_reward_model_alone(trained_trunk, generator):
    before = trained_trunk.snapshot("reward")
    imitate(trained_trunk, thumbs_for_a_token(16, seed=0), torch.ones(16), SETTINGS, generator)
    assert all(torch.equal(p, before[n]) for n, p in trained_trunk.parameters("reward").items())
