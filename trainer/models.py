"""One trunk, four roles: policy, reference, reward model and value head.

The policy is the trunk with the policy adapter, the reference the trunk without any, the reward
model the trunk with the reward adapter, and the value head reads the reference's hidden states. The
trunk itself is never trained.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from thumbloop.artifacts import VALUE
from thumbloop.config.trainer import Lora, Resources
from thumbloop.errors import SettingsError
from thumbloop.rendering import VerdictTokens
from trainer.adapters import load_adapter, lora_config, save_adapter, save_weights
from trainer.batches import Batch, collate
from trainer.critic import ValueHead
from trainer.distributions import describe_tokens
from trainer.pace import Pace
from trainer.packing import ATTENTION, checkpoint_layers, packed_states, padded_states
from trainer.parallel import ALONE, Workers

VALUE_WEIGHTS = "value_head.safetensors"

Adapter = Literal["policy", "reward"]
Role = Literal["policy", "reference", "reward"]

ADAPTERS: tuple[Adapter, ...] = ("policy", "reward")

ON_CPU, ON_GPU = 512, 16384
"""Tokens computed at a time: as many as stay in a CPU's caches, as many as keep a GPU busy."""
ITS_DEFAULTS = Resources()


class Response(NamedTuple):
    """What the trunk says of the responses of a batch; (B, T) and 0 in padding unless noted, nats."""

    logprobs: Tensor
    entropy: Tensor  # exact, in that state, without a gradient; 0 where it is not asked for
    kl: Tensor  # from the reference, exact, in that state; 0 where it is not asked for
    hidden: Tensor  # (B, T + 1, H): state before each token and after the last


class Trunk:
    """A causal language model with a policy and a reward adapter on all linear layers."""

    def __init__(
        self,
        model: nn.Module,
        lora: Lora,
        verdict: VerdictTokens,
        resources: Resources = ITS_DEFAULTS,
        workers: Workers = ALONE,
    ) -> None:
        self.lora = lora
        self.verdict = verdict
        self.device = next(model.parameters()).device
        self.dtype = next(model.parameters()).dtype
        self.workers = workers
        self.pace = Pace(resources.max_share, self.device)
        at_once = ON_CPU if self.device.type == "cpu" else ON_GPU
        self.micro_batch_tokens = resources.micro_batch_tokens or at_once
        model.eval()
        if resources.gradient_checkpointing:
            checkpoint_layers(model)
        # GPT-2 keeps its matrices transposed.
        is_transposed = any(isinstance(module, Conv1D) for module in model.modules())
        config = partial(lora_config, lora, fan_in_fan_out=is_transposed)
        self.model: PeftModel = get_peft_model(model, config(), adapter_name="policy")
        self.model.add_adapter("reward", config())
        self.causal: Any = self.model.get_base_model()
        self.context = int(self.causal.config.max_position_embeddings)
        self.hidden_size = int(self.causal.config.hidden_size)
        self.target_modules = tuple(sorted(self.model.peft_config["policy"].target_modules))
        self.value_head = self.new_value_head()
        self.is_packed = self._can_pack()
        self.reset()

    @classmethod
    def open(
        cls,
        folder: Path,
        lora: Lora,
        verdict: VerdictTokens,
        resources: Resources,
        workers: Workers = ALONE,
    ) -> "Trunk":
        """Load the base model; `auto` is CUDA where there is one, float32 on a CPU, else bfloat16.

        Raises SettingsError: its logits are made in a way that the trainer does not know.
        """
        device, dtype = resources.device, resources.dtype
        if device == "auto":
            device = workers.device or ("cuda" if torch.cuda.is_available() else "cpu")
        if dtype == "auto":
            dtype = "float32" if device.startswith("cpu") else "bfloat16"
        model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=getattr(torch, dtype))
        trunk = cls(model.to(device), lora, verdict, resources, workers)
        trunk.check_logits()
        return trunk

    @property
    def dtype_name(self) -> str:
        """Return the dtype of the trunk's weights as settings and manifests call it."""
        return str(self.dtype).removeprefix("torch.")

    def reset(self) -> None:
        """Make both adapters do nothing, as in version 0; draws fresh A matrices."""
        for module in self.model.modules():
            if hasattr(module, "reset_lora_parameters"):
                for name in ADAPTERS:
                    module.reset_lora_parameters(name, True)
        self.value_head = self.new_value_head()

    def new_value_head(self) -> ValueHead:
        """Return an untrained critic of the right size."""
        return ValueHead(self.hidden_size).to(self.device)

    def parameters(self, adapter: Adapter) -> dict[str, nn.Parameter]:
        """Return the adapter's own weights by name."""
        return {n: p for n, p in self.model.named_parameters() if f".{adapter}." in n}

    def snapshot(self, adapter: Adapter) -> dict[str, Tensor]:
        """Return a copy of the adapter's weights, for restore()."""
        return {name: p.detach().clone() for name, p in self.parameters(adapter).items()}

    @torch.no_grad()
    def restore(self, adapter: Adapter, weights: Mapping[str, Tensor]) -> None:
        """Put back weights that snapshot() took."""
        for name, parameter in self.parameters(adapter).items():
            parameter.copy_(weights[name])

    @torch.no_grad()
    def update_norms(self, adapter: Adapter) -> dict[str, float]:
        """Return the Frobenius norm of alpha / rank * B A for each module."""
        weights = self.parameters(adapter)
        scale = self.lora.alpha / self.lora.rank
        norms = {}
        for name, a in weights.items():
            if ".lora_A." in name:
                b = weights[name.replace(".lora_A.", ".lora_B.")]
                squared = ((b.T @ b) * (a @ a.T)).sum()  # trace of (BA)^T BA without forming BA
                norms[name.split(".lora_A.")[0]] = scale * float(squared.clamp(min=0).sqrt())
        return norms

    @contextmanager
    def role(self, role: Role) -> Iterator[None]:
        """Make the trunk speak in one role; the trunk and the other adapter get no gradient."""
        if role == "reference":
            with self.model.disable_adapter():
                yield
        else:
            self.model.set_adapter(role)
            yield

    def respond(
        self,
        batch: Batch,
        temperature: Tensor,
        role: Role,
        *,
        reference: Tensor | None = None,
        has_entropy: bool = False,
    ) -> Response:
        """Say of the batch's responses how likely they are at temperature (B, 1).

        `reference` (B, T + 1, H): the reference's hidden states, to be compared with. Logits are
        computed for the tokens of responses only, never for a prompt or for padding.
        """
        mask = batch.mask
        with self.role(role):
            hidden = self._states(batch)[batch.states]
        said = describe_tokens(
            self.logits,
            hidden[:, :-1][mask],
            batch.responses[mask],
            temperature.expand_as(mask)[mask],
            None if reference is None else reference[:, :-1][mask],
            vocabulary=self.causal.get_output_embeddings().weight.shape[0],
            has_entropy=has_entropy,
        )
        blank = torch.zeros(mask.shape, device=mask.device)
        logprobs, entropy, kl = (blank.masked_scatter(mask, x) for x in said)
        return Response(logprobs, entropy, kl, hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits (..., V) of hidden states (..., H); the head is the same in every role."""
        logits: Tensor = self.causal.get_output_embeddings()(hidden.to(self.dtype))
        return self._scaled(logits)

    def _scaled(self, logits: Tensor) -> Tensor:
        """Do to logits what some architectures do: Granite and Cohere scale them, Gemma 2 caps them."""
        config = self.causal.config
        if divisor := getattr(config, "logits_scaling", None):
            logits = logits / divisor
        if factor := getattr(config, "logit_scale", None):
            logits = logits * factor
        if cap := getattr(config, "final_logit_softcapping", None):
            logits = torch.tanh(logits / cap) * cap
        return logits

    @torch.no_grad()
    def check_logits(self) -> None:
        """Compare with the model's own logits. Raises SettingsError: it does something we do not know."""
        tokens = torch.arange(1, 5, device=self.device)[None]
        batch = collate([((1, 2, 3), (4,))]).to(self.device)
        with self.role("reference"):
            ours = self.logits(self._states(batch))
            own = self.causal(input_ids=tokens, use_cache=False).logits[0]
        if not torch.allclose(ours, own, rtol=1e-2, atol=1e-2):
            raise SettingsError(
                f"model.path: {type(self.causal).__name__} makes its logits in a way that the trainer"
                " does not know; choose a model of another architecture"
            )

    def rewards(self, batch: Batch) -> Tensor:
        """Return the logit of a thumb up (B,) for a batch whose responses end with the verdict prompt."""
        with self.role("reward"):
            hidden = self._states(batch)[batch.states[:, -1]]
        logits = self.logits(hidden).float()
        rewards: Tensor = logits[:, self.verdict.up] - logits[:, self.verdict.down]
        return rewards

    def next_logits(self, batch: Batch) -> Tensor:
        """Return the policy's logits (B, V) for the token after each response."""
        with self.role("policy"):
            hidden = self._states(batch)[batch.states[:, -1]]
        return self.logits(hidden).float()

    def _states(self, batch: Batch) -> Tensor:
        """Return the last hidden states (N, H)."""
        states = packed_states if self.is_packed else padded_states
        return states(self.causal.base_model, batch)

    @torch.no_grad()
    def _can_pack(self) -> bool:
        """Say whether tokens meet in attention only: not where a state or a convolution runs over them."""
        pairs = [((1, 2, 3), (4, 5)), ((1, 2, 3), (6,)), ((7,), (8, 9, 1))]
        batch = collate(pairs).to(self.device)
        if self.causal.config._attn_implementation not in ("sdpa", ATTENTION):
            return False
        with self.role("reference"):
            padded = padded_states(self.causal.base_model, batch)
            self.causal.set_attn_implementation(ATTENTION)
            packed = packed_states(self.causal.base_model, batch)
        # Of the whole, as single numbers are rounded by more in half precision.
        error = (packed - padded).float().norm() / padded.float().norm()
        return bool(error < (1e-4 if self.dtype is torch.float32 else 5e-2))

    def load(self, folder: Path) -> None:
        """Take both adapters, and the critic where there is one, from a version's folder."""
        for adapter in ADAPTERS:
            load_adapter(self.model, adapter, folder / adapter, self.lora)
        if (folder / VALUE).is_dir():
            head = self.new_value_head()
            head.load_state_dict(load_file(folder / VALUE / VALUE_WEIGHTS))
            self.value_head = head

    def save(self, folder: Path) -> None:
        """Write policy/ and reward/ in plain PEFT layout and value/, into an existing folder."""
        for adapter in ADAPTERS:
            (folder / adapter).mkdir()
            save_adapter(self.model, adapter, folder / adapter)
        (folder / VALUE).mkdir()
        save_weights(self.value_head.state_dict(), folder / VALUE / VALUE_WEIGHTS)
