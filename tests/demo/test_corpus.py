import pytest

from demo import corpus, preferences
from demo.grammar import is_well_formed


def test_the_same_seed_writes_the_same_corpus():
    assert corpus.exchanges(50, seed=3) == corpus.exchanges(50, seed=3)
    assert corpus.exchanges(50, seed=3) != corpus.exchanges(50, seed=4)


def test_there_are_several_thousand_distinct_training_prompts():
    prompts = corpus.train_prompts(5000, seed=0)
    assert len(set(prompts)) == 5000


def test_held_out_subjects_appear_in_no_training_prompt_and_no_corpus_prompt():
    held_out = {s.name for s in corpus.subjects() if s.is_held_out}
    assert all(
        any(name in prompt for name in held_out) for prompt in corpus.held_out_prompts(300, seed=1)
    )
    trained_on = {exchange.prompt for exchange in corpus.exchanges(2000, seed=0)}
    trained_on |= set(corpus.train_prompts(5000, seed=0))
    assert trained_on.isdisjoint(corpus.held_out_prompts(1000, seed=0))


def test_asking_for_more_prompts_than_exist_is_refused():
    with pytest.raises(ValueError, match="distinct prompts"):
        corpus.held_out_prompts(10**6, seed=0)


def test_every_reply_is_well_formed_and_names_its_subject():
    names = [subject.name.lower() for subject in corpus.subjects()]
    for exchange in corpus.exchanges(300, seed=5):
        assert is_well_formed(exchange.reply), exchange.reply
        asked = max((name for name in names if name in exchange.prompt.lower()), key=len)
        assert asked in exchange.reply.lower()


def test_each_shipped_preference_likes_a_share_that_leaves_room_to_learn():
    exchanges = corpus.exchanges(2000, seed=0)
    for name, preference in preferences.SHIPPED.items():
        rate = sum(preference(e.prompt, e.reply) for e in exchanges) / len(exchanges)
        assert 0.25 <= rate <= 0.48, name


def test_preferences_judge_as_the_corpus_meant():
    for exchange in corpus.exchanges(500, seed=6):
        assert preferences.praise(exchange.prompt, exchange.reply) == ("praise" in exchange.traits)
        courteous = "courteous" in exchange.traits
        assert preferences.courtesy(exchange.prompt, exchange.reply) == courteous
