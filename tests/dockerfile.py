"""The Dockerfile, read: its stages and what each of them says."""

import json
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCKERFILE = (ROOT / "Dockerfile").read_text()


@dataclass
class Stage:
    name: str
    base: str
    instructions: list[tuple[str, str]] = field(default_factory=list)

    def values(self, keyword: str) -> list[str]:
        return [text for word, text in self.instructions if word == keyword]

    def environment(self) -> dict[str, str]:
        pairs = (pair for text in self.values("ENV") for pair in shlex.split(text))
        return dict(pair.split("=", 1) for pair in pairs)

    def copies(self) -> list[str]:
        """Paths of the tree that this stage copies."""
        sources = (shlex.split(text)[:-1] for text in self.values("COPY"))
        return [path for paths in sources for path in paths]

    def commands(self) -> list[str]:
        """What this stage runs, in shell form."""
        texts = self.values("RUN") + self.values("CMD")
        texts += [text[text.index("CMD") + 3 :] for text in self.values("HEALTHCHECK")]
        return [shlex.join(json.loads(t)) if t.lstrip().startswith("[") else t for t in texts]


def parse(text: str) -> dict[str, Stage]:
    """Read the stages, each by its name."""
    text = re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ")
    stages: dict[str, Stage] = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        keyword, rest = line.split(maxsplit=1)
        if keyword == "FROM":
            base, _as, name = rest.split()
            stages[name] = Stage(name, base)
        elif stages:
            stages[name].instructions.append((keyword, rest))
    return stages


def chain(stages: dict[str, Stage], target: str, accelerator: str) -> list[Stage]:
    """Return the stages that a target is built from, itself first."""
    found = []
    name = target
    while name in stages:
        found.append(stages[name])
        name = stages[name].base.replace("${ACCELERATOR}", accelerator)
    return found
