"""A whole loop in one process: serve, rate, learn, adopt, examine; the trainer is the real one."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
from rich.console import Console
from transformers.utils.logging import disable_progress_bar

from demo.corpus import held_out_prompts
from demo.grammar import is_well_formed
from demo.preferences import load_preference
from experiments.base_model import base_model
from experiments.judged import JudgedRewards, quality
from experiments.serving import Service, Setting
from thumbloop.config import Model, State, TrainerConfig
from thumbloop.store import deployments, open_store, reading, versions
from thumbloop.types import DEFAULT_POLICY, PolicyVersion, VersionState
from trainer import dataset, reward
from trainer.assembly import assemble
from trainer.batches import Pair
from trainer.calibration import Calibration
from trainer.metrics import TrainerMetrics
from trainer.rollouts import Thumb

_REQUESTS_AT_ONCE = 12
_EXAMINATION_SEED = 1_000_003
_HELD_OUT = 600
_NO_LIMIT = 1e9


Trainer = Mapping[str, Any]
"""Settings that differ from the trainer's defaults, as sections."""


@dataclass(frozen=True, slots=True)
class Examined:
    """What a version's policy does on held-out prompts, one sample each, judged without noise."""

    version: int
    thumbs: int  # given before it was published
    rate: float
    well_formed: float
    mean_tokens: float


@dataclass(frozen=True, slots=True)
class Learned:
    """How a round ended."""

    version: int | None
    reason: str
    metrics: Mapping[str, Any]


class Candidates(NamedTuple):
    """Random candidates of one policy, one for each prompt, and what is true of them."""

    texts: list[str]
    replies: list[Pair]
    likes: list[float]  # probabilities of being liked, before anybody slips


class Run:
    """One system that learns from one crowd."""

    def __init__(
        self,
        setting: Setting,
        *,
        trainer: Trainer | None = None,
        model: Path | None = None,
    ) -> None:
        """Open a fresh system, on the experiments' base model unless told otherwise."""
        torch.set_num_threads(1)
        disable_progress_bar()
        self._scratch = TemporaryDirectory(prefix="thumbloop-experiment-")
        folder = Path(self._scratch.name)
        model = model or base_model()
        self.config = TrainerConfig(
            **{
                "seed": setting.seed,
                "state": State(folder=folder / "state"),
                "model": Model(path=str(model)),
                **(trainer or {}),
            }
        )
        self.store = open_store(self.config.state)
        metrics = TrainerMetrics(folder / "tensorboard", Console(quiet=True))
        self.assembly = assemble(self.config, model, self.store, metrics)
        self.service = Service(setting, self.assembly, self.store)
        self._setting = setting
        self.prefers = load_preference(setting.preference)
        self._held_out = held_out_prompts(_HELD_OUT, setting.seed)
        self.judged: list[JudgedRewards] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        _type: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        self.store.dispose()
        self._scratch.cleanup()

    @property
    def current(self) -> PolicyVersion:
        """Return the version that answers."""
        with reading(self.store) as connection:
            return versions.current(connection, DEFAULT_POLICY)

    def round(self) -> Learned:
        """Serve until a round is due and done; a version that it published becomes current."""
        version = self.take()
        while not self.assembly.loop.step():
            self.take()  # what the trainer had in the trunk may be another
            self.service.serve(_REQUESTS_AT_ONCE, version)
        with self.store.begin() as connection:
            row = versions.list_rounds(connection, DEFAULT_POLICY)[-1]
            if row["version"] is not None:
                deployments.set_state(
                    connection, DEFAULT_POLICY, row["version"], VersionState.CURRENT, at=0.0
                )
        return Learned(row["version"], row["reason"], row["metrics"])

    def take(self) -> PolicyVersion:
        """Put the current version's adapters into the trunk."""
        version, trunk = self.current, self.assembly.trunk
        trunk.reset()
        if version.policy_digest:
            trunk.load(self.config.state.versions / version.folder)
        return version

    def log(self, thumbs: int) -> list[Thumb]:
        """Serve with the current version until it has so many thumbs; return them."""
        version = self.take()
        enough = self.service.thumbs + thumbs
        while self.service.thumbs < enough:
            self.service.serve(_REQUESTS_AT_ONCE, version)
        with reading(self.store) as connection:
            everybody = self.config.round.model_copy(update={"max_user_factor": _NO_LIMIT})
            data = dataset.read(connection, DEFAULT_POLICY, version, everybody)
        return [
            t for t in data.new_thumbs if t.sample and t.sample.policy_version == version.version
        ]

    def candidates(self) -> Candidates:
        """Sample one reply to every held-out prompt from the current version's policy, and judge it."""
        self.take()
        prompts = [self.service.render(text) for text in self._held_out]
        samples = self.service.sample(prompts, _EXAMINATION_SEED)
        texts = [self.service.text_of(s.token_ids) for s in samples]
        likes = [self.prefers(p, text) for p, text in zip(self._held_out, texts, strict=True)]
        replies = [(p, s.token_ids) for p, s in zip(prompts, samples, strict=True)]
        return Candidates(texts, replies, likes)

    def examine(self) -> Examined:
        """Judge the current version's policy, and its reward model, which is kept in `judged`."""
        version, found = self.current, self.candidates()
        if version.reward_digest:
            rewards = reward.score(self.assembly.trunk, found.replies).tolist()
            claims = Calibration.of(version.metrics).probabilities(rewards).tolist()
            self.judged.append(JudgedRewards(rewards, claims, found.likes))
        n = len(found.texts)
        return Examined(
            version=version.version,
            thumbs=self.service.thumbs,
            rate=sum(found.likes) / n,
            well_formed=sum(map(is_well_formed, found.texts)) / n,
            mean_tokens=sum(len(response) for _, response in found.replies) / n,
        )


def learn(
    setting: Setting,
    *,
    rounds: int | None = None,
    thumbs: int | None = None,
    trainer: Trainer | None = None,
) -> dict[str, Any]:
    """Learn from version 0 for some rounds, or until some thumbs were given.

    Returns every version as it was examined, one for each round, how rounds ended, and how good the versions'
    reward models are together.
    """
    with Run(setting, trainer=trainer) as run:
        examined, ended = [run.examine()], list[Learned]()
        while not (len(ended) == rounds if thumbs is None else run.service.thumbs >= thumbs):
            ended.append(run.round())
            examined.append(run.examine() if ended[-1].version is not None else examined[-1])
        return {
            "examined": [asdict(each) for each in examined],
            "rounds": [asdict(each) for each in ended],
            "thumbs": run.service.thumbs,
            "reward": quality(run.judged, setting.crowd.noise)._asdict(),
        }
