import torch
from transformers import LlamaConfig, LlamaForCausalLM

from demo.pretraining import NO_LOSS, Example, pack

PAD = 0
FIRST = Example([5, 6, 7], [NO_LOSS, 6, 7])
SECOND = Example([8, 9, 10, 11], [NO_LOSS, 9, 10, 11])


def test_conversations_are_packed_whole_and_padding_is_not_learned():
    rows = pack([FIRST, SECOND], 8, PAD)
    assert rows.ids.tolist() == [[5, 6, 7, 8, 9, 10, 11, PAD]]
    assert rows.labels.tolist() == [[NO_LOSS, 6, 7, NO_LOSS, 9, 10, 11, NO_LOSS]]
    assert rows.positions.tolist() == [[0, 1, 2, 0, 1, 2, 3, 0]]


def test_a_conversation_that_does_not_fit_opens_a_row():
    rows = pack([FIRST, SECOND, FIRST], 6, PAD)
    assert rows.ids.tolist() == [[5, 6, 7, 5, 6, 7], [8, 9, 10, 11, PAD, PAD]]


def test_packed_conversations_do_not_see_each_other():
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=16,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            pad_token_id=PAD,
        )
    ).eval()
    rows = pack([FIRST, SECOND], 8, PAD)
    with torch.no_grad():
        packed = model(input_ids=rows.ids, position_ids=rows.positions, use_cache=False).logits
        alone = model(input_ids=torch.tensor([SECOND.ids]), use_cache=False).logits
    torch.testing.assert_close(packed[:, 3:7], alone)
