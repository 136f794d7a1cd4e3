"""Model classes that vLLM lacks, made known to it; in every process that builds or inspects a model."""

from vllm import ModelRegistry

OURS = {"GPT2LMHeadModel": "server.engine.gpt2:AdaptableGPT2"}


def register_models() -> None:
    """Put our classes in place of vLLM's, by name: none is imported before it is needed."""
    for architecture, where in OURS.items():
        ModelRegistry.register_model(architecture, where)
