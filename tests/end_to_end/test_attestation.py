"""Real rounding and a small step: the engine's numbers still tell a version from its parent."""

from pathlib import Path

import pytest
import torch

from server.attestation import attest
from server.engine import Engine
from server.routes import LoadedVersion
from tests.rows import version
from thumbloop.artifacts import POLICY, REWARD, AdapterFacts, BaseModelIdentity, Lineage, Manifest
from thumbloop.config import Verdict
from thumbloop.config.trainer import Lora, Resources
from thumbloop.errors import BadPolicyVersion
from thumbloop.rendering import VerdictTokens, verdict_tokens
from trainer import probes
from trainer.models import ADAPTERS, Trunk

pytestmark = pytest.mark.asyncio(loop_scope="session")

BASE, STEP = 0.05, 0.01
"""Standard deviations of a parent's weights, and of what a round adds to them."""


@pytest.fixture
def verdict(bfloat16_engine: Engine) -> VerdictTokens:
    return verdict_tokens(Verdict(), bfloat16_engine.tokenizer)


def train(model: Path, verdict: VerdictTokens, folder: Path) -> Manifest:
    """Write a parent and its child as a trainer does in float32; return what the child's manifest says of it."""
    trunk = Trunk.open(model, Lora(rank=4, alpha=8.0), verdict, Resources(device="cpu"))
    generator = torch.Generator().manual_seed(3)
    written = []
    for name, scale in (("parent", BASE), ("child", STEP)):
        for adapter in ADAPTERS:
            weights = {
                key: weight + scale * torch.randn(weight.shape, generator=generator)
                for key, weight in trunk.snapshot(adapter).items()
            }
            trunk.restore(adapter, weights)
        written.append({adapter: trunk.snapshot(adapter) for adapter in ADAPTERS})
        (folder / name).mkdir()
        trunk.save(folder / name)
    made = probes.make(
        trunk,
        written[0],
        vocabulary=range(8, 290),
        end=(1,),
        generator=generator,
    )
    facts = {
        adapter: AdapterFacts(digest="", rank=4, alpha=8.0, target_modules=(), distance=distance)
        for adapter, distance in ((POLICY, made.policy_distance), (REWARD, made.reward_distance))
    }
    return Manifest(
        policy="default",
        version=2,
        parent=1,
        created_at=0.0,
        base_model=BaseModelIdentity(digest="", tokenizer_digest=""),
        policy_adapter=facts[POLICY],
        reward_adapter=facts[REWARD],
        probes=made.probes,
        lineage=Lineage(round_id=""),
    )


async def test_in_bfloat16_a_version_is_attested_and_its_parent_in_its_place_is_not(
    bfloat16_engine: Engine, tiny_model: Path, verdict: VerdictTokens, tmp_path: Path
):
    engine, manifest = bfloat16_engine, train(tiny_model, verdict, tmp_path)
    held = {
        name: await engine.load(f"attested-{name}", tmp_path / name)
        for name in ("parent/policy", "parent/reward", "child/policy", "child/reward")
    }

    async def served(policy: str, reward: str) -> None:
        loaded = LoadedVersion(version(2, 1), held[f"{policy}/policy"], held[f"{reward}/reward"])
        await attest(engine, verdict, loaded, manifest)

    try:
        await served("child", "child")
        for pair in (("parent", "child"), ("child", "parent"), ("parent", "parent")):
            with pytest.raises(BadPolicyVersion) as refused:
                await served(*pair)
            assert refused.value.reason == "attestation"
    finally:
        for adapter in held.values():
            await engine.unload(adapter)
