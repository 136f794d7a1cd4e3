"""Code blocks of the pages, each with a tag that says how it is checked, and a shell that runs them in order."""

import asyncio
import os
import re
from asyncio.subprocess import PIPE, STDOUT
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]

TAGS = {
    "test": "run here, in order, against a server with a fake engine",
    "make": "run by `make demo`, `make test` and their tests; here make says what it would run",
    "needs=network": "parsed",
    "needs=gpu": "parsed",
    "needs=docker": "parsed",
}
_BLOCK = re.compile(r"^```(\w+)?(?: +(\S[^\n]*))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_SERVING = re.compile(r"^make serve\b", re.MULTILINE)
_TRAINING = re.compile(r"^make train\b", re.MULTILINE)

MODEL = "/models/Qwen2.5-0.5B-Instruct"
"""What the pages call the reader's model; the tests give them another."""


@dataclass(frozen=True)
class Block:
    """One block: the line it begins on, its language, its tag, what is in it."""

    page: str
    line: int
    language: str
    tag: str
    text: str

    @property
    def serves(self) -> bool:
        return self.tag == "make" and bool(_SERVING.search(self.text))

    @property
    def trains(self) -> bool:
        return self.tag == "make" and bool(_TRAINING.search(self.text))

    @property
    def file(self) -> str:
        """Return the name that its first line gives it: settings are kept under it."""
        named = re.match(r"# ([\w./-]+\.yaml)\b", self.text)
        assert named, f"{self}: begins with the name of its file"
        return named[1]

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: str) -> list[Block]:
    """Return the blocks of a page, in order."""
    text = (ROOT / page).read_text()
    return [
        Block(page, text.count("\n", 0, b.start()) + 1, b[1] or "", (b[2] or "").strip(), b[3])
        for b in _BLOCK.finditer(text)
    ]


def commands(block: Block) -> Iterator[str]:
    """Yield the commands of a block of shell, one a line, without what is said of them."""
    for line in block.text.replace("\\\n", "").splitlines():
        command = re.sub(r"\s+#\s.*", "", line).strip()
        if command and not command.startswith("#"):
            yield command


@dataclass
class Shell:
    """A reader's shell in a folder with the checkout's parts: what a block exports, the next one has."""

    folder: Path
    environment: dict[str, str]
    replaced: dict[str, str] = field(default_factory=dict)
    """What stands for something else in the pages: addresses, the model, the id of a reply."""

    def __post_init__(self) -> None:
        for name in (".venv", "examples"):
            (self.folder / name).symlink_to(ROOT / name)

    def said(self, text: str) -> str:
        """Return a text of a page with what its words stand for."""
        for words, meant in self.replaced.items():
            text = text.replace(words, meant)
        return text

    async def run(self, block: Block) -> str:
        """Run a block to its end, return what it printed. The reader has nothing to say in a chat, and yes to whom asks."""
        text = self.said(block.text)
        if block.language == "python":
            text = f".venv/bin/python - <<'PYTHON'\n{text}PYTHON\n"
        script = f"set -eo pipefail\ntouch .exports; . ./.exports\n{text}\nexport -p >.exports\n"
        terminal, end = os.openpty()
        os.write(terminal, b"\x04y\n" if "thumbloop chat" in text else b"y\n")
        try:
            process = await asyncio.create_subprocess_exec(
                "bash",
                "-c",
                script,
                cwd=self.folder,
                env=self.environment,
                stdin=end,
                stdout=PIPE,
                stderr=STDOUT,
            )
            output = (await process.communicate())[0].decode()
        finally:
            os.close(end)
            os.close(terminal)
        assert process.returncode == 0, f"{block}:\n{output}"
        return output


def environment(**more: str) -> dict[str, str]:
    """Return the environment of a reader who has set nothing of ours."""
    ours = ("THUMBLOOP_", "OPENAI_")
    return {n: text for n, text in os.environ.items() if not n.startswith(ours)} | more
