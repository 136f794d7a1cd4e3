"""GPT-2 with adapters: vLLM's own class, told which of its layers may be wrapped.

transformers keeps GPT-2's matrices transposed (Conv1D), adapters do not: A is (rank, inputs) and B
(outputs, rank) as everywhere. `c_attn` holds query, key and value in one matrix and has one adapter.
"""

from typing import ClassVar

from vllm.model_executor.models.gpt2 import GPT2LMHeadModel
from vllm.model_executor.models.interfaces import SupportsLoRA


class AdaptableGPT2(GPT2LMHeadModel, SupportsLoRA):  # type: ignore[misc]
    """GPT2LMHeadModel that takes LoRA on all of its linear layers."""

    packed_modules_mapping: ClassVar[dict[str, list[str]]] = {"c_attn": ["c_attn"]}
    embedding_modules: ClassVar[dict[str, str]] = {}
