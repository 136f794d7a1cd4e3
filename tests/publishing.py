"""Publishes policy versions without the trainer: random adapters, probes, a folder, a row.

Who speaks for a version, real model or fake engine, is a `Speaker`.
"""

import functools
import json
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch
from peft import PeftModel
from safetensors.torch import save_file
from sqlalchemy import Engine as Database
from transformers import AutoModelForCausalLM

from server.engine import zero_adapter
from tests.fakes import BASE, FakeEngine, logprob, weights_in
from tests.serving import Running
from thumbloop import artifacts
from thumbloop.artifacts import AdapterFacts, Lineage, Manifest, Probe, VerdictIdentity
from thumbloop.base_model import identify
from thumbloop.config import State, Verdict
from thumbloop.rendering import VerdictTokens, verdict_tokens
from thumbloop.store import versions
from thumbloop.types import DEFAULT_POLICY, PolicyVersion, Round, Sampling

RANK = 4
ALPHA = 8.0
PROMPT_LENGTHS = (3, 40, 70)  # short, and longer than one and two KV blocks
CONTINUATION = 5

Fill = Callable[[Path], None]

linear_shapes = functools.cache(zero_adapter.linear_shapes)


class Speaker(Protocol):
    """Says what an adapter's folder makes of the base model; None is the base model itself."""

    def continue_greedily(self, folder: Path | None, prompt: Sequence[int]) -> tuple[int, ...]:
        """Return up to CONTINUATION tokens."""

    def logprobs(
        self, folder: Path | None, prompt: Sequence[int], continuation: Sequence[int]
    ) -> tuple[float, ...]:
        """Return the log-probability of each token of the continuation, nats."""

    def next_logprobs(
        self, folder: Path | None, prompt: Sequence[int], tokens: Sequence[int]
    ) -> tuple[float, ...]:
        """Return the log-probabilities of these tokens right after the prompt, nats."""


class RealSpeaker:
    """transformers and PEFT, float32."""

    def __init__(self, model: Path) -> None:
        self._model = model
        self._loaded: dict[Path | None, torch.nn.Module] = {}

    def continue_greedily(self, folder: Path | None, prompt: Sequence[int]) -> tuple[int, ...]:
        tokens: list[int] = []
        while len(tokens) < CONTINUATION and 1 not in tokens:
            tokens.append(int(self._log_softmax(folder, [*prompt, *tokens])[-1].argmax()))
        return tuple(tokens)

    def logprobs(
        self, folder: Path | None, prompt: Sequence[int], continuation: Sequence[int]
    ) -> tuple[float, ...]:
        numbers = self._log_softmax(folder, [*prompt, *continuation])
        before = numbers[len(prompt) - 1 : -1]
        return tuple(before.gather(1, torch.tensor(continuation)[:, None])[:, 0].tolist())

    def next_logprobs(
        self, folder: Path | None, prompt: Sequence[int], tokens: Sequence[int]
    ) -> tuple[float, ...]:
        return tuple(self._log_softmax(folder, prompt)[-1, list(tokens)].tolist())

    @torch.inference_mode()
    def _log_softmax(self, folder: Path | None, tokens: Sequence[int]) -> torch.Tensor:
        """Return (T, V) log-probabilities of the token after each position."""
        if folder not in self._loaded:
            model = AutoModelForCausalLM.from_pretrained(self._model, dtype=torch.float32)
            if folder is not None:
                model = PeftModel.from_pretrained(model, folder)
            self._loaded[folder] = model.eval()
        return self._loaded[folder](torch.tensor([list(tokens)])).logits[0].log_softmax(-1)


class FakeSpeaker:
    """What the fake engine will say of a folder."""

    def __init__(self, engine: FakeEngine) -> None:
        self._engine = engine

    def continue_greedily(self, folder: Path | None, prompt: Sequence[int]) -> tuple[int, ...]:
        greedy = Sampling(max_tokens=CONTINUATION, temperature=0.0)
        return self._engine.speak(_weights(folder), prompt, greedy).token_ids

    def logprobs(
        self, folder: Path | None, prompt: Sequence[int], continuation: Sequence[int]
    ) -> tuple[float, ...]:
        return tuple(
            logprob(_weights(folder), [*prompt, *continuation[:i]], token)
            for i, token in enumerate(continuation)
        )

    def next_logprobs(
        self, folder: Path | None, prompt: Sequence[int], tokens: Sequence[int]
    ) -> tuple[float, ...]:
        return tuple(logprob(_weights(folder), prompt, token) for token in tokens)


def _weights(folder: Path | None) -> str:
    return BASE if folder is None else weights_in(folder)


class Publisher:
    """Writes versions of the default policy, as a trainer would.

    For versions that are wrong: `spoil` gets the folder when its probes are made and before it is
    sealed, `alter` the manifest before it is written.
    """

    def __init__(
        self,
        model: Path,
        folder: Path,
        database: Database | None,
        verdict: VerdictTokens,
        speaker: Speaker,
    ) -> None:
        self._model = model
        self._folder = folder
        self._database = database
        self._verdict = verdict
        self._speaker = speaker

    def write(
        self,
        version: int,
        parent: int = 0,
        *,
        scale: float = 0.2,
        is_policy_unchanged: bool = False,
        alter: Callable[[Manifest], Manifest] = lambda manifest: manifest,
        spoil: Fill = lambda _folder: None,
    ) -> PolicyVersion:
        """Write a version's folder; the row that it returns is not yet in the store."""
        draft = self._folder / f".draft-{uuid.uuid4().hex}"
        before = self._folder / artifacts.folder_of(DEFAULT_POLICY, parent) if parent else None
        for number, role in enumerate((artifacts.POLICY, artifacts.REWARD)):
            source = before / role / artifacts.WEIGHTS if before else None
            keeps = is_policy_unchanged and role == artifacts.POLICY
            write_adapter(
                self._model,
                draft / role,
                scale=0.0 if keeps else scale,
                seed=2 * version + number,
                weights=source if keeps else None,
            )
        probes = tuple(
            self._probe(draft, before, prompt) for prompt in probe_prompts(version, self._verdict)
        )
        spoil(draft)
        manifest = alter(self._manifest(version, parent, draft, probes, is_policy_unchanged))
        written = artifacts.write_version(
            self._folder, manifest.policy, version, lambda folder: _move(draft, folder, manifest)
        )
        return PolicyVersion(
            policy=DEFAULT_POLICY,
            version=version,
            parent=parent,
            folder=written.folder,
            policy_digest=_digest(manifest.policy_adapter),
            reward_digest=_digest(manifest.reward_adapter),
            manifest_digest=written.manifest_digest,
            published_at=time.time(),
            round_id=str(uuid.uuid4()),
            feedback_count=1,
            metrics={"reward_auroc": 0.9},
        )

    def publish(
        self,
        version: int,
        parent: int = 0,
        *,
        new_feedback: tuple[int, ...] = (),
        **options: object,
    ) -> PolicyVersion:
        """Write a version and insert its row; options are those of `write`."""
        row = self.write(version, parent, **options)  # type: ignore[arg-type]
        self.insert(row, new_feedback)
        return row

    def insert(self, row: PolicyVersion, new_feedback: tuple[int, ...] = ()) -> None:
        """Make a written version visible; `new_feedback` are the thumbs that it learned from."""
        assert self._database is not None
        assert row.round_id is not None
        assert row.parent is not None
        now = time.time()
        done = Round(
            row.round_id,
            row.policy,
            row.parent,
            now,
            now,
            row.version,
            "published",
            row.metrics,
            new_feedback,
        )
        with self._database.begin() as connection:
            versions.finish_round(connection, done, row)

    def _manifest(
        self,
        version: int,
        parent: int,
        draft: Path,
        probes: tuple[Probe, ...],
        is_policy_unchanged: bool,
    ) -> Manifest:
        changed = [
            abs(a - b) for p in probes for a, b in zip(p.logprobs, p.parent_logprobs, strict=True)
        ]
        rewards = [abs(p.reward - (p.parent_reward or 0.0)) for p in probes]
        return Manifest(
            policy=DEFAULT_POLICY,
            version=version,
            parent=parent,
            created_at=time.time(),
            base_model=identify(self._model),
            verdict=VerdictIdentity(
                prompt=self._verdict.prompt, up=self._verdict.up, down=self._verdict.down
            ),
            policy_adapter=self._facts(
                draft / artifacts.POLICY,
                None if is_policy_unchanged else sum(changed) / len(changed),
            ),
            reward_adapter=self._facts(draft / artifacts.REWARD, sum(rewards) / len(rewards)),
            probes=probes,
            lineage=Lineage(
                round_id="r",
                feedback_count=1,
                first_feedback_id=1,
                last_feedback_id=1,
                rollout_candidates=4,
            ),
        )

    def _probe(self, draft: Path, before: Path | None, prompt: tuple[int, ...]) -> Probe:
        policy, parent = draft / artifacts.POLICY, before / artifacts.POLICY if before else None
        continuation = self._speaker.continue_greedily(policy, prompt)
        read = self._verdict.wrap(prompt, continuation)
        return Probe(
            prompt=prompt,
            continuation=continuation,
            logprobs=self._speaker.logprobs(policy, prompt, continuation),
            parent_logprobs=self._speaker.logprobs(parent, prompt, continuation),
            reward=self._reward(draft / artifacts.REWARD, read),
            parent_reward=self._reward(before / artifacts.REWARD if before else None, read),
        )

    def _facts(self, folder: Path, distance: float | None) -> AdapterFacts:
        return AdapterFacts(
            digest=artifacts.file_digest(folder / artifacts.WEIGHTS),
            rank=RANK,
            alpha=ALPHA,
            target_modules=target_modules(self._model),
            distance=distance,
        )

    def _reward(self, folder: Path | None, read: Sequence[int]) -> float:
        up, down = self._speaker.next_logprobs(folder, read, (self._verdict.up, self._verdict.down))
        return up - down


def publisher_of(server: Running, model: Path, state: State) -> Publisher:
    """Return what publishes to a server with a fake engine."""
    verdict = verdict_tokens(Verdict(), server.engine.tokenizer)
    return Publisher(model, state.versions, server.database, verdict, FakeSpeaker(server.engine))


def probe_prompts(seed: int, verdict: VerdictTokens) -> list[tuple[int, ...]]:
    """Return random prompts of plain tokens."""
    generator = torch.Generator().manual_seed(seed)
    first = max(verdict.up, verdict.down) + 1
    return [
        tuple(torch.randint(first, 290, (length,), generator=generator).tolist())
        for length in PROMPT_LENGTHS
    ]


def write_adapter(
    model: Path, folder: Path, *, scale: float, seed: int, weights: Path | None = None
) -> None:
    """Write an adapter in PEFT's layout: random for every linear layer, or a copy of `weights`.

    `scale` is the standard deviation of B's entries; A's are those of a unit-norm projection.
    """
    generator = torch.Generator().manual_seed(seed)
    shapes = linear_shapes(model)
    tensors = {}
    for name, (outputs, inputs) in shapes.items():
        a = torch.randn(RANK, inputs, generator=generator) / inputs**0.5
        b = torch.randn(outputs, RANK, generator=generator) * scale
        tensors[f"base_model.model.{name}.lora_A.weight"] = a
        tensors[f"base_model.model.{name}.lora_B.weight"] = b
    folder.mkdir(parents=True)
    if weights is None:
        save_file(tensors, folder / artifacts.WEIGHTS)
    else:
        (folder / artifacts.WEIGHTS).write_bytes(weights.read_bytes())
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.0,
        "bias": "none",
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_rslora": False,
        "use_dora": False,
        "target_modules": target_modules(model),
    }
    (folder / artifacts.ADAPTER_CONFIG).write_text(json.dumps(config))


def target_modules(model: Path) -> tuple[str, ...]:
    """Return the last part of the name of every linear layer but the head."""
    return tuple(sorted({name.rpartition(".")[2] for name in linear_shapes(model)}))


def _digest(facts: AdapterFacts | None) -> str:
    return facts.digest if facts else ""


def _move(draft: Path, folder: Path, manifest: Manifest) -> Manifest:
    for path in draft.iterdir():
        path.rename(folder / path.name)
    draft.rmdir()
    return manifest
