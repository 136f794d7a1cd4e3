"""Exchanges of the corpus as token sequences: chats, plain texts, verdicts.

A verdict is a thumb drawn by coin, so that the base model knows the format and prefers nothing, or
a word that is true of the reply, so that it reads the reply before it judges. Without such words
the place of the verdict holds no summary, and a reward adapter needs three times as many thumbs.
"""

import random
import re
from collections.abc import Sequence

from transformers import PreTrainedTokenizerFast

from demo.corpus import Exchange
from demo.pretraining import NO_LOSS, Example
from demo.tokenizer import ASSISTANT, END, SYSTEM, USER, VERDICT_DOWN, VERDICT_PROMPT, VERDICT_UP

SYSTEM_PROMPTS = ("You review films, food, books and services.", "You are a helpful assistant.")
SYSTEM_SHARE = 0.08
TEXT_SHARE = 0.06
"""Share of prompts without chat turns, which the reply simply continues."""
SECOND_TURN_SHARE = 0.06
VERDICT_SHARE = 0.8
"""Share of conversations that end in a verdict."""
THUMB_SHARE, TRAIT_SHARE = 0.3, 0.45
"""Shares of verdicts that are a thumb and that name a trait; the others quote a word."""
_WORD = re.compile(r"[A-Za-z]+")


def converse(
    exchanges: Sequence[Exchange], tokenizer: PreTrainedTokenizerFast, rng: random.Random
) -> list[Example]:
    """Turn exchanges into examples; a share of them in two turns of one conversation."""
    examples = []
    waiting = iter(exchanges)
    for exchange in waiting:
        turns = [exchange]
        if rng.random() < SECOND_TURN_SHARE:
            turns += [second] if (second := next(waiting, None)) else []
        examples.append(_example(_parts(turns, rng), tokenizer))
    return examples


def _parts(turns: Sequence[Exchange], rng: random.Random) -> list[tuple[str, bool]]:
    """Pieces of text, each with whether it is learned or only read."""
    if len(turns) == 1 and rng.random() < TEXT_SHARE:
        parts = [(turns[0].prompt, False), (f" {turns[0].reply}{END}", True)]
    else:
        parts = [(f"{SYSTEM}{rng.choice(SYSTEM_PROMPTS)}{END}", False)] * (
            rng.random() < SYSTEM_SHARE
        )
        for turn in turns:
            parts += [(f"{USER}{turn.prompt}{END}{ASSISTANT}", False), (f"{turn.reply}{END}", True)]
    if rng.random() < VERDICT_SHARE:
        parts += [(VERDICT_PROMPT, False), (_verdict(turns[-1], rng), True)]
    return parts


def _verdict(exchange: Exchange, rng: random.Random) -> str:
    """A thumb by coin, or one word that is true of the reply."""
    draw = rng.random()
    if draw < THUMB_SHARE:
        return rng.choice((VERDICT_UP, VERDICT_DOWN))
    if draw < THUMB_SHARE + TRAIT_SHARE:
        return f" {rng.choice(exchange.traits)}"
    return f" {rng.choice(_WORD.findall(exchange.reply))}"


def _example(parts: Sequence[tuple[str, bool]], tokenizer: PreTrainedTokenizerFast) -> Example:
    example = Example([], [])
    for text, is_learned in parts:
        ids = tokenizer.encode(text, add_special_tokens=False)
        example.ids.extend(ids)
        example.labels.extend(ids if is_learned else [NO_LOSS] * len(ids))
    return example
