"""vLLM's CPU worker with our operators in it. Only our own engine names it: others stay as they are."""

from typing import Any

from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.v1.worker.cpu_worker import CPUWorker

from server.engine.kernels import register_kernels
from server.engine.merged_lora import merge_adapters
from server.engine.models import register_models
from server.engine.wrapping import ADAPTED, MERGED_BYTES, unwrapped

log = init_logger(f"vllm.{__name__}")  # vLLM's processes show what is logged under its own name

GROUPED_LORA = "server.engine.grouped_lora.GroupedLora"


class Worker(CPUWorker):  # type: ignore[misc]
    """The CPU worker with grouped or merged LoRA."""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load the model with its linear layers wrapped, and make sure that none was left out."""
        register_models()
        register_kernels()
        type(current_platform).get_punica_wrapper = classmethod(lambda _cls: GROUPED_LORA)
        super().load_model(*args, **kwargs)
        manager = self.model_runner.lora_manager._adapter_manager
        settings = self.vllm_config.additional_config
        if left_out := unwrapped(
            settings[ADAPTED], manager.modules, manager.packed_modules_mapping
        ):
            raise RuntimeError(f"vLLM would ignore what adapters say of {', '.join(left_out)}")
        (lora,) = manager.punica_wrapper_mapping.values()
        is_merged = merge_adapters(
            lora, manager.modules.values(), manager.lora_slots, settings[MERGED_BYTES]
        )
        log.info("adapters are %s", "merged into copies of the weights" if is_merged else "grouped")
