"""The loop that experiments run, on a tiny model: what it stores is what the server would have stored."""

import math
from pathlib import Path

import pytest
import torch

from experiments.run import Run
from experiments.sampling import sample
from experiments.serving import Setting
from server.guidance.outcome import Checkpoint
from tests.tiny_model import build_tiny_model
from thumbloop.store import feedback, interactions, reading, versions
from thumbloop.types import DEFAULT_POLICY, Arm, FinishReason, Strategy
from trainer.batches import collate

TRAINER = {
    "round": {"first_feedback": 32, "min_feedback": 32, "min_rollouts": 16, "max_rollouts": 64},
    "lora": {"rank": 4, "alpha": 8},
    "gate": {"enabled": False},
}


def likes_even_lengths(_prompt: str, reply: str) -> float:
    return float(len(reply) % 2 == 0)


PREFERENCE = f"{__name__}:likes_even_lengths"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def run(model: Path):
    setting = Setting("praise", max_tokens=8, num_candidates=3)
    with Run(setting, trainer=TRAINER, model=model) as run:
        yield run


def stored(run: Run):
    with reading(run.store) as connection:
        return interactions.list_since(connection, DEFAULT_POLICY, 0)


def test_samples_carry_the_log_probabilities_they_were_drawn_with(run: Run):
    run.take()
    trunk = run.assembly.trunk
    prompts = [(20, 21, 22), (30,), (40, 41)]
    samples = sample(trunk, prompts, end=[50], max_tokens=6, seed=3, temperature=0.7)
    batch = collate([(p, s.token_ids) for p, s in zip(prompts, samples, strict=True)])
    with torch.no_grad():
        logprobs = trunk.respond(batch, torch.full((3, 1), 0.7), "policy").logprobs
    for drawn, row in zip(samples, logprobs.tolist(), strict=True):
        assert drawn.logprobs == pytest.approx(row[: len(drawn.token_ids)], abs=1e-4)
    again = sample(trunk, prompts, end=[50], max_tokens=6, seed=3, temperature=0.7)
    assert again == samples


def test_a_sample_ends_with_its_end(run: Run):
    run.take()
    (drawn,) = sample(
        run.assembly.trunk, [(20, 21)], end=list(range(40, 200)), max_tokens=64, seed=0
    )
    assert drawn.has_ended
    assert drawn.token_ids[-1] in range(40, 200)
    assert all(token not in range(40, 200) for token in drawn.token_ids[:-1])


def test_version_0_shows_any_candidate_alike(run: Run):
    run.service.serve(20, run.take())
    replies = stored(run)
    assert len(replies) == 20
    for reply in replies:
        assert [c.propensity for c in reply.candidates] == pytest.approx([1 / 3] * 3)
        assert sum(c.chosen for c in reply.candidates) == 1
        assert not reply.reranked
    with reading(run.store) as connection:
        assert feedback.counts(connection) == (run.service.thumbs, run.service.thumbs)
    assert 4 <= run.service.thumbs <= 19


def test_a_round_publishes_and_the_next_version_is_served_with_its_rewards(run: Run):
    learned = run.round()
    assert learned.version == 1
    assert learned.metrics["sampler_trainer_kl"] < 1e-5
    run.service.serve(30, run.take())
    replies = [reply for reply in stored(run) if reply.policy_version == 1]
    assert len(replies) == 30
    for reply in replies:
        assert reply.reranked
        rewards = [c.reward for c in reply.candidates]
        expected = torch.tensor(rewards).div(0.5).softmax(dim=0) * 0.97 + 0.03 / 3
        assert [c.propensity for c in reply.candidates] == pytest.approx(
            expected.tolist(), abs=1e-5
        )
    examined = run.examine()
    assert (examined.version, len(run.judged)) == (1, 1)
    assert sum(run.judged[0].likes) / len(run.judged[0].rewards) == pytest.approx(examined.rate)


def test_logged_thumbs_are_those_of_the_version_that_is_there(run: Run):
    run.round()
    before = run.service.thumbs
    logged = run.log(20)
    assert len(logged) == run.service.thumbs - before >= 20
    assert {thumb.sample.policy_version for thumb in logged} == {1}


def test_pruned_candidates_end_where_they_were_looked_at(model: Path):
    setting = Setting(
        max_tokens=8,
        strategy=Strategy.SPECULATIVE_REJECTION,
        num_candidates=4,
        checkpoints=(Checkpoint(tokens=2, keep=2),),
        audit_share=0.3,
    )
    with Run(setting, trainer=TRAINER, model=model) as run:
        run.round()
        run.service.serve(40, run.take())
        replies = [reply for reply in stored(run) if reply.policy_version == 1]
    pruned = [r for r in replies if r.arm is Arm.STRATEGY]
    audits = [r for r in replies if r.arm is Arm.AUDIT]
    assert pruned
    assert audits
    assert all(r.untrainable_reason == "pruned" for r in pruned)
    assert all(r.trainable for r in audits)
    aborted = [c for r in pruned for c in r.candidates if c.finish_reason is FinishReason.ABORTED]
    assert aborted
    assert all(len(c.token_ids) == len(c.logprobs) == 2 for c in aborted)
    assert all(c.reward is None and len(c.stage_rewards) == 1 for c in aborted)
    for reply in pruned:
        winner = max((c for c in reply.candidates if c.reward is not None), key=lambda c: c.reward)
        assert reply.chosen is winner
        assert winner.propensity == pytest.approx(0.7 + 0.3 / 4)


def test_shuffled_thumbs_are_the_same_thumbs_on_other_replies(model: Path):
    rates = []
    for shuffled in (False, True):
        setting = Setting(PREFERENCE, max_tokens=8, shuffled=shuffled)
        with Run(setting, trainer=TRAINER, model=model) as run:
            run.service.serve(60, run.take())
            with reading(run.store) as connection:
                rated = feedback.list_rated(connection, DEFAULT_POLICY)
        rates.append([likes_even_lengths("", r.candidate.text) == r.value for r in rated])
    right, shuffled_right = (sum(r) / len(r) for r in rates)
    assert right > 0.75 > shuffled_right
    assert not math.isnan(shuffled_right)


def test_what_is_published_becomes_current(run: Run):
    run.round()
    with reading(run.store) as connection:
        assert versions.current(connection, DEFAULT_POLICY).version == 1
