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
        folder = state.versions / parent.folder if parent else None
        return verify(state.versions, row, folder, expected, LIMITS)

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
