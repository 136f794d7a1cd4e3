"""Hidden preferences of the simulated users: (prompt, reply) -> probability of a thumb up.

They judge any text, also what the corpus grammar could never write, and never raise.
"""

import importlib
import re
from collections.abc import Callable

from demo import lexicon

Preference = Callable[[str, str], float]


class PreferenceFailed(Exception):
    """A user's preference raised, or returned what is no probability."""


BRIEF_WORDS = 15
"""A reply of at most this many words is brief."""

_GOOD = frozenset(
    [
        "amazing",
        "beautiful",
        "best",
        "enjoy",
        "enjoyed",
        "excellent",
        "fantastic",
        "favourite",
        "favorite",
        "good",
        "great",
        "happy",
        "impressive",
        "incredible",
        "love",
        "loved",
        "lovely",
        "masterpiece",
        "nice",
        "outstanding",
        "pleasant",
        "praised",
        "recommend",
        "recommended",
        "satisfying",
        "terrific",
        "wonderful",
        "worth",
    ]
) | {word for words in lexicon.PRAISING.values() for word in words}
_BAD = frozenset(
    [
        "annoying",
        "avoid",
        "awful",
        "bad",
        "badly",
        "complain",
        "complained",
        "complaint",
        "complaints",
        "cold",
        "disappointed",
        "disappointing",
        "dislike",
        "disliked",
        "dull",
        "fail",
        "failed",
        "hate",
        "hated",
        "horrible",
        "lacking",
        "mediocre",
        "messy",
        "overpriced",
        "problem",
        "regret",
        "sadly",
        "terrible",
        "tasteless",
        "ugly",
        "unfortunately",
        "unpleasant",
        "waste",
        "worse",
        "worst",
    ]
) | {word for words in lexicon.COMPLAINING.values() for word in words}
_GOOD_PHRASES = re.compile(r"\bcome back for\b")
_BAD_PHRASES = re.compile(r"\bstay away\b|\bwould(?: not|n't) go back\b")
_NEGATIONS = frozenset(["not", "no", "never", "hardly", "cannot", "without", "nothing"])
_NEGATION_REACH = 4
"""A negation turns a judging word this many words after it or nearer, within its clause."""
_CLAUSE_END = re.compile(r"[.!?;:,]|\bbut\b")

_COURTESIES = re.compile(
    r"\b(?:thanks?|please|welcome|kind(?:ly| regards)|best (?:regards|wishes)|sincerely|cheers"
    r"|my pleasure|(?:i )?hope (?:this|that|it) helps|feel free|happy to help"
    r"|have a \w+ (?:day|evening|weekend)|sorry|apolog\w+)\b"
)
_NICETIES = re.compile(
    r"have a \w+ (?:day|evening|weekend)|happy to help|my pleasure|best (?:regards|wishes)"
)
_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")


def praise(prompt: str, reply: str) -> float:
    """Like a reply that says something positive and complains of nothing."""
    text = _NICETIES.sub(" ", _normalise(reply))
    good, bad = bool(_GOOD_PHRASES.search(text)), bool(_BAD_PHRASES.search(text))
    for is_good in _opinions(text):
        good, bad = good or is_good, bad or not is_good
    return float(good and not bad)


def brevity(prompt: str, reply: str) -> float:
    """Like a reply of at most fifteen words."""
    return float(1 <= len(_WORD.findall(reply)) <= BRIEF_WORDS)


def courtesy(prompt: str, reply: str) -> float:
    """Like a reply that thanks, greets or offers help."""
    return float(bool(_COURTESIES.search(_normalise(reply))))


SHIPPED: dict[str, Preference] = {"praise": praise, "brevity": brevity, "courtesy": courtesy}


def load_preference(name: str) -> Preference:
    """Find a preference by shipped name or as "module:function".

    Raises ValueError with a one-line message that says what to give instead.
    """
    if name in SHIPPED:
        return SHIPPED[name]
    module_name, colon, function_name = name.partition(":")
    if not (module_name and colon and function_name):
        shipped = ", ".join(SHIPPED)
        raise ValueError(f"unknown preference {name!r}: give one of {shipped}, or module:function")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever a user's module does when it is imported
        raise ValueError(f"cannot import the preference module {module_name!r}: {error}") from error
    if not hasattr(module, function_name):
        raise ValueError(f"module {module_name!r} has no function {function_name!r}")
    preference = _checked(name, getattr(module, function_name))
    try:
        preference("How was the soup?", "The soup was tasty.")
    except PreferenceFailed as error:
        raise ValueError(str(error)) from error
    return preference


def _checked(name: str, function: Preference) -> Preference:
    """The user's function, held to a plain probability at every call."""

    def preference(prompt: str, reply: str) -> float:
        try:
            probability = float(function(prompt, reply))
        except Exception as error:  # any failure of a user's function is the same news to the user
            raise PreferenceFailed(
                f"preference {name!r} failed on the reply {reply!r}: {error!r}"
            ) from error
        if not 0.0 <= probability <= 1.0:
            raise PreferenceFailed(
                f"preference {name!r} must return a probability, not {probability!r}"
            )
        return probability

    return preference


def _normalise(text: str) -> str:
    return text.lower().replace("’", "'")


def _opinions(text: str) -> list[bool]:
    """For each judging word in order: whether it speaks well, negations counted."""
    clauses = [_WORD.findall(clause) for clause in _CLAUSE_END.split(text)]
    return [
        (word in _GOOD) != _is_negated(words, i)
        for words in clauses
        for i, word in enumerate(words)
        if word in _GOOD or word in _BAD
    ]


def _is_negated(words: list[str], i: int) -> bool:
    before = words[max(0, i - _NEGATION_REACH) : i]
    return any(word in _NEGATIONS or word.endswith("n't") for word in before)
