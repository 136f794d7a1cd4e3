"""LoRA adapters as folders in plain PEFT layout: what PEFT is told, loading and saving."""

from collections.abc import Mapping
from copy import copy
from pathlib import Path

from peft import LoraConfig, PeftModel
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from thumbloop.artifacts import WEIGHTS
from thumbloop.config.trainer import Lora
from thumbloop.errors import SettingsError
from trainer.fused_lora import FusedLinear


def lora_config(lora: Lora, *, fan_in_fan_out: bool) -> LoraConfig:
    """Return what PEFT is told of an adapter on all linear layers."""
    # Neither dropout, bias, DoRA nor modules_to_save: vLLM refuses or ignores them.
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=int(lora.alpha) if lora.alpha.is_integer() else lora.alpha,
        lora_dropout=0.0,
        target_modules="all-linear",
        fan_in_fan_out=fan_in_fan_out,
    )
    config._register_custom_module({nn.Linear: FusedLinear})
    return config


def load_adapter(model: PeftModel, name: str, folder: Path, lora: Lora) -> None:
    """Give one of a model's adapters the weights in a folder.

    Raises SettingsError: they are of another rank or alpha than is set, or of another base model.
    """
    _check_shape(folder, lora)
    weights = load_file(folder / WEIGHTS, device=str(model.device))
    if set_peft_model_state_dict(model, weights, adapter_name=name).unexpected_keys:
        raise SettingsError(f"{folder.parent}: the {name} adapter does not fit the base model")


def save_adapter(model: PeftModel, name: str, folder: Path) -> None:
    """Write one of a model's adapters into an empty folder."""
    weights = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    save_weights(weights, folder / WEIGHTS)
    config = copy(model.peft_config[name])
    config.target_modules = sorted(config.target_modules)  # a set has no order of its own
    config.inference_mode = True
    config.save_pretrained(str(folder))


def save_weights(weights: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors by name, always in the same order."""
    save_file({name: w.detach().cpu().contiguous() for name, w in sorted(weights.items())}, path)


def _check_shape(folder: Path, lora: Lora) -> None:
    config = LoraConfig.from_pretrained(str(folder))
    if (config.r, config.lora_alpha) != (lora.rank, lora.alpha):
        raise SettingsError(
            f"lora: rank {lora.rank} and alpha {lora.alpha} are set, but {folder} was trained with "
            f"{config.r} and {config.lora_alpha}; set those, or start from a fresh state folder"
        )
