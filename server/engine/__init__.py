"""The inference engine: one protocol, vLLM behind it. All vllm imports live in this package."""

from server.engine.protocol import (
    BACKGROUND_PRIORITY,
    REPLY_PRIORITY,
    SECOND_WAVE_PRIORITY,
    Adapter,
    Engine,
    Sampled,
)

__all__ = [
    "BACKGROUND_PRIORITY",
    "REPLY_PRIORITY",
    "SECOND_WAVE_PRIORITY",
    "Adapter",
    "Engine",
    "Sampled",
]
