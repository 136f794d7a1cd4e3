"""A round's rollouts as a file: which they are, and what they are worth."""

import json
from pathlib import Path

import pytest
import torch

from experiments import frozen
from experiments.frozen import Job, TooFew, freeze
from loadtest.trl import frozen as trl
from tests.experiments.conftest import PROMPTS
from thumbloop.config import TrainerConfig
from thumbloop.errors import UnknownPolicyVersion


def test_what_a_version_says_is_frozen_with_its_scores_and_read_back(
    learned: TrainerConfig, tiny_model: Path, tmp_path: Path
):
    job = freeze(learned, tiny_model, 1, prompts=3, candidates=2)
    asked = [PROMPTS[i] for i in (0, 1, 3)]
    assert [each.prompt for each in job.rollouts] == [p for p in asked for _ in range(2)]
    assert len({each.response for each in job.rollouts}) == 6
    assert len({each.score for each in job.rollouts}) > 1
    assert (job.version / "policy").is_dir()
    assert (job.epochs, job.minibatch, job.optimizer_steps) == (2, 32, 2)
    job.write(tmp_path / "job.json")
    assert Job.read(tmp_path / "job.json") == job
    assert freeze(learned, tiny_model, 1, prompts=3, candidates=2) == job
    assert freeze(learned, tiny_model, 1, prompts=3, candidates=2, seed=1) != job


def test_the_policy_that_trl_is_given_is_the_one_that_sampled(
    learned: TrainerConfig, tiny_model: Path, tmp_path: Path
):
    frozen = freeze(learned, tiny_model, 1, prompts=2, candidates=2)
    frozen.model_copy(update={"minibatch": 2}).write(tmp_path / "job.json")
    job = trl.read(tmp_path / "job.json")
    assert job.optimizer_steps == 4
    assert [rollout.score.item() for rollout in job.rollouts] == pytest.approx(
        [each.score for each in frozen.rollouts]
    )
    policy = trl.open_policy(job)

    @torch.no_grad()
    def logprobs(rollout: trl.Rollout) -> torch.Tensor:
        logits = policy(torch.cat([rollout.prompt, rollout.response])[None]).logits[0, :-1]
        of_response = logits.log_softmax(-1)[len(rollout.prompt) - 1 :]
        return of_response.gather(1, rollout.response[:, None]).squeeze(1)

    trl.check_agreement(job, [logprobs(rollout) for rollout in job.rollouts])
    assert {n for n, p in policy.named_parameters() if p.requires_grad} == {
        n for n, _ in policy.named_parameters() if ".lora_" in n
    }


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"minibatch": 3}, "fill a minibatch"), ({"temperature": 0.7}, "sampled at 1")],
)
def test_what_trl_would_not_do_in_full_is_refused(
    learned: TrainerConfig, tiny_model: Path, tmp_path: Path, changes: dict[str, float], words: str
):
    found = freeze(learned, tiny_model, 1, prompts=2, candidates=2).model_dump(mode="json")
    found |= {"minibatch": changes.get("minibatch", 2)}
    found["rollouts"][0] |= {"temperature": changes.get("temperature", 1.0)}
    (tmp_path / "job.json").write_text(json.dumps(found))
    with pytest.raises(SystemExit, match=words):
        trl.read(tmp_path / "job.json")


def test_less_than_a_round_is_not_frozen(learned: TrainerConfig, tiny_model: Path):
    with pytest.raises(TooFew, match="users asked 3 prompts, 4 are needed"):
        freeze(learned, tiny_model, 1, prompts=4, candidates=2)
    with pytest.raises(UnknownPolicyVersion, match="no version 7"):
        freeze(learned, tiny_model, 7, prompts=1, candidates=2)


def test_what_cannot_be_frozen_is_one_line(
    learned: TrainerConfig, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as stopped:
        frozen.main(learned.state.folder, tiny_model, 1, tmp_path / "job.json")
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: users asked 3 prompts, 64 are needed\n"
