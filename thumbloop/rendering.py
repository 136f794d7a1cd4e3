"""Prompt -> token ids, and the reward model's verdict prompt: the one place that renders.

What users write is encoded without special tokens, so nobody can write a turn or a verdict.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

from jinja2 import TemplateError

from thumbloop.config import Verdict
from thumbloop.errors import InvalidRequest, SettingsError
from thumbloop.types import Message, Prompt

OWN_VERDICT = ("<|verdict|>", "<|up|>", "<|down|>")
WORDED_VERDICT = ("\n\nWas this a good reply? Answer yes or no:", " yes", " no")

_INCOMPLETE = "\ufffd"  # what a character decodes to whose bytes are not all there
_PLACEHOLDER = re.compile("\ue000(\\d+)\ue001")


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that rendering needs."""

    chat_template: Any
    all_special_ids: list[int]
    eos_token_id: int | None

    def __hash__(self) -> int: ...

    def encode(self, text: str, **options: Any) -> list[int]:
        """Return the text's token ids."""

    def decode(self, token_ids: Sequence[int], **options: Any) -> str:
        """Return the tokens' text."""

    def apply_chat_template(self, conversation: list[dict[str, str]], **options: Any) -> Any:
        """Return the conversation as text."""

    def get_vocab(self) -> dict[str, int]:
        """Return the id of every token."""


@dataclass(frozen=True, slots=True)
class VerdictTokens:
    """The reward model's question as token ids; `is_special` when no text can spell the answers."""

    prompt: tuple[int, ...]
    up: int
    down: int
    is_special: bool

    def wrap(self, prompt: Sequence[int], response: Sequence[int]) -> list[int]:
        """Return what the reward model reads: prompt, response, verdict prompt."""
        return [*prompt, *response, *self.prompt]

    def is_forged_in(self, response: Sequence[int]) -> bool:
        """Say whether a response holds a verdict token that no text can spell."""
        return self.is_special and (self.up in response or self.down in response)


def verdict_tokens(settings: Verdict, tokenizer: Tokenizer) -> VerdictTokens:
    """Return the verdict prompt's and the two answers' token ids.

    Raises SettingsError: an answer is not exactly one token, or both are the same.
    """
    owns = all(token in tokenizer.get_vocab() for token in OWN_VERDICT)
    default = OWN_VERDICT if owns else WORDED_VERDICT
    prompt, up, down = (
        default[i] if text is None else text
        for i, text in enumerate((settings.prompt, settings.up, settings.down))
    )
    up_id = _one_token("verdict.up", up, tokenizer)
    down_id = _one_token("verdict.down", down, tokenizer)
    prompt_ids = tuple(tokenizer.encode(prompt, add_special_tokens=False))
    if up_id == down_id:
        raise SettingsError("verdict.down: has to be another token than verdict.up")
    if not prompt_ids:
        raise SettingsError("verdict.prompt: is empty; give the reward model a question")
    special = set(tokenizer.all_special_ids)
    return VerdictTokens(prompt_ids, up_id, down_id, up_id in special and down_id in special)


def _one_token(setting: str, text: str, tokenizer: Tokenizer) -> int:
    ids = tokenizer.encode(text, add_special_tokens=False)
    if len(ids) != 1:
        raise SettingsError(
            f"{setting}: {text!r} is {len(ids)} tokens of this model; choose a text of exactly one"
        )
    return ids[0]


def render(prompt: Prompt, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the prompt's token ids, generation prompt included for a conversation.

    Raises InvalidRequest: nothing to answer, or a conversation for a model without a chat template.
    """
    if prompt.text is not None:
        if not prompt.text.strip():
            raise InvalidRequest.of("text", "is empty; send something to continue")
        return tuple(tokenizer.encode(prompt.text, split_special_tokens=True))
    return tuple(_render_chat(prompt.messages, tokenizer))


def encode_reply(text: str, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return a whole reply's token ids: its text without special tokens, then the token that ends it, if there is one."""
    ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    end = tokenizer.eos_token_id
    return tuple(ids) if end is None else (*ids, end)


def _render_chat(messages: Sequence[Message], tokenizer: Tokenizer) -> list[int]:
    """Encode the template's own text with special tokens, what people wrote without."""
    if not tokenizer.chat_template:
        raise InvalidRequest.of("chat", "this model has no chat template; send `text` instead")
    try:
        parts = _template(tokenizer, tokenizer.chat_template, tuple(m.role.value for m in messages))
    except TemplateError as error:  # templates refuse what their model was not trained on
        raise InvalidRequest.of("chat", f"this model's chat template says: {error}") from None
    ids: list[int] = []
    for part in parts:
        if isinstance(part, int):
            content = messages[part].content
            ids += tokenizer.encode(content, add_special_tokens=False, split_special_tokens=True)
        else:
            ids += part
    return ids


@lru_cache(maxsize=256)
def _template(
    tokenizer: Tokenizer, _source: Any, roles: tuple[str, ...]
) -> tuple[tuple[int, ...] | int, ...]:
    """Return the template's own token ids, and between them the numbers of the messages.

    It never sees what people wrote, so turns of the same roles need it once; `_source`, its text, is
    only part of the key.
    """
    conversation = [{"role": role, "content": f"\ue000{i}\ue001"} for i, role in enumerate(roles)]
    rendered = tokenizer.apply_chat_template(
        conversation, tokenize=False, add_generation_prompt=True
    )
    pieces = enumerate(_PLACEHOLDER.split(rendered))
    return tuple(
        int(piece) if position % 2 else tuple(tokenizer.encode(piece, add_special_tokens=False))
        for position, piece in pieces
        if piece
    )


class TextStream:
    """A response's text while its tokens arrive: what it has returned stays as it is.

    Decodes the last pieces only, with the piece before them, on which their spacing may depend.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._text = ""
        self._start = 0
        self._end = 0

    def read(self, token_ids: Sequence[int]) -> str:
        """Return as much text as is certain of a response that begins with `token_ids`, all so far.

        A character whose last bytes have not come yet is held back.
        """
        known = text_of(token_ids[self._start : self._end], self._tokenizer)
        now = text_of(token_ids[self._start :], self._tokenizer)
        if len(now) > len(known) and not now.endswith(_INCOMPLETE):
            self._text += now[len(known) :]
            self._start, self._end = self._end, len(token_ids)
        return self._text


def text_of(token_ids: Sequence[int], tokenizer: Tokenizer) -> str:
    """Return a response's text, without special tokens."""
    return tokenizer.decode(list(token_ids), skip_special_tokens=True)
