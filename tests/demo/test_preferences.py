import pytest

from demo.preferences import (
    SHIPPED,
    PreferenceFailed,
    brevity,
    courtesy,
    load_preference,
    praise,
)

PROMPT = "How was the soup at Nora's Kitchen?"


@pytest.mark.parametrize(
    ("reply", "liked"),
    [
        ("The soup was delicious.", 1.0),
        ("I loved it, and there was nothing bad about it.", 1.0),
        ("Not bad at all!", 1.0),
        ("I cannot wait. Great film!", 1.0),
        ("I'd recommend it: a wonderful evening.", 1.0),
        ("I would come back for the sauce alone.", 1.0),
        ("The soup was delicious, but the bread was stale.", 0.0),
        ("I cannot recommend the soup.", 0.0),
        ("I don’t think it was good.", 0.0),
        ("We spent two hours there.", 0.0),
        ("Have a nice day.", 0.0),
    ],
)
def test_praise_likes_the_positive_without_complaint(reply, liked):
    assert praise(PROMPT, reply) == liked


@pytest.mark.parametrize(
    ("reply", "liked"),
    [("Good.", 1.0), ("word " * 15, 1.0), ("word " * 16, 0.0), ("... !", 0.0)],
)
def test_brevity_counts_words(reply, liked):
    assert brevity(PROMPT, reply) == liked


@pytest.mark.parametrize(
    ("reply", "liked"),
    [
        ("Thank you for asking. It was bland.", 1.0),
        ("It was bland. Kind regards.", 1.0),
        ("Sure — happy to help!", 1.0),
        ("It was bland.", 0.0),
        ("It was pleasing.", 0.0),
    ],
)
def test_courtesy_likes_thanks_and_offers(reply, liked):
    assert courtesy(PROMPT, reply) == liked


@pytest.mark.parametrize("name", sorted(SHIPPED))
@pytest.mark.parametrize("reply", ["", " \n\t", "\0", "。。。", "\ud800", "<|up|>", "a" * 10_000])
def test_a_preference_judges_any_text(name, reply):
    probability = SHIPPED[name](reply, reply)
    assert 0.0 <= probability <= 1.0
    if not reply.strip():
        assert probability == 0.0


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_a_shipped_preference_loads_by_name(name):
    assert load_preference(name) is SHIPPED[name]


def test_a_preference_loads_from_any_module():
    loaded = load_preference("demo.preferences:brevity")
    for reply in ("Good.", "word " * 40):
        assert loaded("How was it?", reply) == brevity("How was it?", reply)


def test_whatever_number_a_preference_returns_becomes_a_plain_probability(tmp_path, monkeypatch):
    (tmp_path / "numeric.py").write_text(
        "import numpy\n\ndef judge(prompt, reply):\n    return numpy.float32(0.5)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert type(load_preference("numeric:judge")("?", "!")) is float


def test_a_preference_that_fails_later_says_on_which_reply(tmp_path, monkeypatch):
    (tmp_path / "moody.py").write_text(
        "def judge(prompt, reply):\n    return 1.0 if 'tasty' in reply else 7.0\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    moody = load_preference("moody:judge")
    with pytest.raises(
        PreferenceFailed, match=r"'moody:judge' must return a probability, not 7\.0"
    ):
        moody("?", "The soup was cold.")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("kindness", "give one of praise, brevity, courtesy"),
        ("", "unknown preference"),
        (":praise", "unknown preference"),
        ("no_such_module:f", "cannot import"),
        ("demo.preferences:no_such", "has no function"),
        ("demo.preferences:BRIEF_WORDS", "failed on the reply"),
        ("json:dumps", "failed on the reply"),
        ("operator:add", "failed on the reply"),
    ],
)
def test_a_wrong_preference_is_refused_in_one_line(name, message):
    with pytest.raises(ValueError, match=message) as refusal:
        load_preference(name)
    assert "\n" not in str(refusal.value)


def test_a_preference_that_returns_no_probability_is_refused(tmp_path, monkeypatch):
    (tmp_path / "too_fond.py").write_text("def judge(prompt, reply):\n    return 2.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="must return a probability"):
        load_preference("too_fond:judge")
