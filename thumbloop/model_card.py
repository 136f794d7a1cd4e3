"""The model card of a version: what others have to know of an adapter, as Hugging Face's hub reads it. Pure."""

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

import yaml

from thumbloop.artifacts import Manifest
from thumbloop.store.lineage import Inputs
from thumbloop.types import PolicyVersion

_TAGS = ["lora", "rlhf", "ppo", "thumbloop"]


class Subject(NamedTuple):
    """A version: its row and manifest, its line of ancestors down to the base model, itself first, and what the round
    of each used, by round. `base_model` is what others call the base model; empty: nobody said."""

    version: PolicyVersion
    manifest: Manifest
    line: Sequence[PolicyVersion]
    used: Mapping[str, Inputs]
    base_model: str = ""


def model_card(of: Subject) -> str:
    """Return the card, Markdown under a header of YAML."""
    parts = [
        _header(of),
        f"# Version {of.version.version} of policy {of.version.policy}\n",
        _summary(of),
        _use(of),
        _learned(of),
        _metrics(of),
        _settings(of),
        _files(of),
    ]
    return "\n".join(part for part in parts if part)


def _header(of: Subject) -> str:
    header: dict[str, Any] = {"base_model": of.base_model} if of.base_model else {}
    header |= {"library_name": "peft", "pipeline_tag": "text-generation", "tags": _TAGS}
    return f"---\n{yaml.safe_dump(header, sort_keys=False, allow_unicode=True)}---\n"


def _summary(of: Subject) -> str:
    version = of.version
    base = of.base_model or "its base model"
    state = version.state.value.replace("_", " ")
    lines = [
        f"A LoRA adapter of {base} that learned from its users' thumbs, published on"
        f" {_day(version.published_at)} by Thumbloop. Its state there, since {_day(version.state_since)}: {state}.",
    ]
    if version.is_tainted:
        lines.append(
            "\n**It, or a version that it grew from, learned from data that a user had erased since.**"
        )
    return "\n".join(lines) + "\n"


def _use(of: Subject) -> str:
    base = json.dumps(of.base_model or "the base model")
    rank = of.manifest.policy_adapter.rank if of.manifest.policy_adapter else 0
    return f"""## Use it

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base}), "this folder")
```

vLLM takes it as it is, `--enable-lora --lora-modules name=folder`, with a `--max-lora-rank` of {rank} or more. `reward/` is the reward model that was published
with it, another adapter of the same base model: it reads prompt, reply and the tokens of the verdict prompt, and its
reward is the log-probability of the token up less that of the token down.
"""


def _learned(of: Subject) -> str:
    rows = [
        "| version | thumbs and preferences | of them again | replies that trained the policy |",
        "|---|---|---|---|",
    ]
    total = 0
    for version in of.line:
        used = of.used.get(version.round_id or "", Inputs())
        total += used.new
        name = "0, the base model" if version.parent is None else str(version.version)
        rows.append(f"| {name} | {used.new} new | {used.replayed} | {used.replies} |")
    text = "\n".join(rows)
    return (
        "## What it learned from\n\n"
        f"{total} thumbs and preferences, in {len(of.line) - 1} rounds; each version grew from the one below.\n\n"
        f"{text}\n"
    )


def _metrics(of: Subject) -> str:
    if not of.manifest.metrics:
        return ""
    rows = [f"| `{name}` | {value:.6g} |" for name, value in sorted(of.manifest.metrics.items())]
    return (
        "\n".join(["## What its round measured\n", "| metric | value |", "|---|---|", *rows]) + "\n"
    )


def _settings(of: Subject) -> str:
    if not of.manifest.settings:
        return ""
    settings = json.dumps(of.manifest.settings, indent=1, sort_keys=True)
    return f"## Settings of its round\n\n```json\n{settings}\n```\n"


def _files(of: Subject) -> str:
    manifest = of.manifest
    rows = ["## What is what\n", "| what | |", "|---|---|"]
    for name, facts in (("policy", manifest.policy_adapter), ("reward", manifest.reward_adapter)):
        if facts is not None:
            rows.append(f"| {name} adapter, rank and alpha | {facts.rank}, {facts.alpha:g} |")
            rows.append(f"| {name} adapter, sha256 | `{facts.digest}` |")
    rows.append(f"| base model, digest | `{manifest.base_model.digest}` |")
    rows.append(f"| tokenizer, digest | `{manifest.base_model.tokenizer_digest}` |")
    if manifest.verdict is not None:
        verdict = manifest.verdict
        prompt = " ".join(map(str, verdict.prompt))
        rows.append(
            f"| verdict prompt, up and down, token ids | {prompt}; {verdict.up}; {verdict.down} |"
        )
    rows.append(f"| trained in | {manifest.dtype} |")
    return "\n".join(rows) + "\n"


def _day(at: float) -> str:
    return f"{datetime.fromtimestamp(at, UTC):%Y-%m-%d}"
