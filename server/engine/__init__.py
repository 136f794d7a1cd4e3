"""The inference engine: one protocol, vLLM behind it. All vllm imports live in this package."""

from server.engine.protocol import Adapter, Engine, Sampled

__all__ = ["Adapter", "Engine", "Sampled"]
