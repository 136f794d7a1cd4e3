"""The corpus grammar: sentence templates with slots, and the recogniser for replies made of them.

A reply is an optional opening, one to four sentences about the subject, and an optional closing.
The recogniser generalises over slot fillers: any aspect of any domain in any judging word,
intensified or not. It looks at the language, not at whether the opinions agree with each other.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache

from demo import lexicon

DOMAINS = ("film", "book", "food", "service")

OPENINGS = (
    "Thank you for asking.",
    "Thanks for your question.",
    "Thank you for your patience.",
    "Many thanks for writing.",
)
CLOSINGS = (
    "I hope this helps.",
    "Please let me know if you need more.",
    "Please feel free to ask again.",
    "Kind regards.",
    "Have a nice day.",
)

# The first sentence names the subject, so that a reply depends on its prompt.
PRAISE_LEADS = (
    "{Subject} was {praising}.",
    "{Subject} was {intensifier} {praising}.",
    "I enjoyed {subject} and found the {aspect} {praising}.",
    "I loved {subject}.",
    "I can recommend {subject}, because the {aspect} was {praising}.",
)
COMPLAINT_LEADS = (
    "{Subject} was {complaining}.",
    "{Subject} was {intensifier} {complaining}.",
    "I disliked {subject} and found the {aspect} {complaining}.",
    "I regret choosing {subject}.",
    "I cannot recommend {subject}, because the {aspect} was {complaining}.",
)
MIXED_LEADS = (
    "{Subject} had one {praising} side, but the {aspect} was {complaining}.",
    "I enjoyed {subject}, but the {aspect} was {complaining}.",
    "I disliked {subject}, but the {aspect} was {praising}.",
)
PRAISE_FOLLOWS = (
    "The {aspect} was {praising}.",
    "The {aspect} was {intensifier} {praising}.",
    "I found the {aspect} {praising} and the {other} {praising2}.",
    "I would come back for the {aspect} alone.",
    "Everyone praised the {aspect}.",
)
COMPLAINT_FOLLOWS = (
    "The {aspect} was {complaining}.",
    "The {aspect} was {intensifier} {complaining}.",
    "I found the {aspect} {complaining} and the {other} {complaining2}.",
    "I would stay away because of the {aspect} alone.",
    "Everyone complained about the {aspect}.",
)
DETAILS = (
    "I went on {day} with {company}.",
    "It was {day} and we were {number} people.",
    "We spent {number} hours there.",
    "I heard about it from {company}.",
    "I paid {number} pounds for it.",
)
BODY = PRAISE_LEADS + COMPLAINT_LEADS + MIXED_LEADS + PRAISE_FOLLOWS + COMPLAINT_FOLLOWS + DETAILS

MOST_SENTENCES = 6
"""Sentences of a body that is still no rambling; the corpus itself writes up to four."""

_SENTENCE = re.compile(r"[^.!?]+[.!?]")
_SLOT = re.compile(r"\{(\w+)\}")


def _any_of(words: Iterable[str]) -> str:
    """A pattern for any one of these words; the longer first, so that none hides another."""
    return "(?:" + "|".join(sorted(map(re.escape, words), key=len, reverse=True)) + ")"


def _fillers(words: Mapping[str, Sequence[str]]) -> set[str]:
    """The words of every domain."""
    return {word for fillers in words.values() for word in fillers}


@cache
def _slot_patterns() -> dict[str, str]:
    title = rf"The {_any_of(lexicon.ADJECTIVES)} {_any_of(lexicon.NOUNS)}"
    dish = rf"he {_any_of(lexicon.DISHES)} at {_any_of(lexicon.NAMES)}'s {_any_of(lexicon.PLACES)}"
    trade = (
        rf"he {_any_of(lexicon.TRADES)} from {_any_of(lexicon.NAMES)}'s {_any_of(lexicon.FIRMS)}"
    )
    aspect = _any_of(_fillers(lexicon.ASPECTS))
    intensifier = _any_of(lexicon.INTENSIFIERS)
    words = _any_of({*_fillers(lexicon.PRAISING), *_fillers(lexicon.COMPLAINING)})
    judging = f"(?:{intensifier} )?{words}"
    return {
        "Subject": f"(?:{title}|T{dish}|T{trade})",
        "subject": f"(?:{title}|t{dish}|t{trade})",
        "aspect": aspect,
        "other": aspect,
        "praising": judging,
        "praising2": judging,
        "complaining": judging,
        "complaining2": judging,
        "day": _any_of(lexicon.DAYS),
        "company": _any_of(lexicon.COMPANY),
        "number": _any_of(lexicon.NUMBERS),
    }


def _pattern(template: str) -> str:
    """The template as a pattern: fixed words literally, slots as any filler of theirs."""
    pieces = _SLOT.split(template.replace("{intensifier} ", ""))  # judging words bring their own
    slots = _slot_patterns()
    return "".join(slots[piece] if i % 2 else re.escape(piece) for i, piece in enumerate(pieces))


@cache
def _sentence_pattern() -> re.Pattern[str]:
    return re.compile("|".join(map(_pattern, BODY)))


def is_well_formed(reply: str) -> bool:
    """Whether the reply is one that the corpus grammar could have written, in any slot filling.

    Catches stutter, broken words, fragments, a missing end, repeated sentences, and courtesies
    out of place. Space around the reply does not count.
    """
    text = reply.strip()
    sentences = [sentence.strip() for sentence in _SENTENCE.findall(text)]
    if not sentences or " ".join(sentences) != text or len(set(sentences)) < len(sentences):
        return False
    body = sentences[sentences[0] in OPENINGS : len(sentences) - (sentences[-1] in CLOSINGS)]
    return 1 <= len(body) <= MOST_SENTENCES and all(map(_sentence_pattern().fullmatch, body))
