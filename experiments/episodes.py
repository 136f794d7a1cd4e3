"""python -m experiments.episodes TASK: our update learns a task; prints a line of JSON.

A task's rewards come from one reward model that stays as it is, its episodes from the policy of the moment:
what is learned from an episode is all that differs between trainers.
"""

import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from pydantic import BaseModel
from transformers import AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from demo.judging import Judged, columns, judge
from experiments.sampling import Sample, rollout_of, sample
from thumbloop.config.trainer import Lora, Ppo, Resources
from thumbloop.rendering import VerdictTokens, text_of
from thumbloop.types import BASE_VERSION, DEFAULT_POLICY, PolicyVersion
from trainer import reward
from trainer.assembly import end_tokens
from trainer.measure import measure
from trainer.models import Trunk
from trainer.update import PpoObjective

Tokens = tuple[int, ...]

_UNTRAINED = PolicyVersion(
    policy=DEFAULT_POLICY,
    version=BASE_VERSION,
    parent=None,
    folder="",
    policy_digest="",
    reward_digest="",
    manifest_digest="",
    published_at=0.0,
)
"""What every update has for a parent: none is to know what became of the one before."""


class Question(BaseModel, frozen=True, extra="forbid"):
    """A prompt that the policy is judged by."""

    text: str
    tokens: Tokens


class Known(BaseModel, frozen=True, extra="forbid"):
    """A response and its reward in logits, by which a trainer makes sure that it has the task's reward model."""

    prompt: Tokens
    response: Tokens
    reward: float


class Task(BaseModel, frozen=True, extra="forbid"):
    """What is learned: `adapters` holds the reward model's, as in a version; the policy begins untrained.

    Each of `updates` holds the prompts of one, of which every one gets `candidates` responses. The policy is
    good enough once its responses to `held_out`, one each, are liked and well-formed at the rate `goal`.
    """

    model: Path
    adapters: Path
    lora: Lora
    verdict: VerdictTokens
    preference: str
    updates: tuple[tuple[Tokens, ...], ...]
    candidates: int
    held_out: tuple[Question, ...]
    known: tuple[Known, ...]
    goal: float
    max_tokens: int
    epochs: int
    minibatch: int
    learning_rate: float
    threads: int
    seed: int


class Learner:
    """The policy that learns a task, from rewards that do not change."""

    def __init__(self, task: Task) -> None:
        self._task = task
        torch.manual_seed(task.seed)
        self._generator = torch.Generator().manual_seed(task.seed)
        self._trunk = Trunk.open(task.model, task.lora, task.verdict, Resources(device="cpu"))
        untrained = self._trunk.snapshot("policy")
        self._trunk.load(task.adapters)
        self._trunk.restore("policy", untrained)
        self._trunk.value_head = self._trunk.new_value_head()
        self._objective = PpoObjective(
            Ppo(
                learning_rate=task.learning_rate,
                epochs=task.epochs,
                minibatch_size=task.minibatch,
            )
        )
        self._tokenizer = AutoTokenizer.from_pretrained(str(task.model))
        self._end = end_tokens(task.model, self._trunk, self._tokenizer)

    def examine(self) -> Judged:
        """Return what the policy's responses to held-out prompts are worth."""
        asked = self._task.held_out
        samples = self._sample([each.tokens for each in asked])
        texts = [text_of(each.token_ids, self._tokenizer) for each in samples]
        return judge(self._task.preference, [each.text for each in asked], texts)

    def update(self, prompts: tuple[Tokens, ...]) -> int:
        """Learn from responses to prompts; return how many these were."""
        repeated = [prompt for prompt in prompts for _ in range(self._task.candidates)]
        samples = self._sample(repeated)
        rollouts = [rollout_of(*each, BASE_VERSION) for each in zip(repeated, samples, strict=True)]
        rewards = reward.score(self._trunk, [(r.prompt, r.response) for r in rollouts])
        self._objective.improve(
            self._trunk,
            rollouts,
            measure(self._trunk, rollouts),
            rewards,
            parent=_UNTRAINED,
            generator=self._generator,
        )
        return len(rollouts)

    def _sample(self, prompts: list[Tokens]) -> list[Sample]:
        seed = int(torch.randint(1 << 31, (), generator=self._generator))
        most = self._task.max_tokens
        return sample(self._trunk, prompts, end=self._end, max_tokens=most, seed=seed)


def main(task: Annotated[Path, typer.Argument(help="What experiments.tasks wrote.")]) -> None:
    """Learn until the policy is good enough, or has seen enough; say what it is worth after each update."""
    disable_progress_bar()
    what = Task.model_validate_json(task.read_text())
    torch.set_num_threads(what.threads)
    learner = Learner(what)
    episodes, judged = [0], [learner.examine()]
    for prompts in what.updates:
        if judged[-1].both >= what.goal:
            break
        episodes.append(episodes[-1] + learner.update(prompts))
        judged.append(learner.examine())
    print(json.dumps({"episodes": episodes, **columns(judged)}))


if __name__ == "__main__":
    typer.run(main)
