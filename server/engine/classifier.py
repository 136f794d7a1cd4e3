"""Any sequence-classification model of Hugging Face as a reward model, with a batching loop of its own."""

import asyncio
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from server.engine.protocol import REPLY_PRIORITY, Adapter
from server.reading import Reading
from thumbloop.errors import ScorerUnavailable, SettingsError

log = logging.getLogger(__name__)

KIND = "ForSequenceClassification"
MAX_BATCH = 32
_UNLIMITED = 1 << 30
"""Tokens; tokenizers that know no limit say 1e30, too much for their own truncation."""


class _Waiting(NamedTuple):
    texts: tuple[str, str | None]
    reward: "asyncio.Future[float]"


def _deliver(batch: Sequence[_Waiting], outcomes: Sequence[float | ScorerUnavailable]) -> None:
    """Hand each caller its reward or the failure; who went away is passed over."""
    for waiting, outcome in zip(batch, outcomes, strict=True):
        if waiting.reward.done():
            continue
        if isinstance(outcome, ScorerUnavailable):
            waiting.reward.set_exception(outcome)
        else:
            waiting.reward.set_result(outcome)


@contextmanager
def _loading(folder: Path, setting: str) -> Iterator[None]:
    """Name the setting in whatever goes wrong with a folder. Raises SettingsError."""
    try:
        yield
    except Exception as error:  # of many kinds: no JSON, no tensors, no file, a shape that is wrong
        words = " ".join(str(error).split())[:200]
        raise SettingsError(f"{setting}: {folder} cannot be loaded: {words}") from None


def _open(folder: Path, setting: str) -> tuple[Any, Any]:
    """Return a folder's model and tokenizer. Raises SettingsError: it is no such model, or not whole."""
    if not (folder / "config.json").is_file():
        raise SettingsError(f"{setting}: {folder} is no model folder (it has no config.json)")
    with _loading(folder, setting):
        config = AutoConfig.from_pretrained(folder)
    kinds = config.architectures or ["no architecture"]
    if not kinds[0].endswith(KIND):
        raise SettingsError(f"{setting}: {folder} holds a {kinds[0]}, expected one …{KIND}")
    if config.num_labels > 2:
        raise SettingsError(f"{setting}: {folder} has {config.num_labels} labels, expected 1 or 2")
    with _loading(folder, setting):
        model, found = AutoModelForSequenceClassification.from_pretrained(
            folder, output_loading_info=True
        )
        # Whatever is too long loses its beginning: the reply stands at the end.
        tokenizer = AutoTokenizer.from_pretrained(folder, truncation_side="left")
    if missing := sorted(found["missing_keys"]):  # transformers draws them at random
        raise SettingsError(f"{setting}: {folder} lacks weights: {', '.join(missing[:3])}")
    return model.eval(), tokenizer


class ClassifierScorer:
    """Reads prompt and reply with a tokenizer of its own. One label: its logit is the reward; two: the
    difference of their logits, second minus first. Whatever waits is read in one batch.
    """

    def __init__(self, folder: Path, setting: str, *, threads: int = 1) -> None:
        """Load the model; `setting` names it in errors. Raises SettingsError: it is no such model."""
        self._model, self._tokenizer = _open(folder, setting)
        positions = getattr(self._model.config, "max_position_embeddings", None) or _UNLIMITED
        self._longest = int(min(positions, self._tokenizer.model_max_length, _UNLIMITED))
        self._threads = threads
        self._waiting: list[_Waiting] = []
        self._reader: asyncio.Task[None] | None = None

    def can_score(self, _adapter: Adapter | None) -> bool:
        """Always: it does not change from version to version."""
        return True

    async def score(
        self, reading: Reading, _adapter: Adapter | None, _priority: int = REPLY_PRIORITY
    ) -> float:
        """Return the reward; see Scorer. Raises ScorerUnavailable."""
        reward: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Waiting(self._texts(reading), reward))
        if self._reader is None or self._reader.done():
            self._reader = asyncio.create_task(self._read())
        return await reward

    async def _read(self) -> None:
        """Read batches until nobody waits."""
        while waiting := [w for w in self._waiting if not w.reward.done()]:  # some went away
            batch, self._waiting = waiting[:MAX_BATCH], waiting[MAX_BATCH:]
            try:
                rewards = await asyncio.to_thread(self._rewards, [w.texts for w in batch])
            except Exception as error:  # whatever a foreign model raises, replies come without it
                log.exception("the reward model failed")
                kind = type(error).__name__  # what it says may quote what was read
                _deliver(
                    batch, [ScorerUnavailable(f"the reward model failed: {kind}")] * len(batch)
                )
            else:
                _deliver(batch, rewards)

    def _texts(self, reading: Reading) -> tuple[str, str | None]:
        """Return what is read: the rendered conversation, or a pair of texts."""
        prompt = reading.prompt
        if prompt.text is not None:
            return prompt.text, reading.text
        turns = [{"role": m.role.value, "content": m.content} for m in prompt.messages]
        if self._tokenizer.chat_template:
            turns.append({"role": "assistant", "content": reading.text})
            try:
                return str(self._tokenizer.apply_chat_template(turns, tokenize=False)), None
            except Exception as error:  # a template may refuse roles, and is foreign code
                raise ScorerUnavailable(f"the reward model's chat template: {error}") from None
        return "\n".join(turn["content"] for turn in turns), reading.text

    @torch.inference_mode()
    def _rewards(self, texts: list[tuple[str, str | None]]) -> list[float]:
        torch.set_num_threads(self._threads)  # torch's setting holds for the thread that calls
        encoded = [self._encode(first, second) for first, second in texts]
        can_pad = self._tokenizer.pad_token_id is not None
        batches = [encoded] if can_pad else [[one] for one in encoded]
        return [reward for batch in batches for reward in self._rewards_of(batch)]

    def _encode(self, first: str, second: str | None) -> Any:
        """Return the model's input. Where it is too long, the beginning of the prompt is left out."""
        tokenizer, longest = self._tokenizer, self._longest
        if second is None:  # a template writes the special tokens itself, BOS among them
            return tokenizer(first, add_special_tokens=False, truncation=True, max_length=longest)
        reply = tokenizer(second, add_special_tokens=False, verbose=False)
        room = longest - tokenizer.num_special_tokens_to_add(pair=True)
        cut = "only_first" if len(reply["input_ids"]) < room else "longest_first"
        return tokenizer(first, second, truncation=cut, max_length=longest)

    def _rewards_of(self, encoded: list[Any]) -> list[float]:
        logits = self._model(**self._tokenizer.pad(encoded, return_tensors="pt")).logits.float()
        rewards = logits[:, 0] if logits.shape[1] == 1 else logits[:, 1] - logits[:, 0]
        return [float(reward) for reward in rewards]
