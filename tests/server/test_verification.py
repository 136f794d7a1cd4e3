import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from server.verification import Expected, verify
from tests.publishing import Publisher
from thumbloop.artifacts import ADAPTER_CONFIG, WEIGHTS, BaseModelIdentity, Manifest
from thumbloop.config import State
from thumbloop.config.delivery import Delivery
from thumbloop.errors import BadPolicyVersion
from thumbloop.types import PolicyVersion

LIMITS = Delivery()
Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture
def check(state: State, expected: Expected) -> Callable[..., Manifest]:
    def check(row: PolicyVersion, parent: PolicyVersion | None = None) -> Manifest:
        return verify(state.versions, row, parent, expected, LIMITS)

    return check


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    """Return a spoiler that changes the policy adapter's tensors."""

    def spoil(folder: Path) -> None:
        path = folder / "policy" / WEIGHTS
        values = load_file(path)
        change(values)
        save_file(values, path)

    return spoil


def setting(name: str, value: object) -> Callable[[Path], None]:
    """Return a spoiler that changes a setting of the reward adapter; None removes it."""

    def spoil(folder: Path) -> None:
        path = folder / "reward" / ADAPTER_CONFIG
        values = json.loads(path.read_text())
        if value is None:
            del values[name]
        else:
            values[name] = value
        path.write_text(json.dumps(values))

    return spoil


def a_single(value: float) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(values: dict[str, torch.Tensor]) -> None:
        values[f"{Q_PROJ}.lora_B.weight"][3, 1] = value

    return change


def _lopsided(values: dict[str, torch.Tensor]) -> None:
    values[f"{Q_PROJ}.lora_A.weight"].mul_(1e12)
    values[f"{Q_PROJ}.lora_B.weight"].mul_(1e-12)


def _pickle(folder: Path) -> None:
    torch.save({"a": torch.ones(1)}, folder / "policy" / WEIGHTS)


def _no_config(folder: Path) -> None:
    (folder / "policy" / ADAPTER_CONFIG).write_text("no json")


BAD_TENSORS = {
    "NaN": (tensors(a_single(float("nan"))), "not_finite"),
    "infinity": (tensors(a_single(float("inf"))), "not_finite"),
    "a huge update": (tensors(a_single(1e18)), "too_large"),
    "a large update": (tensors(a_single(3e3)), "too_large"),
    "a module of no such name": (
        tensors(lambda t: t.update({"base_model.model.lm_head.lora_A.weight": torch.ones(4, 64)})),
        "wrong_module",
    ),
    "whole weights instead of an update": (
        tensors(lambda t: t.update({f"{Q_PROJ}.weight": torch.ones(64, 64)})),
        "wrong_module",
    ),
    "half an update": (
        tensors(lambda t: t.pop(f"{Q_PROJ}.lora_B.weight")),
        "wrong_module",
    ),
    "the other half": (
        tensors(lambda t: t.pop(f"{Q_PROJ}.lora_A.weight")),
        "wrong_module",
    ),
    "a wrong shape": (
        tensors(lambda t: t.update({f"{Q_PROJ}.lora_A.weight": torch.ones(4, 65)})),
        "wrong_shape",
    ),
    "another rank than it says": (
        tensors(lambda t: t.update({f"{Q_PROJ}.lora_A.weight": torch.ones(8, 64)})),
        "wrong_shape",
    ),
    "integers": (
        tensors(lambda t: t.update({f"{Q_PROJ}.lora_A.weight": torch.ones(4, 64).long()})),
        "wrong_dtype",
    ),
    "twice the precision": (
        tensors(lambda t: t.update({f"{Q_PROJ}.lora_A.weight": torch.ones(4, 64).double()})),
        "wrong_dtype",
    ),
    "a quarter of the precision": (
        tensors(
            lambda t: t.update(
                {f"{Q_PROJ}.lora_A.weight": torch.ones(4, 64).to(torch.float8_e4m3fn)}
            )
        ),
        "wrong_dtype",
    ),
    "a small update of numbers that float16 has not": (tensors(_lopsided), "too_large"),
    "nothing": (tensors(lambda t: t.clear()), "empty_adapter"),
    "a pickle": (_pickle, "not_safetensors"),
}

BAD_SETTINGS = {
    "no JSON": (_no_config, "adapter_config"),
    "a list": (lambda f: (f / "policy" / ADAPTER_CONFIG).write_text("[]"), "adapter_config"),
    "not LoRA": (setting("peft_type", "IA3"), "adapter_config"),
    "DoRA": (setting("use_dora", True), "adapter_config"),
    "rank-stabilised": (setting("use_rslora", True), "adapter_config"),
    "biases": (setting("bias", "all"), "adapter_config"),
    "whole modules": (setting("modules_to_save", ["lm_head"]), "adapter_config"),
    "ranks by module": (setting("rank_pattern", {"q_proj": 2}), "adapter_config"),
    "scales by module": (setting("alpha_pattern", {"q_proj": 2}), "adapter_config"),
    "biases of its own": (setting("lora_bias", True), "adapter_config"),
    "layers used twice": (setting("layer_replication", [[0, 2], [0, 2]]), "adapter_config"),
    "only after some tokens": (setting("alora_invocation_tokens", [5]), "adapter_config"),
    "tokens of its own": (setting("trainable_token_indices", [5]), "adapter_config"),
    "another base model": (setting("init_lora_weights", "pissa"), "adapter_config"),
    "something nobody knows yet": (setting("use_next_year", 1), "adapter_config"),
    "brackets without end": (
        lambda f: (f / "policy" / ADAPTER_CONFIG).write_text("[" * 100_000),
        "adapter_config",
    ),
    "no target modules": (setting("target_modules", None), "wrong_module"),
    "a pattern of target modules": (setting("target_modules", ".*proj"), "wrong_module"),
    "a target module of no such name": (setting("target_modules", ["lm_head"]), "wrong_module"),
    "fewer target modules": (setting("target_modules", ["q_proj"]), "wrong_module"),
    "no rank": (setting("r", None), "wrong_rank"),
    "a rank in words": (setting("r", "four"), "wrong_rank"),
    "rank 0": (setting("r", 0), "wrong_rank"),
    "too high a rank": (setting("r", 64), "wrong_rank"),
    "no scale": (setting("lora_alpha", None), "wrong_alpha"),
    "another scale": (setting("lora_alpha", 1e6), "wrong_alpha"),
}


def test_a_good_version_passes(publisher: Publisher, check):
    manifest = check(publisher.write(1))
    assert (manifest.version, manifest.parent) == (1, 0)
    parent = publisher.write(2, 1)
    assert check(parent, publisher.write(3, 2)).version == 2


@pytest.mark.parametrize(("spoil", "reason"), BAD_TENSORS.values(), ids=BAD_TENSORS.keys())
def test_tensors_that_are_no_sound_update_are_refused(
    publisher: Publisher, check, spoil, reason: str
):
    with pytest.raises(BadPolicyVersion) as raised:
        check(publisher.write(1, spoil=spoil))
    assert raised.value.reason == reason


@pytest.mark.parametrize(("spoil", "reason"), BAD_SETTINGS.values(), ids=BAD_SETTINGS.keys())
def test_settings_that_an_engine_would_refuse_or_ignore_are_refused(
    publisher: Publisher, check, spoil, reason: str
):
    row = publisher.write(1, spoil=spoil)
    with pytest.raises(BadPolicyVersion) as raised:
        check(row)
    assert raised.value.reason == reason


OTHER_BASE = BaseModelIdentity(digest="o" * 64, tokenizer_digest="o" * 64)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"base_model": OTHER_BASE}, "wrong_base_model"),
        ({"dtype": "float64"}, "wrong_dtype"),
        ({"verdict": None}, "wrong_verdict"),
        ({"parent": 7}, "wrong_version"),
        ({"policy": "default", "parent": None}, "wrong_version"),
        ({"policy_adapter": None}, "adapter_missing"),
        ({"reward_adapter": None}, "adapter_missing"),
    ],
)
def test_a_manifest_that_fits_something_else_is_refused(
    publisher: Publisher, check, change: dict[str, Any], reason: str
):
    row = publisher.write(1, alter=lambda manifest: manifest.model_copy(update=change))
    with pytest.raises(BadPolicyVersion) as raised:
        check(row)
    assert raised.value.reason == reason


def test_another_tokenizer_of_the_same_base_model_is_refused(publisher: Publisher, check):
    def tokenize_otherwise(manifest: Manifest) -> Manifest:
        base = manifest.base_model.model_copy(update={"tokenizer_digest": "o" * 64})
        return manifest.model_copy(update={"base_model": base})

    with pytest.raises(BadPolicyVersion) as raised:
        check(publisher.write(1, alter=tokenize_otherwise))
    assert raised.value.reason == "wrong_tokenizer"


@pytest.mark.parametrize("alpha", [0.0, -8.0, -1e9])
def test_a_scale_that_turns_an_update_round_is_refused(publisher: Publisher, check, alpha: float):
    """The manifest says the same, so that nothing but the number itself is wrong."""

    def claim(manifest: Manifest) -> Manifest:
        assert manifest.reward_adapter is not None
        facts = manifest.reward_adapter.model_copy(update={"alpha": alpha})
        return manifest.model_copy(update={"reward_adapter": facts})

    with pytest.raises(BadPolicyVersion) as raised:
        check(publisher.write(1, spoil=setting("lora_alpha", alpha), alter=claim))
    assert raised.value.reason == "wrong_alpha"


def test_target_modules_may_be_whole_names_or_their_last_parts(publisher: Publisher, check):
    def in_full(folder: Path) -> None:
        names = [
            name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            for name in load_file(folder / "reward" / WEIGHTS)
            if name.endswith("lora_A.weight")
        ]
        setting("target_modules", names)(folder)

    assert check(publisher.write(1, spoil=in_full)).version == 1


def test_tensors_of_a_module_that_is_no_target_are_refused(publisher: Publisher, check):
    """vLLM would load them, and PEFT would not."""

    def claim_fewer(manifest: Manifest) -> Manifest:
        assert manifest.reward_adapter is not None
        facts = manifest.reward_adapter.model_copy(update={"target_modules": ("q_proj",)})
        return manifest.model_copy(update={"reward_adapter": facts})

    with pytest.raises(BadPolicyVersion) as raised:
        check(publisher.write(1, spoil=setting("target_modules", ["q_proj"]), alter=claim_fewer))
    assert raised.value.reason == "wrong_module"


def test_target_modules_that_are_not_the_manifests_are_refused(publisher: Publisher, check):
    def claim_fewer(manifest: Manifest) -> Manifest:
        assert manifest.reward_adapter is not None
        facts = manifest.reward_adapter.model_copy(update={"target_modules": ("q_proj",)})
        return manifest.model_copy(update={"reward_adapter": facts})

    with pytest.raises(BadPolicyVersion, match="wrong_module: reward: target_modules are not the"):
        check(publisher.write(1, alter=claim_fewer))


@pytest.mark.parametrize(
    "name",
    ["policy/adapter_model.bin", "value/code.py", "reward/new_embeddings.safetensors", "setup.py"],
)
def test_a_file_that_nothing_reads_is_refused_though_the_manifest_lists_it(
    publisher: Publisher, check, name: str
):
    def add(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"x")

    with pytest.raises(BadPolicyVersion) as raised:
        check(publisher.write(1, spoil=add))
    assert raised.value.reason == "extra_file"


def test_the_critic_comes_along(publisher: Publisher, check):
    def add(folder: Path) -> None:
        (folder / "value").mkdir()
        save_file({"weight": torch.ones(1, 64)}, folder / "value" / "value_head.safetensors")

    assert check(publisher.write(1, spoil=add)).version == 1


def test_a_folder_that_is_a_link_is_refused(publisher: Publisher, check, state: State):
    row = publisher.write(1)
    folder = state.versions / row.folder
    folder.rename(state.folder / "elsewhere")
    folder.symlink_to(state.folder / "elsewhere")
    with pytest.raises(BadPolicyVersion) as raised:
        check(row)
    assert raised.value.reason == "link"


@pytest.mark.parametrize("folder", ["default/../../elsewhere", "/elsewhere"])
def test_a_row_whose_folder_leads_out_of_the_versions_is_refused(
    publisher: Publisher, check, folder: str
):
    with pytest.raises(BadPolicyVersion) as raised:
        check(replace(publisher.write(1), folder=folder))
    assert raised.value.reason == "wrong_folder"


@pytest.mark.parametrize("role", ["policy_digest", "reward_digest"])
def test_a_row_that_names_other_adapters_than_the_manifest_is_refused(
    publisher: Publisher, check, role: str
):
    """What replies are recorded under has to be what gave them."""
    with pytest.raises(BadPolicyVersion) as raised:
        check(replace(publisher.write(1), **{role: "0" * 64}))
    assert raised.value.reason == "wrong_digest"


def test_another_verdict_is_refused(publisher: Publisher, check):
    def turn_around(manifest: Manifest) -> Manifest:
        assert manifest.verdict is not None
        verdict = manifest.verdict
        swapped = verdict.model_copy(update={"up": verdict.down, "down": verdict.up})
        return manifest.model_copy(update={"verdict": swapped})

    with pytest.raises(BadPolicyVersion, match="another question"):
        check(publisher.write(1, alter=turn_around))


def test_a_row_that_points_to_another_versions_folder_is_refused(publisher: Publisher, check):
    first, second = publisher.write(1), publisher.write(2)
    swapped = replace(second, folder=first.folder, manifest_digest=first.manifest_digest)
    with pytest.raises(BadPolicyVersion) as raised:
        check(swapped)
    assert raised.value.reason == "wrong_version"


def test_weights_that_are_not_the_ones_the_manifest_names_are_refused(publisher: Publisher, check):
    def claim_other(manifest: Manifest) -> Manifest:
        assert manifest.policy_adapter is not None
        other = manifest.policy_adapter.model_copy(update={"digest": "0" * 64})
        return manifest.model_copy(update={"policy_adapter": other})

    with pytest.raises(BadPolicyVersion) as raised:
        check(publisher.write(1, alter=claim_other))
    assert raised.value.reason == "wrong_digest"


def test_files_altered_after_the_fact_are_refused(publisher: Publisher, check, state: State):
    row = publisher.write(1)
    weights = state.versions / row.folder / "policy" / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(BadPolicyVersion) as raised:
        check(row)
    assert raised.value.reason == "file_altered"


def test_an_update_may_grow_only_so_fast_from_its_parent(publisher: Publisher, check):
    parent = publisher.write(1, scale=0.2)
    check(publisher.write(2, 1, scale=1.0), parent)
    with pytest.raises(BadPolicyVersion, match=r"too_large: policy: .* the bound is"):
        check(publisher.write(3, 1, scale=20.0), parent)


def test_a_young_adapter_may_grow_from_nothing(publisher: Publisher, check):
    parent = publisher.write(1, scale=1e-6)
    check(publisher.write(2, 1, scale=0.1), parent)
    with pytest.raises(BadPolicyVersion, match="too_large"):
        check(publisher.write(3, 1, scale=2.0), parent)


def test_a_module_that_the_parent_left_alone_may_grow_from_nothing(publisher: Publisher, check):
    def leave_alone(values: dict[str, torch.Tensor]) -> None:
        del values[f"{Q_PROJ}.lora_A.weight"], values[f"{Q_PROJ}.lora_B.weight"]

    parent = publisher.write(1, scale=0.2, spoil=tensors(leave_alone))
    check(publisher.write(2, 1, scale=0.2), parent)

    def grow(values: dict[str, torch.Tensor]) -> None:
        values[f"{Q_PROJ}.lora_B.weight"].mul_(10)

    with pytest.raises(BadPolicyVersion, match=r"too_large: policy: .*layers.0.self_attn.q_proj"):
        check(publisher.write(3, 1, scale=0.2, spoil=tensors(grow)), parent)


def test_a_parent_that_is_not_what_was_published_proves_nothing(
    publisher: Publisher, check, state: State
):
    parent, child = publisher.write(1), publisher.write(2, 1)
    (state.versions / parent.folder / "policy" / WEIGHTS).write_bytes(b"larger")
    with pytest.raises(BadPolicyVersion, match="parent_damaged: version 1: file_altered"):
        check(child, parent)
    assert check(child).version == 2  # one that served before was compared with it then
