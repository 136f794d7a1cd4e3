"""A sequence-classification model as a reward model: its own numbers, whatever the batch."""

import asyncio
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertTokenizer,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from server.engine.classifier import MAX_BATCH, ClassifierScorer
from server.reading import Reading
from server.rewards import make_scorer
from tests.serving import until
from thumbloop.config.shared import RewardComponent
from thumbloop.errors import ScorerUnavailable, SettingsError
from thumbloop.types import Message, Prompt, Role

TEXTS = ["good", "bad bad bad", "the film was fine and the soup was not", "x"]
QUESTION = "How was it?"
LONGEST = 96
LONG = "the soup of the day was cold " * 20


def build(folder: Path, tiny_model: Path, labels: int = 1) -> Path:
    """Write a decoder with a chat template."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(labels)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LONGEST,
        num_labels=labels,
        pad_token_id=0,
        initializer_range=0.5,
    )
    LlamaForSequenceClassification(config).save_pretrained(folder)
    return folder


def build_encoder(folder: Path, _tiny_model: Path) -> Path:
    """Write an encoder that reads pairs of texts, letter by letter."""
    letters = "abcdefghijklmnopqrstuvwxyz?"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{x}" for x in letters)]
    BertTokenizer(vocab={word: i for i, word in enumerate(words)}).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LONGEST,
        num_labels=1,
        initializer_range=0.5,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


Build = Callable[[Path, Path], Path]
MODELS: dict[str, Build] = {
    "one label": partial(build, labels=1),
    "two labels": partial(build, labels=2),
    "an encoder": build_encoder,
}


def reading(text: str, question: str = QUESTION) -> Reading:
    turns = (Message(Role.USER, question),)
    return Reading(Prompt(messages=turns), (1,), (2,), text)


def rendered(folder: Path, text: str, question: str = QUESTION) -> Any:
    """Return a conversation as the model's own template writes it, encoded."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    said = [{"role": "user", "content": question}, {"role": "assistant", "content": text}]
    whole = tokenizer.apply_chat_template(said, tokenize=False)
    return tokenizer(whole, add_special_tokens=False, return_tensors="pt")


def expected(folder: Path, text: str) -> float:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    is_chat = tokenizer.chat_template is not None
    pair = tokenizer(QUESTION, text, return_tensors="pt")
    with torch.no_grad():
        (logits,) = model(**(rendered(folder, text) if is_chat else pair)).logits
    return float(logits[0] if len(logits) == 1 else logits[1] - logits[0])


async def read_of(scorer: ClassifierScorer, given: Reading) -> list[int]:
    """Return the token ids that the model is given to read."""
    seen: list[list[int]] = []

    def note(_model: object, _arguments: object, inputs: dict[str, torch.Tensor]) -> None:
        seen.append(inputs["input_ids"][0].tolist())

    hook = scorer._model.register_forward_pre_hook(note, with_kwargs=True)
    await scorer.score(given, None)
    hook.remove()
    (ids,) = seen
    return ids


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
async def test_a_reward_is_the_models_logit_alone_and_in_a_batch(tmp_path, tiny_model, make: Build):
    folder = make(tmp_path / "model", tiny_model)
    scorer = ClassifierScorer(folder, "rewards.safety.path")
    texts = TEXTS * (1 + MAX_BATCH // len(TEXTS))
    together = await asyncio.gather(*(scorer.score(reading(t), None) for t in texts))
    wanted = [expected(folder, text) for text in TEXTS]
    assert together[: len(TEXTS)] == pytest.approx(wanted, abs=1e-5)
    assert together[-len(TEXTS) :] == pytest.approx(wanted, abs=1e-5)
    assert len(set(wanted)) == len(TEXTS)
    alone = await scorer.score(reading(TEXTS[1]), None)
    assert alone == pytest.approx(wanted[1], abs=1e-5)
    text = Reading(Prompt(text="the film"), (1,), (2,), "was good")
    assert await scorer.score(text, None) != pytest.approx(alone)


async def test_of_a_long_conversation_the_end_is_read(tmp_path, tiny_model):
    folder = build(tmp_path / "model", tiny_model)
    scorer = ClassifierScorer(folder, "rewards.safety.path")
    whole = rendered(folder, "good", LONG)["input_ids"][0].tolist()
    assert len(whole) > LONGEST
    assert await read_of(scorer, reading("good", LONG)) == whole[-LONGEST:]
    rewards = [await scorer.score(reading(text, LONG), None) for text in TEXTS]
    assert len(set(rewards)) == len(TEXTS)


@pytest.mark.parametrize("said", ["was good", "was good " * 8], ids=["short", "long"])
async def test_of_a_long_pair_the_reply_is_read_whole_behind_the_prompts_end(
    tmp_path, tiny_model, said: str
):
    folder = build_encoder(tmp_path / "model", tiny_model)
    scorer = ClassifierScorer(folder, "rewards.safety.path")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer.encode(LONG, add_special_tokens=False)
    reply = tokenizer.encode(said, add_special_tokens=False)
    begin, end = tokenizer.cls_token_id, tokenizer.sep_token_id
    whole = [begin, *prompt[len(reply) + 3 - LONGEST :], end, *reply, end]
    assert len(whole) == LONGEST
    assert await read_of(scorer, Reading(Prompt(text=LONG), (1,), (2,), said)) == whole
    assert await read_of(scorer, reading(said, LONG)) == whole


async def test_of_a_reply_that_is_too_long_by_itself_the_end_is_read(tmp_path, tiny_model):
    folder = build_encoder(tmp_path / "model", tiny_model)
    scorer = ClassifierScorer(folder, "rewards.safety.path")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    reply = tokenizer.encode(LONG + "but good", add_special_tokens=False)
    read = await read_of(scorer, Reading(Prompt(text="soup"), (1,), (2,), LONG + "but good"))
    assert len(read) == LONGEST
    assert read[-40:] == [*reply[-39:], tokenizer.sep_token_id]


async def test_what_a_template_wrote_gets_no_second_bos(tmp_path, tiny_model):
    folder = build(tmp_path / "model", tiny_model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"bos_token": "<|system|>"})
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|system|> $A", pair="<|system|> $A $B", special_tokens=[("<|system|>", bos)]
    )
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    tokenizer.save_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder).encode("x")[0] == bos  # it adds one by itself
    scorer = ClassifierScorer(folder, "rewards.safety.path")
    for given in (reading("good"), Reading(Prompt(text="the film"), (1,), (2,), "was good")):
        read = await read_of(scorer, given)
        assert read[0] == bos
        assert read.count(bos) == 1


async def test_it_reads_on_as_many_threads_as_it_is_given(tmp_path, tiny_model, monkeypatch):
    component = RewardComponent(
        kind="classifier", weight=1, path=str(build(tmp_path / "model", tiny_model)), threads=3
    )
    given: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    engine: Any = None
    verdict: Any = None
    scorer = make_scorer({"safety": component}, engine, verdict)
    await scorer.score(reading("good"), None)
    assert given == [3]


async def test_a_model_that_fails_tells_everybody_who_waits_and_goes_on(tmp_path, tiny_model):
    scorer = ClassifierScorer(build(tmp_path / "model", tiny_model), "rewards.safety.path")
    model, scorer._model = scorer._model, None
    ends = await asyncio.gather(
        *(scorer.score(reading(t), None) for t in TEXTS), return_exceptions=True
    )
    assert [type(end) for end in ends] == [ScorerUnavailable] * len(TEXTS)
    scorer._model = model
    assert isinstance(await scorer.score(reading("good"), None), float)


async def test_a_template_that_refuses_a_conversation_is_no_reward(tmp_path, tiny_model):
    scorer = ClassifierScorer(build(tmp_path / "model", tiny_model), "rewards.safety.path")
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turns') }}"
    scorer._tokenizer.chat_template = template + "{% endif %}{{ messages[0].content }}"
    turns = (Message(Role.SYSTEM, "Be kind."), Message(Role.USER, QUESTION))
    with pytest.raises(ScorerUnavailable, match="no system turns"):
        await scorer.score(Reading(Prompt(messages=turns), (1,), (2,), "good"), None)
    assert isinstance(await scorer.score(reading("good"), None), float)


async def test_what_nobody_waits_for_any_more_is_not_read(tmp_path, tiny_model):
    scorer = ClassifierScorer(build(tmp_path / "model", tiny_model), "rewards.safety.path")
    read: list[int] = []
    rewards = scorer._rewards
    scorer._rewards = lambda texts: read.append(len(texts)) or rewards(texts)  # type: ignore
    tasks = [asyncio.create_task(scorer.score(reading(t), None)) for t in TEXTS * MAX_BATCH]
    await until(lambda: read)
    for task in tasks[MAX_BATCH:-1]:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert read == [MAX_BATCH, 1]


async def test_callers_that_go_away_do_not_disturb_the_others(tmp_path, tiny_model):
    scorer = ClassifierScorer(build(tmp_path / "model", tiny_model), "rewards.safety.path")
    tasks = [asyncio.create_task(scorer.score(reading(t), None)) for t in TEXTS]
    await asyncio.sleep(0)
    tasks[0].cancel()
    assert all(isinstance(end, float) for end in await asyncio.gather(*tasks[1:]))


def test_too_many_labels_are_refused(tmp_path, tiny_model):
    folder = build(tmp_path / "model", tiny_model, 3)
    with pytest.raises(SettingsError, match=r"rewards\.mood\.path: .*3 labels"):
        ClassifierScorer(folder, "rewards.mood.path")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", "{broken"),
        ("config.json", "[]"),
        ("config.json", json.dumps({"architectures": ["LlamaForSequenceClassification"]})),
        ("model.safetensors", None),
        ("model.safetensors", "no tensors"),
        ("tokenizer.json", None),
        ("tokenizer.json", "{broken"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused_by_the_settings_name(
    tmp_path, tiny_model, file: str, content: str | None
):
    folder = build(tmp_path / "model", tiny_model)
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_text(content)
    with pytest.raises(SettingsError, match=rf"rewards\.mood\.path: {folder} cannot be loaded: .+"):
        ClassifierScorer(folder, "rewards.mood.path")


def test_weights_without_the_head_that_judges_are_refused(tmp_path, tiny_model):
    folder = build(tmp_path / "model", tiny_model)
    weights = load_file(folder / "model.safetensors")
    del weights["score.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        SettingsError, match=r"rewards\.mood\.path: .* lacks weights: score\.weight"
    ):
        ClassifierScorer(folder, "rewards.mood.path")
