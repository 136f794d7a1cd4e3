"""An adapter that changes nothing, so that the base model is served like any other version.

vLLM's CPU operators give rows without an adapter another row's adapter when a batch mixes both; with
this one no row is without.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from thumbloop.artifacts import ADAPTER_CONFIG, WEIGHTS


def write_zero_adapter(model: Path, folder: Path) -> Path:
    """Write a rank-1 adapter with all weights zero for every linear layer but the head."""
    shapes = linear_shapes(model)
    tensors: dict[str, torch.Tensor] = {}
    for name, (outputs, inputs) in shapes.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.zeros(1, inputs)
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.zeros(outputs, 1)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 1,
        "lora_alpha": 1,
        "bias": "none",
        "target_modules": sorted({name.rpartition(".")[2] for name in shapes}),
    }
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config))
    return folder


def linear_shapes(model: Path) -> dict[str, tuple[int, int]]:
    """Return (outputs, inputs) of every linear layer but the head, by module name."""
    with torch.device("meta"):
        trunk = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
    head = trunk.get_output_embeddings()
    modules = {name: m for name, m in trunk.named_modules() if m is not head}
    linear = {n: m for n, m in modules.items() if isinstance(m, nn.Linear)}
    transposed = {n: m for n, m in modules.items() if isinstance(m, Conv1D)}  # GPT-2's
    return {n: (m.out_features, m.in_features) for n, m in linear.items()} | {
        n: (m.nf, m.nx) for n, m in transposed.items()
    }
