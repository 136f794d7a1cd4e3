"""vLLM's CPU worker with our operators in it. Only our own engine names it: others stay as they are."""

from typing import Any

from vllm.lora.model_manager import LoRAModelManager
from vllm.platforms import current_platform
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.worker_base import CompilationTimes

from server.engine.grouped_lora import GroupedLora
from server.engine.kernels import register_kernels
from server.engine.merged_lora import merge_adapters
from server.engine.models import register_models
from server.engine.wrapping import ADAPTED, MERGED_BYTES, unwrapped

GROUPED_LORA = "server.engine.grouped_lora.GroupedLora"


class Worker(CPUWorker):  # type: ignore[misc]
    """The CPU worker with grouped or merged LoRA."""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load the model with its linear layers wrapped, and make sure that none was left out."""
        register_models()
        register_kernels()
        type(current_platform).get_punica_wrapper = classmethod(lambda _cls: GROUPED_LORA)
        super().load_model(*args, **kwargs)
        manager = self._adapters
        settings = self.vllm_config.additional_config
        if left_out := unwrapped(
            settings[ADAPTED], manager.modules, manager.packed_modules_mapping
        ):
            raise RuntimeError(f"vLLM would ignore what adapters say of {', '.join(left_out)}")
        merge_adapters(
            self._lora, manager.modules.values(), manager.lora_slots, settings[MERGED_BYTES]
        )

    def compile_or_warm_up_model(self) -> CompilationTimes:
        """Warm up, the last thing before requests come, and forget the adapters made up for it."""
        times = super().compile_or_warm_up_model()
        self._lora.forget()
        return times

    @property
    def _adapters(self) -> LoRAModelManager:
        return self.model_runner.lora_manager._adapter_manager

    @property
    def _lora(self) -> GroupedLora:
        (lora,) = self._adapters.punica_wrapper_mapping.values()
        assert isinstance(lora, GroupedLora), "vLLM asks the platform for its operators"
        return lora
