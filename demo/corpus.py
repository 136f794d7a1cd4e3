"""Prompts and replies written by the corpus grammar: short opinions on films, books, food, services.

Held-out prompts ask about subjects that no training prompt and no corpus conversation names.
"""

import hashlib
import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal

from demo import grammar, lexicon

Sentiment = Literal["praise", "mixed", "complaint"]

HELD_OUT_SHARE = 5
"""One subject in this many is held out."""
SENTIMENTS: dict[Sentiment, float] = {"praise": 0.36, "mixed": 0.28, "complaint": 0.36}
SENTENCES = {1: 0.39, 2: 0.1, 3: 0.26, 4: 0.25}
LENGTH_NAMES = {1: "single", 2: "double", 3: "triple", 4: "fourfold"}
COURTEOUS_SHARE = 0.45
DETAIL_SHARE = 0.3

QUESTIONS = {
    "film": (
        "What did you think of the film {subject}?",
        "Is the film {subject} worth watching?",
        "How was the film {subject}?",
        "Would you recommend the film {subject}?",
        "Please review the film {subject}.",
    ),
    "book": (
        "What did you think of the book {subject}?",
        "Is the book {subject} worth reading?",
        "How was the book {subject}?",
        "Would you recommend the book {subject}?",
        "Please review the book {subject}.",
    ),
    "food": (
        "What did you think of {subject}?",
        "Is {subject} any good?",
        "How was {subject}?",
        "Should I try {subject}?",
        "Please review {subject}.",
    ),
    "service": (
        "What did you think of {subject}?",
        "Can I rely on {subject}?",
        "How was {subject}?",
        "Would you recommend {subject}?",
        "Please review {subject}.",
    ),
}


@dataclass(frozen=True, slots=True)
class Subject:
    """What a prompt asks about."""

    domain: str
    name: str

    @property
    def is_held_out(self) -> bool:
        """Whether no training prompt may name it: decided by its words alone, so it never moves."""
        digest = hashlib.sha256(f"{self.domain}:{self.name}".encode()).digest()
        return digest[0] % HELD_OUT_SHARE == 0


@dataclass(frozen=True, slots=True)
class Exchange:
    """A prompt and one of the many replies the corpus could give to it."""

    prompt: str
    reply: str
    traits: tuple[str, ...]
    """One word each for the reply's tone, number of sentences, manner and detail."""


@cache
def subjects() -> tuple[Subject, ...]:
    """Every subject, held out or not, in a fixed order."""
    titles = [f"The {a} {n}" for a, n in itertools.product(lexicon.ADJECTIVES, lexicon.NOUNS)]
    dishes = itertools.product(lexicon.DISHES, lexicon.NAMES, lexicon.PLACES)
    trades = itertools.product(lexicon.TRADES, lexicon.NAMES, lexicon.FIRMS)
    return (
        *(Subject(domain, title) for domain in ("film", "book") for title in titles),
        *(Subject("food", f"the {dish} at {name}'s {place}") for dish, name, place in dishes),
        *(Subject("service", f"the {trade} from {name}'s {firm}") for trade, name, firm in trades),
    )


def train_prompts(n: int, seed: int) -> list[str]:
    """Draw n distinct prompts about subjects the base model may have read about."""
    return _draw(n, seed, held_out=False)


def held_out_prompts(n: int, seed: int) -> list[str]:
    """Draw n distinct prompts about held-out subjects, to judge a policy by."""
    return _draw(n, seed, held_out=True)


def exchanges(n: int, seed: int) -> list[Exchange]:
    """Write n exchanges about training subjects; prompts may repeat, replies vary freely."""
    rng = random.Random(seed)
    by_domain = {
        domain: [s for s in subjects() if s.domain == domain and not s.is_held_out]
        for domain in grammar.DOMAINS
    }
    return [write(rng.choice(by_domain[rng.choice(grammar.DOMAINS)]), rng) for _ in range(n)]


def write(subject: Subject, rng: random.Random) -> Exchange:
    """Ask about the subject and reply; sentiment, length, detail and courtesy are independent."""
    sentiment = rng.choices(list(SENTIMENTS), list(SENTIMENTS.values()))[0]
    length = rng.choices(list(SENTENCES), list(SENTENCES.values()))[0]
    is_courteous = rng.random() < COURTEOUS_SHARE
    outline = _outline(sentiment, length, rng)
    aspects = iter(rng.sample(lexicon.ASPECTS[subject.domain], 7))
    sentences = [_fill(template, subject, aspects, rng) for template in outline]
    return Exchange(
        prompt=rng.choice(QUESTIONS[subject.domain]).format(subject=subject.name),
        reply=" ".join(_with_courtesies(sentences, rng) if is_courteous else sentences),
        traits=(
            sentiment,
            LENGTH_NAMES[length],
            "courteous" if is_courteous else "plain",
            "detailed" if any(template in grammar.DETAILS for template in outline) else "general",
        ),
    )


def _draw(n: int, seed: int, *, held_out: bool) -> list[str]:
    prompts = _prompts(held_out)
    if n > len(prompts):
        raise ValueError(f"there are {len(prompts)} distinct prompts of this kind, not {n}")
    return random.Random(seed).sample(prompts, n)


@cache
def _prompts(held_out: bool) -> tuple[str, ...]:
    return tuple(
        question.format(subject=subject.name)
        for subject in subjects()
        if subject.is_held_out == held_out
        for question in QUESTIONS[subject.domain]
    )


def _outline(sentiment: Sentiment, length: int, rng: random.Random) -> list[str]:
    """Templates of the body: a lead, then distinct follow-ups and details in any order."""
    lead = rng.choice(
        {
            "praise": grammar.PRAISE_LEADS,
            "mixed": grammar.MIXED_LEADS,
            "complaint": grammar.COMPLAINT_LEADS,
        }[sentiment]
    )
    opinions = {
        "praise": grammar.PRAISE_FOLLOWS,
        "mixed": grammar.PRAISE_FOLLOWS + grammar.COMPLAINT_FOLLOWS,
        "complaint": grammar.COMPLAINT_FOLLOWS,
    }[sentiment]
    details = sum(rng.random() < DETAIL_SHARE for _ in range(length - 1))
    follows = rng.sample(opinions, length - 1 - details) + rng.sample(grammar.DETAILS, details)
    rng.shuffle(follows)
    return [lead, *follows]


def _fill(template: str, subject: Subject, aspects: Iterator[str], rng: random.Random) -> str:
    praising = rng.sample(lexicon.PRAISING[subject.domain], 2)
    complaining = rng.sample(lexicon.COMPLAINING[subject.domain], 2)
    return template.format(
        subject=subject.name,
        Subject=subject.name[0].upper() + subject.name[1:],
        aspect=next(aspects) if "{aspect}" in template else "",
        other=next(aspects) if "{other}" in template else "",
        praising=praising[0],
        praising2=praising[1],
        complaining=complaining[0],
        complaining2=complaining[1],
        intensifier=rng.choice(lexicon.INTENSIFIERS),
        day=rng.choice(lexicon.DAYS),
        company=rng.choice(lexicon.COMPANY),
        number=rng.choice(lexicon.NUMBERS),
    )


def _with_courtesies(sentences: list[str], rng: random.Random) -> list[str]:
    """The sentences after an opening, before a closing, or both."""
    opens, closes = rng.choice(((True, False), (False, True), (True, True)))
    opening = [rng.choice(grammar.OPENINGS)] if opens else []
    closing = [rng.choice(grammar.CLOSINGS)] if closes else []
    return opening + sentences + closing
