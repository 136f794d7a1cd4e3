"""A sequence-classification model as a reward model: its own numbers, whatever the batch."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from server.engine.classifier import MAX_BATCH, ClassifierScorer
from server.reading import Reading
from server.rewards import make_scorer
from thumbloop.config.server import RewardComponent
from thumbloop.errors import ScorerUnavailable, SettingsError
from thumbloop.types import Message, Prompt, Role

TEXTS = ["good", "bad bad bad", "the film was fine and the soup was not", "x"]


def build(folder: Path, tiny_model: Path, labels: int) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(labels)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_labels=labels,
        pad_token_id=0,
        initializer_range=0.5,
    )
    LlamaForSequenceClassification(config).save_pretrained(folder)
    return folder


def reading(text: str) -> Reading:
    turns = (Message(Role.USER, "How was it?"),)
    return Reading(Prompt(messages=turns), (1,), (2,), text)


def expected(folder: Path, text: str, labels: int) -> float:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = LlamaForSequenceClassification.from_pretrained(folder)
    said = [
        {"role": "user", "content": "How was it?"},
        {"role": "assistant", "content": text},
    ]
    rendered = tokenizer.apply_chat_template(said, tokenize=False)
    with torch.no_grad():
        (logits,) = model(**tokenizer(rendered, return_tensors="pt")).logits
    return float(logits[0] if labels == 1 else logits[1] - logits[0])


@pytest.mark.parametrize("labels", [1, 2])
async def test_a_reward_is_the_models_logit_alone_and_in_a_batch(tmp_path, tiny_model, labels):
    folder = build(tmp_path / "model", tiny_model, labels)
    scorer = ClassifierScorer(folder, "rewards.safety.path")
    texts = TEXTS * (1 + MAX_BATCH // len(TEXTS))
    together = await asyncio.gather(*(scorer.score(reading(t), None) for t in texts))
    wanted = [expected(folder, text, labels) for text in TEXTS]
    assert together[: len(TEXTS)] == pytest.approx(wanted, abs=1e-5)
    assert together[-len(TEXTS) :] == pytest.approx(wanted, abs=1e-5)
    assert len(set(wanted)) == len(TEXTS)
    alone = await scorer.score(reading(TEXTS[1]), None)
    assert alone == pytest.approx(wanted[1], abs=1e-5)
    text = Reading(Prompt(text="the film"), (1,), (2,), "was good")
    assert await scorer.score(text, None) != pytest.approx(alone)


async def test_it_reads_on_as_many_threads_as_it_is_given(tmp_path, tiny_model, monkeypatch):
    component = RewardComponent(
        kind="classifier", weight=1, path=str(build(tmp_path / "model", tiny_model, 1)), threads=3
    )
    given: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    engine: Any = None
    verdict: Any = None
    scorer = make_scorer({"safety": component}, engine, verdict)
    await scorer.score(reading("good"), None)
    assert given == [3]


async def test_a_model_that_fails_tells_everybody_who_waits_and_goes_on(tmp_path, tiny_model):
    scorer = ClassifierScorer(build(tmp_path / "model", tiny_model, 1), "rewards.safety.path")
    model, scorer._model = scorer._model, None
    ends = await asyncio.gather(
        *(scorer.score(reading(t), None) for t in TEXTS), return_exceptions=True
    )
    assert [type(end) for end in ends] == [ScorerUnavailable] * len(TEXTS)
    scorer._model = model
    assert isinstance(await scorer.score(reading("good"), None), float)


async def test_callers_that_go_away_do_not_disturb_the_others(tmp_path, tiny_model):
    scorer = ClassifierScorer(build(tmp_path / "model", tiny_model, 1), "rewards.safety.path")
    tasks = [asyncio.create_task(scorer.score(reading(t), None)) for t in TEXTS]
    await asyncio.sleep(0)
    tasks[0].cancel()
    assert all(isinstance(end, float) for end in await asyncio.gather(*tasks[1:]))


def test_too_many_labels_are_refused(tmp_path, tiny_model):
    folder = build(tmp_path / "model", tiny_model, 3)
    with pytest.raises(SettingsError, match=r"rewards\.mood\.path: .*3 labels"):
        ClassifierScorer(folder, "rewards.mood.path")
