"""What a scorer gets to read."""

from dataclasses import dataclass

from thumbloop.types import Prompt


@dataclass(frozen=True, slots=True)
class Reading:
    """A prompt and a response, as tokens and as text."""

    prompt: Prompt
    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    text: str
