import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from tests.trainer.conftest import LORA, VERDICT
from thumbloop.config.trainer import Resources
from trainer import models, packing
from trainer.batches import collate
from trainer.models import ADAPTERS, Trunk

SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
GROUPED = SIZES | {"num_key_value_heads": 2}
CONFIGS = {
    "llama": transformers.LlamaConfig(**GROUPED),
    "qwen3": transformers.Qwen3Config(**GROUPED, head_dim=8),
    "gemma3": transformers.Gemma3TextConfig(**GROUPED, head_dim=8, sliding_window=4),
    "mistral": transformers.MistralConfig(**GROUPED, sliding_window=4),
    "phi3": transformers.Phi3Config(**GROUPED),
    "gpt2": transformers.GPT2Config(
        vocab_size=40, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2
    ),
    "opt": transformers.OPTConfig(
        **{k: v for k, v in SIZES.items() if k != "intermediate_size"},
        ffn_dim=48,
        word_embed_proj_dim=32,
    ),
}
LONG = tuple(range(8, 18))
PAIRS = [((6, 7, 8), (9, 10)), (LONG, (12, 13, 14, 15)), ((6, 7, 8), (20,)), (LONG, (9,) * 8)]
"""Prompts that are shared, and sequences longer than the windows above."""


def trunk_of(name: str, dtype: torch.dtype = torch.float32, **resources) -> Trunk:
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]).to(dtype)
    trunk = Trunk(model, LORA, VERDICT, Resources(**resources))
    source = torch.Generator().manual_seed(8)
    for adapter in ADAPTERS:
        parameters = trunk.parameters(adapter)
        trunk.restore(
            adapter,
            {n: 0.1 * torch.randn(p.shape, generator=source) for n, p in parameters.items()},
        )
    return trunk


def lfm2(dtype: torch.dtype = torch.float32) -> Trunk:
    """A model in which a convolution runs over the tokens."""
    torch.manual_seed(7)
    config = transformers.Lfm2Config(
        **GROUPED, layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False
    )
    return Trunk(AutoModelForCausalLM.from_config(config).to(dtype), LORA, VERDICT)


def said(trunk: Trunk, pairs):
    """Return the responses' log-probabilities, the gradient that they give, and rewards."""
    batch = collate(pairs)
    logprobs = trunk.respond(batch, torch.ones(len(pairs), 1), "policy").logprobs
    trunk.model.zero_grad()
    logprobs.sum().backward()
    gradient = {n: p.grad.clone() for n, p in trunk.parameters("policy").items()}
    return logprobs, gradient, trunk.rewards(batch)


@pytest.mark.parametrize("name", CONFIGS)
def test_sequences_in_one_batch_are_what_each_is_alone(name):
    trunk = trunk_of(name)
    assert trunk.is_packed
    logprobs, _, rewards = said(trunk, PAIRS)
    for row, pair in enumerate(PAIRS):
        alone, _, reward = said(trunk, [pair])
        torch.testing.assert_close(logprobs[row, : len(pair[1])], alone[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(rewards[row], reward[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_and_padded_say_and_teach_the_same(name):
    trunk = trunk_of(name)
    packed = said(trunk, PAIRS)
    trunk.is_packed = False
    padded = said(trunk, PAIRS)
    torch.testing.assert_close(packed, padded, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_models_are_packed_in_half_precision_too(name):
    assert trunk_of(name, torch.bfloat16).is_packed


def test_a_token_that_sequences_share_is_computed_once(monkeypatch):
    trunk = trunk_of("llama")
    seen: list[int] = []

    def watched(model, batch):
        seen.append(len(batch.tokens))
        return packing.packed_states(model, batch)

    monkeypatch.setattr(models, "packed_states", watched)
    said(trunk, PAIRS)
    assert seen == [3 + 10 + 2 + 4 + 1 + 8] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_whose_tokens_meet_elsewhere_is_recognised(dtype):
    assert not lfm2(dtype).is_packed


def test_a_model_whose_tokens_meet_elsewhere_is_padded():
    trunk = lfm2()
    for row, pair in enumerate(PAIRS):
        alone = said(trunk, [pair])[0][0]
        torch.testing.assert_close(
            said(trunk, PAIRS)[0][row, : len(pair[1])], alone, rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_computing_activations_again_changes_nothing_and_drops_nothing(name):
    kept, again = trunk_of(name), trunk_of(name, gradient_checkpointing=True)
    torch.testing.assert_close(said(again, PAIRS), said(kept, PAIRS))


def test_activations_are_kept_unless_they_are_to_be_computed_again():
    def kept(trunk: Trunk) -> int:
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x: sizes.append(x.numel()) or x, lambda x: x
        ):
            trunk.respond(collate(PAIRS), torch.ones(4, 1), "policy")
        return sum(sizes)

    assert kept(trunk_of("llama", gradient_checkpointing=True)) < 0.5 * kept(trunk_of("llama"))


def test_padded_generation_is_what_it_was():
    """The trunk's model can still sample from prompts of different lengths, padded on the left."""
    trunk = trunk_of("llama")
    prompts = [(6, 7, 8), (9,)]
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": 39}
    rows = torch.tensor([[6, 7, 8], [0, 0, 9]])
    with torch.no_grad(), trunk.role("policy"):
        together = trunk.model.generate(
            input_ids=rows, attention_mask=(rows != 0).long(), **settings
        )
        for row, prompt in enumerate(prompts):
            alone = trunk.model.generate(input_ids=torch.tensor([prompt]), **settings)
            assert together[row, 3:].tolist() == alone[0, len(prompt) :].tolist()
