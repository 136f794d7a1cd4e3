import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.batches import collate, micro_batches, packed_size

SHARED = [((6, 7, 8), (9,)), ((6,), (7, 8)), ((6, 7, 8), (10, 11))]


def test_a_shared_prompt_is_there_once_and_padding_is_not_there_at_all():
    batch = collate(SHARED)
    assert batch.tokens.tolist() == [6, 7, 8, 9, 6, 7, 8, 10, 11]
    assert batch.positions.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 4]


def test_rows_spell_the_sequences_and_states_stand_around_the_responses():
    batch = collate(SHARED)
    for row, (prompt, response) in enumerate(SHARED):
        length = len(prompt) + len(response)
        assert batch.tokens[batch.rows[row, :length]].tolist() == [*prompt, *response]
        before = [prompt[-1], *response]
        padding = [response[-1]] * (batch.states.shape[1] - len(before))
        assert batch.tokens[batch.states[row]].tolist() == before + padding
        assert batch.responses[row, batch.mask[row]].tolist() == list(response)
    assert batch.mask.tolist() == [[True, False], [True, True], [True, True]]


def test_each_token_knows_a_place_where_it_stands():
    batch = collate(SHARED)
    everywhere = torch.arange(len(batch.tokens))
    assert batch.rows.flatten()[batch.places].tolist() == everywhere.tolist()
    assert (batch.places % batch.rows.shape[1]).tolist() == batch.positions.tolist()


pairs = st.lists(
    st.tuples(
        st.sampled_from([(1,), (2, 3), (4, 5, 6, 7), (8,) * 9]),
        st.lists(st.integers(1, 9), min_size=1, max_size=12).map(tuple),
    ),
    min_size=1,
    max_size=20,
)


@given(pairs, st.integers(1, 40), st.randoms())
def test_micro_batches_hold_everything_once_within_their_bound(pairs, tokens, random):
    rows = random.sample(range(len(pairs)), random.randint(1, len(pairs)))
    seen: list[int] = []
    for chosen, batch in micro_batches(pairs, rows, tokens=tokens, padded_tokens=4 * tokens):
        seen += chosen.tolist()
        assert len(batch.tokens) <= tokens or len(chosen) == 1
        for row, mask, responses in zip(chosen.tolist(), batch.mask, batch.responses, strict=True):
            assert tuple(responses[mask].tolist()) == pairs[row][1]
    assert sorted(seen) == sorted(rows)


def test_the_sequences_of_one_prompt_come_together():
    pairs = [((k % 4, 1, 2, 3), (k,) * (1 + k)) for k in range(16)]
    for _, batch in micro_batches(pairs, range(16), tokens=1000, padded_tokens=1000):
        assert len(batch.tokens) == 4 * 4 + sum(range(1, 17))
    of_prompts = [
        {pairs[i][0] for i in rows.tolist()}
        for rows, _ in micro_batches(pairs, range(16), tokens=60, padded_tokens=240)
    ]
    assert all(len(prompts) < 4 for prompts in of_prompts)


@pytest.mark.parametrize("order", [range(6), reversed(range(6))])
def test_the_grouping_does_not_depend_on_the_order_that_it_is_asked_in(order):
    pairs = [((1, 2), (k,)) for k in range(3)] + [((3,), (k, k)) for k in range(3)]
    groups = [
        sorted(rows.tolist())
        for rows, _ in micro_batches(pairs, list(order), tokens=5, padded_tokens=20)
    ]
    assert sorted(groups) == [[0, 1, 2], [3, 4], [5]]


def test_padding_in_attention_has_a_bound_of_its_own():
    """Many replies to one long prompt are few tokens, and many where each is a row with the whole prompt."""
    pairs = [((1,) * 100, (k, k)) for k in range(40)]
    sizes = [
        batch.rows.numel()
        for _, batch in micro_batches(pairs, range(40), tokens=400, padded_tokens=1020)
    ]
    assert sizes == [1020] * 4
    mixed = [((k,), (k,) * (99 if k == 0 else 1)) for k in range(40)]
    rows = [
        batch.rows.shape
        for _, batch in micro_batches(mixed, range(40), tokens=400, padded_tokens=400)
    ]
    assert rows == [(4, 100), (36, 2)]


def test_the_size_of_a_batch_is_known_before_it_is_made():
    assert packed_size(SHARED) == len(collate(SHARED).tokens)
