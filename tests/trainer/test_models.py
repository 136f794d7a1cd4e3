import json

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from thumbloop.config.trainer import Lora
from thumbloop.errors import SettingsError
from thumbloop.rendering import VerdictTokens
from trainer.batches import collate
from trainer.models import Trunk

PAIRS = [((6, 7, 8), (9, 10)), ((11,), (12, 13, 14, 15)), ((6, 6, 6, 6, 6), (20,))]


def ones(rows: int) -> torch.Tensor:
    return torch.ones(rows, 1)


def slow_logprobs(model, prompt, response) -> list[float]:
    """Through the whole model, one sequence at a time."""
    logits = model(input_ids=torch.tensor([[*prompt, *response]])).logits[0].log_softmax(dim=-1)
    return [logits[len(prompt) - 1 + t, token].item() for t, token in enumerate(response)]


def test_without_adapters_policy_and_reference_are_the_base_model(trunk, base_model):
    batch = collate(PAIRS)
    for role in ("policy", "reference"):
        logprobs = trunk.respond(batch, ones(3), role).logprobs
        for row, (prompt, response) in enumerate(PAIRS):
            expected = slow_logprobs(base_model, prompt, response)
            assert logprobs[row, : len(response)].tolist() == pytest.approx(expected, abs=1e-5)


def test_padding_does_not_change_a_sequence(trained_trunk):
    together = trained_trunk.respond(collate(PAIRS), ones(3), "policy")
    for row, (prompt, response) in enumerate(PAIRS):
        alone = trained_trunk.respond(collate([(prompt, response)]), ones(1), "policy")
        length = len(response)
        torch.testing.assert_close(together.logprobs[row, :length], alone.logprobs[0])
        torch.testing.assert_close(together.hidden[row, : length + 1], alone.hidden[0])


def test_roles_do_not_leak_into_each_other(trained_trunk, base_model):
    batch = collate(PAIRS[:1])
    reference = trained_trunk.respond(batch, ones(1), "reference").logprobs
    policy = trained_trunk.respond(batch, ones(1), "policy").logprobs
    trained_trunk.rewards(batch)
    assert not torch.allclose(policy, reference, atol=1e-3)
    assert reference[0].tolist() == pytest.approx(slow_logprobs(base_model, *PAIRS[0]), abs=1e-5)
    torch.testing.assert_close(trained_trunk.respond(batch, ones(1), "policy").logprobs, policy)


@pytest.mark.parametrize("adapter", ["policy", "reward"])
def test_a_role_gives_gradient_to_its_own_adapter_only(trained_trunk, adapter):
    batch = collate(PAIRS)
    if adapter == "policy":
        trained_trunk.respond(batch, ones(3), "policy").logprobs.sum().backward()
    else:
        trained_trunk.rewards(batch).sum().backward()
    own = trained_trunk.parameters(adapter)
    assert own
    for name, parameter in trained_trunk.model.named_parameters():
        has_gradient = parameter.grad is not None and bool(parameter.grad.any())
        assert has_gradient == (name in own)


def test_the_critic_gives_no_gradient_to_any_adapter(trained_trunk):
    hidden = trained_trunk.respond(collate(PAIRS), ones(3), "reference").hidden
    trained_trunk.value_head(hidden).sum().backward()
    assert all(p.grad is None for p in trained_trunk.model.parameters())


def test_the_reward_is_the_logit_between_the_two_verdict_tokens(trunk, base_model):
    prompt, response = PAIRS[0]
    whole = torch.tensor([[*prompt, *response, *trunk.verdict.prompt]])
    logits = base_model(input_ids=whole).logits[0, -1]
    batch = collate([(prompt, (*response, *trunk.verdict.prompt))])
    assert trunk.rewards(batch).item() == pytest.approx(
        (logits[trunk.verdict.up] - logits[trunk.verdict.down]).item(), abs=1e-5
    )


def test_a_saved_adapter_reloads_in_peft_to_the_same_numbers(trained_trunk, base_model, tmp_path):
    trained_trunk.save(tmp_path)
    expected = trained_trunk.respond(collate(PAIRS[:1]), ones(1), "policy").logprobs[0].tolist()
    reloaded = PeftModel.from_pretrained(base_model, str(tmp_path / "policy")).eval()
    assert slow_logprobs(reloaded, *PAIRS[0]) == pytest.approx(expected, abs=1e-5)


def test_saving_writes_peft_layout_and_nothing_else(trained_trunk, tmp_path):
    trained_trunk.save(tmp_path)
    files = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()}
    assert files == {
        "policy/adapter_config.json",
        "policy/adapter_model.safetensors",
        "reward/adapter_config.json",
        "reward/adapter_model.safetensors",
        "value/value_head.safetensors",
    }
    config = json.loads((tmp_path / "policy" / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(config["target_modules"])
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 8, 0.0)
    assert (config["bias"], config["use_dora"], config["modules_to_save"]) == ("none", False, None)
    names = load_file(tmp_path / "policy" / "adapter_model.safetensors")
    assert all(name.startswith("base_model.model.model.layers.") for name in names)


def test_loading_what_was_saved_restores_all_three(trained_trunk, tmp_path):
    batch = collate(PAIRS)
    before = trained_trunk.respond(batch, ones(3), "policy")
    rewards, values = trained_trunk.rewards(batch), trained_trunk.value_head(before.hidden)
    trained_trunk.save(tmp_path)
    trained_trunk.reset()
    assert not torch.allclose(trained_trunk.rewards(batch), rewards)
    trained_trunk.load(tmp_path)
    torch.testing.assert_close(
        trained_trunk.respond(batch, ones(3), "policy").logprobs, before.logprobs
    )
    torch.testing.assert_close(trained_trunk.rewards(batch), rewards)
    torch.testing.assert_close(trained_trunk.value_head(before.hidden), values)


def test_a_reset_trunk_is_the_base_model_again(trained_trunk):
    trained_trunk.reset()
    batch = collate(PAIRS)
    policy = trained_trunk.respond(batch, ones(3), "policy").logprobs
    torch.testing.assert_close(policy, trained_trunk.respond(batch, ones(3), "reference").logprobs)


def test_an_adapter_of_another_rank_is_refused_in_one_line(trained_trunk, base_model, tmp_path):
    trained_trunk.save(tmp_path)
    other = Trunk(base_model, Lora(rank=2, alpha=8), VerdictTokens((3,), 4, 5, True))
    with pytest.raises(SettingsError, match=r"rank 2 .* trained with\s+4"):
        other.load(tmp_path)


def test_snapshots_bring_an_adapter_back(trained_trunk):
    snapshot = trained_trunk.snapshot("policy")
    batch = collate(PAIRS)
    before = trained_trunk.respond(batch, ones(3), "policy").logprobs
    trained_trunk.reset()
    trained_trunk.restore("policy", snapshot)
    torch.testing.assert_close(trained_trunk.respond(batch, ones(3), "policy").logprobs, before)


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        ("GemmaConfig", {}),
        ("Gemma2Config", {"final_logit_softcapping": 2.0, "query_pre_attn_scalar": 16}),
        ("GraniteConfig", {"logits_scaling": 3.0}),
        ("CohereConfig", {"logit_scale": 0.25}),
    ],
)
def test_logits_are_made_as_the_architecture_makes_them(config, changes):
    torch.manual_seed(3)
    of_architecture = getattr(transformers, config)(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        initializer_range=0.5,
        **changes,
    )
    model = AutoModelForCausalLM.from_config(of_architecture)
    trunk = Trunk(model, Lora(rank=4, alpha=8), VerdictTokens((3,), 4, 5, True))
    trunk.check_logits()
    logprobs = trunk.respond(collate(PAIRS[:1]), ones(1), "policy").logprobs[0].tolist()
    assert logprobs == pytest.approx(slow_logprobs(model, *PAIRS[0]), abs=1e-4)


def test_logits_made_in_an_unknown_way_are_refused(trunk, monkeypatch):
    monkeypatch.setattr(trunk.causal, "forward", _squared(trunk.causal.forward))
    with pytest.raises(SettingsError, match="LlamaForCausalLM makes its logits in a way"):
        trunk.check_logits()


def _squared(forward):
    def squared(**arguments):
        output = forward(**arguments)
        output.logits = output.logits.square()
        return output

    return squared
