"""Bad versions of every kind are published under load on real vLLM: each is refused with its reason, and no
reply beside them changes by a bit."""

import asyncio
import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.end_to_end.test_swap import state_of
from tests.fakes import FakeEngine
from tests.publishing import FakeSpeaker, Publisher
from tests.serving import Running
from thumbloop.artifacts import (
    ADAPTER_CONFIG,
    MANIFEST,
    WEIGHTS,
    AdapterFacts,
    BaseModelIdentity,
    Manifest,
    folder_of,
)
from thumbloop.client import GenerateOptions
from thumbloop.config import State
from thumbloop.rendering import VerdictTokens
from thumbloop.types import DEFAULT_POLICY, PolicyVersion
from thumbloop.v1 import admin_pb2

pytestmark = pytest.mark.asyncio(loop_scope="session")

USERS = 4
SURROUNDING = 200
GREEDY = GenerateOptions(max_tokens=8, temperature=0.0, num_candidates=1)
PROMPTS = [("what did you think of the film " * n)[: 7 + 23 * n] + f"{n}?" for n in range(12)]
Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"

Tensors = dict[str, torch.Tensor]
Row = Callable[[PolicyVersion, Path], PolicyVersion | None]


class Bad(NamedTuple):
    """How a version is wrong: before it is sealed, in what its manifest says, or afterwards."""

    reason: str
    spoil: Callable[[Path], object] = lambda _draft: None
    alter: Callable[[Manifest], Manifest] = lambda manifest: manifest
    tamper: Row = lambda _row, _folder: None


def tensors(change: Callable[[Tensors], object], role: str = "policy") -> Callable[[Path], None]:
    def spoil(draft: Path) -> None:
        values = load_file(draft / role / WEIGHTS)
        change(values)
        save_file(values, draft / role / WEIGHTS)

    return spoil


def a_tensor(value: torch.Tensor) -> Callable[[Path], None]:
    return tensors(lambda t: t.update({f"{Q_PROJ}.lora_A.weight": value}))


def an_entry(value: float) -> Callable[[Path], None]:
    return tensors(lambda t: t[f"{Q_PROJ}.lora_B.weight"].__setitem__((3, 1), value))


def times(factor: float, role: str = "policy") -> Callable[[Path], None]:
    def scale(values: Tensors) -> None:
        for name in values:
            if name.endswith("lora_B.weight"):
                values[name].mul_(factor)

    return tensors(scale, role)


def setting(name: str, value: object) -> Callable[[Path], None]:
    def spoil(draft: Path) -> None:
        path = draft / "policy" / ADAPTER_CONFIG
        path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))

    return spoil


def saying(**changes: Any) -> Callable[[Manifest], Manifest]:
    return lambda manifest: manifest.model_copy(update=changes)


def of_adapter(**changes: Any) -> Callable[[Manifest], Manifest]:
    def alter(manifest: Manifest) -> Manifest:
        facts: AdapterFacts | None = manifest.policy_adapter
        assert facts is not None
        return manifest.model_copy(update={"policy_adapter": facts.model_copy(update=changes)})

    return alter


def of_base(name: str) -> Callable[[Manifest], Manifest]:
    def alter(manifest: Manifest) -> Manifest:
        base: BaseModelIdentity = manifest.base_model.model_copy(update={name: "0" * 64})
        return manifest.model_copy(update={"base_model": base})

    return alter


def turn_the_verdict_round(manifest: Manifest) -> Manifest:
    assert manifest.verdict is not None
    turned = {"up": manifest.verdict.down, "down": manifest.verdict.up}
    return manifest.model_copy(update={"verdict": manifest.verdict.model_copy(update=turned)})


def of_probes(change: Callable[[Any], dict[str, Any]]) -> Callable[[Manifest], Manifest]:
    def alter(manifest: Manifest) -> Manifest:
        probes = tuple(probe.model_copy(update=change(probe)) for probe in manifest.probes)
        return manifest.model_copy(update={"probes": probes})

    return alter


def flip_a_bit(_row: PolicyVersion, folder: Path) -> None:
    path = folder / "reward" / WEIGHTS
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def link(_row: PolicyVersion, folder: Path) -> None:
    path = folder / "policy" / WEIGHTS
    path.rename(folder.parent / "elsewhere")
    path.symlink_to(folder.parent / "elsewhere")


def alter_the_manifest(_row: PolicyVersion, folder: Path) -> None:
    path = folder / MANIFEST
    path.write_text(path.read_text().replace('"alpha": 8.0', '"alpha": 80.0'))


def empty_the_manifest(row: PolicyVersion, folder: Path) -> PolicyVersion:
    (folder / MANIFEST).write_text("{}")
    return replace(row, manifest_digest=hashlib.sha256(b"{}").hexdigest())


def bad_versions(parent: Path) -> dict[str, Bad]:
    """Return every kind, by what is wrong; `parent` is the folder of the current version."""

    def copy_parent(role: str) -> Callable[[Path], object]:
        return lambda draft: shutil.copy(parent / role / WEIGHTS, draft / role / WEIGHTS)

    return {
        "a pickle": Bad(
            "not_safetensors", lambda d: torch.save({"a": torch.ones(1)}, d / "policy" / WEIGHTS)
        ),
        "other weights than were published": Bad("file_altered", tamper=flip_a_bit),
        "a file less": Bad(
            "file_missing", tamper=lambda _row, f: (f / "reward" / ADAPTER_CONFIG).unlink()
        ),
        "a file more": Bad(
            "extra_file", tamper=lambda _row, f: (f / "policy" / "a.py").write_text("1") and None
        ),
        "a pickle beside": Bad(
            "extra_file", lambda d: (d / "policy" / "adapter_model.bin").write_bytes(b"x")
        ),
        "a link": Bad("link", tamper=link),
        "no manifest": Bad("manifest_missing", tamper=lambda _row, f: (f / MANIFEST).unlink()),
        "another manifest": Bad("manifest_altered", tamper=alter_the_manifest),
        "a manifest of nothing": Bad("manifest_malformed", tamper=empty_the_manifest),
        "another version's manifest": Bad("wrong_version", alter=saying(version=1)),
        "no such folder": Bad(
            "manifest_missing", tamper=lambda row, _f: replace(row, folder="default/999999")
        ),
        "a folder somewhere else": Bad(
            "wrong_folder", tamper=lambda row, _f: replace(row, folder="../default/000001")
        ),
        "other digests in its row": Bad(
            "wrong_digest", tamper=lambda row, _f: replace(row, policy_digest="0" * 64)
        ),
        "another base model": Bad("wrong_base_model", alter=of_base("digest")),
        "another tokenizer": Bad("wrong_tokenizer", alter=of_base("tokenizer_digest")),
        "turned verdict tokens": Bad("wrong_verdict", alter=turn_the_verdict_round),
        "no reward adapter": Bad("adapter_missing", alter=saying(reward_adapter=None)),
        "too high a rank": Bad("wrong_rank", setting("r", 64), of_adapter(rank=64)),
        "a negative scale": Bad("wrong_alpha", setting("lora_alpha", -8), of_adapter(alpha=-8.0)),
        "DoRA": Bad("adapter_config", setting("use_dora", True)),
        "a module of no such name": Bad(
            "wrong_module",
            tensors(
                lambda t: t.update(
                    {
                        "base_model.model.lm_head.lora_A.weight": torch.ones(4, 64),
                        "base_model.model.lm_head.lora_B.weight": torch.ones(300, 4),
                    }
                )
            ),
        ),
        "a wrong shape": Bad("wrong_shape", a_tensor(torch.ones(4, 65))),
        "a dtype that is not allowed": Bad("wrong_dtype", a_tensor(torch.ones(4, 64).double())),
        "no tensors": Bad("empty_adapter", tensors(lambda t: t.clear())),
        "NaN": Bad("not_finite", an_entry(float("nan"))),
        "infinity": Bad("not_finite", an_entry(float("inf"))),
        "an explosion": Bad("too_large", times(100.0)),
        "a policy that does nothing": Bad("attestation", times(0.0)),
        "a reward model that does nothing": Bad("attestation", times(0.0, "reward")),
        "a policy turned round": Bad("attestation", times(-1.0)),
        "its parent's policy": Bad("attestation", copy_parent("policy")),
        "its parent's reward model": Bad("attestation", copy_parent("reward")),
        "probes that lie of log-probabilities": Bad(
            "attestation",
            alter=of_probes(lambda p: {"logprobs": tuple(x - 0.01 for x in p.logprobs)}),
        ),
        "probes that lie of tokens": Bad(
            "attestation", alter=of_probes(lambda p: {"continuation": p.continuation[::-1]})
        ),
        "probes that lie of rewards": Bad(
            "attestation", alter=of_probes(lambda p: {"reward": p.reward + 0.1})
        ),
        "no probes": Bad("no_probes", alter=saying(probes=())),
        "probes that no engine can be asked": Bad(
            "bad_probes", alter=of_probes(lambda _p: {"prompt": (10**6,)})
        ),
    }


class Heard(NamedTuple):
    """All that a caller gets of a reply, and the store keeps; floats by their bits."""

    version: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[str, ...]
    reward: str


async def ask(server: Running, number: int) -> Heard:
    reply = await server.client.generate(PROMPTS[number], is_text=True, options=GREEDY)
    row = await asyncio.to_thread(server.stored, reply.response_id)
    (candidate,) = row.candidates
    assert (reply.policy_version, reply.text) == (row.policy_version, candidate.text)
    assert candidate.reward is not None
    return Heard(
        row.policy_version,
        candidate.text,
        candidate.token_ids,
        tuple(x.hex() for x in candidate.logprobs),
        candidate.reward.hex(),
    )


class Askers:
    """Users who ask the same again and again, each beginning with another prompt."""

    def __init__(self, server: Running) -> None:
        self._server = server
        self._stopping = asyncio.Event()
        self.heard: list[tuple[int, Heard]] = []
        self._tasks = [asyncio.create_task(self._ask(user)) for user in range(USERS)]

    async def _ask(self, user: int) -> None:
        number = user * len(PROMPTS) // USERS
        while not self._stopping.is_set():
            self.heard.append((number, await ask(self._server, number)))
            number = (number + 1) % len(PROMPTS)

    async def goes_on(self, replies: int) -> None:
        """Wait until there are so many replies more."""
        enough = len(self.heard) + replies
        async with asyncio.timeout(60):
            while len(self.heard) < enough:  # noqa: ASYNC110
                await asyncio.sleep(0.005)

    async def leave(self) -> None:
        self._stopping.set()
        await asyncio.gather(*self._tasks)


@pytest.fixture
def quick(server: Running, tiny_model: Path, state: State, verdict: VerdictTokens) -> Publisher:
    """Publishes what no engine is to see: its probes are a fake's."""
    speaker = FakeSpeaker(FakeEngine(tiny_model))
    return Publisher(tiny_model, state.versions, server.database, verdict, speaker)


async def test_bad_versions_are_refused_and_no_reply_beside_them_changes_by_a_bit(
    server: Running, publisher: Publisher, quick: Publisher, state: State
):
    await asyncio.to_thread(publisher.publish, 1)
    assert (await state_of(server, 1)).state == admin_pb2.POLICY_VERSION_STATE_CURRENT
    kinds = bad_versions(state.versions / folder_of(DEFAULT_POLICY, 1))
    assert len(kinds) >= 14
    before = [await ask(server, number) for number in range(len(PROMPTS))]
    held = {adapter.name for adapter in server.engine.held.values()}

    askers = Askers(server)
    became = {}
    for number, (kind, bad) in enumerate(kinds.items(), start=2):
        write = (publisher if bad.reason == "attestation" else quick).write
        row = await asyncio.to_thread(write, number, 1, spoil=bad.spoil, alter=bad.alter)
        row = bad.tamper(row, state.versions / row.folder) or row
        await asyncio.to_thread(publisher.insert, row)
        shown = await state_of(server, number)
        became[kind] = (
            admin_pb2.PolicyVersionState.Name(shown.state),
            shown.reason.partition(":")[0],
        )
        await askers.goes_on(2)
    await askers.goes_on(SURROUNDING - len(askers.heard))
    await askers.leave()

    refused = "POLICY_VERSION_STATE_REJECTED"
    assert became == {kind: (refused, bad.reason) for kind, bad in kinds.items()}
    assert len(askers.heard) >= SURROUNDING
    assert {number for number, _ in askers.heard} == set(range(len(PROMPTS)))
    assert [heard for number, heard in askers.heard if heard != before[number]] == []
    assert {adapter.name for adapter in server.engine.held.values()} == held

    await asyncio.to_thread(publisher.publish, len(kinds) + 2, 1)  # a good one is still taken
    shown = await state_of(server, len(kinds) + 2)
    assert shown.state == admin_pb2.POLICY_VERSION_STATE_CURRENT, shown.reason
    assert {(await ask(server, number)).version for number in range(2)} == {len(kinds) + 2}
